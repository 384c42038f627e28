"""The tables of the study of the unit of rho, from the records of its runs.

    python docs/results/units/table.py outputs/comparison/units_*

Writes next to this file, and prints all but the first: `runs.csv` (every run), `best.csv` (the best value of each task
in each unit), `spread.csv` (its spread over tasks, in decades) and `probe.csv` (the rho at which sharpness is a tenth of
the loss early in the run, where `hf-sam find-rho` starts, beside the best).
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from hf_sam.experiments.records import RunRecord, find_records
from hf_sam.rho_search.probe import middle_rho

CONTROL = "adamw"
RESAMPLES = 2000
EARLY = 1 / 6  # of the steps: the first entries of every log
LOSSES = ("nll", "nll_per_token")  # a run has one of them


def describe(run: RunRecord) -> dict:
    """One row: what was run, its scores, and the quantities from which units are computed."""
    family, _, value = run.arm.rpartition(" ")
    logged = pd.DataFrame([entry for entry in run.curves if "sam_rho" in entry])
    median = logged.median(numeric_only=True) if len(logged) else pd.Series(dtype=float)
    return {
        "task": run.task,
        "family": family or run.arm,
        "value": float(value) if family else 0.0,
        "seed": run.seed,
        "loss": next(run.metrics[name] for name in LOSSES if name in run.metrics),
        "accuracy": run.metrics.get("accuracy"),
        "gradient norm": median.get("sam_ascent_grad_norm"),
        "sharpness / loss": (logged["sam_sharpness"] / logged["loss"]).median() if "sam_sharpness" in logged else None,
        "share in the head": median.get("sam_share/head"),
        "probe": middle_rho(
            [entry for entry in logged.to_dict("records") if entry["step"] <= EARLY * logged.step.max()]
        )
        if len(logged)
        else None,
    }


def with_tied_heads(runs: pd.DataFrame) -> pd.DataFrame:
    """All runs; where the head is the embedding, those without embeddings are also those without the head."""
    have = runs[runs.family == "no-embeddings-no-head"].task.unique()
    same = runs[(runs.family == "no-embeddings") & ~runs.task.isin(have)]
    return pd.concat([runs, same.assign(family="no-embeddings-no-head")])


def best_values(runs: pd.DataFrame, norms: dict[str, float]) -> pd.DataFrame:
    """The best value of every family in every task, in all units that it has, and whether it is inside its grid."""
    rows = []
    for (task, family), group in runs[runs.family != CONTROL].groupby(["task", "family"], sort=False):
        mean = group.groupby("value")["loss"].mean()
        best = mean.idxmin()
        control = runs[(runs.task == task) & (runs.family == CONTROL)].set_index("seed")["loss"]
        gains = control - group[group.value == best].set_index("seed")["loss"]
        error = gains.std() / math.sqrt(len(gains)) if len(gains) > 1 else math.inf
        row = {
            "task": task,
            "family": family,
            "value": best,
            "gain": gains.mean(),
            "is bound": best in (mean.index.min(), mean.index.max()) or not gains.mean() > 2 * error,
        }
        if family == "sam":
            at_best = group[group.value == best].mean(numeric_only=True)
            row |= {
                "rho ||g||": best * at_best["gradient norm"],
                "rho / ||w||": best / norms[task],
                "sharpness / loss": at_best["sharpness / loss"],
                "share in the head": at_best["share in the head"],
            }
        rows.append(row)
    return pd.DataFrame(rows)


def spreads(best: pd.DataFrame) -> dict[str, float]:
    """Largest minus smallest base-10 logarithm over tasks, by unit."""
    found = {}
    for family, group in best.groupby("family", sort=False):
        units = ["value"] + (["rho ||g||", "rho / ||w||", "sharpness / loss", "share in the head"] * (family == "sam"))
        for unit in units:
            logs = np.log10(group[unit].astype(float).clip(lower=1e-12))
            found[family if unit == "value" else f"{family}: {unit}"] = float(logs.max() - logs.min())
    return found


def probes(runs: pd.DataFrame, best: pd.DataFrame) -> pd.DataFrame:
    """The rho that the probe finds in runs with the smallest rho, the best one, and their distance in decades."""
    plain = runs[runs.family == "sam"]
    smallest = plain[plain.value == plain.groupby("task")["value"].transform("min")]
    found = smallest.groupby("task", sort=False)["probe"].median()
    table = best[best.family == "sam"].set_index("task")[["value", "is bound"]].join(found).reset_index()
    return table.assign(decades=np.log10(table.probe / table.value))


def main(folders: list[str]) -> None:
    records = [run for folder in folders for run in find_records(folder)[0] if run.status == "finished"]
    runs = with_tied_heads(pd.DataFrame(map(describe, records)))
    norms = {run.task: run.model["trainable_norm"] for run in records}  # before the first step
    best = best_values(runs, norms)
    generator = np.random.default_rng(0)
    seeds = sorted(runs.seed.unique())
    drawn: dict[str, list[float]] = {}
    for _ in range(RESAMPLES):
        chosen = generator.choice(seeds, len(seeds))
        again = pd.concat([runs[runs.seed == seed].assign(seed=index) for index, seed in enumerate(chosen)])
        for unit, spread in spreads(best_values(again, norms)).items():
            drawn.setdefault(unit, []).append(spread)
    inside = best[~best["is bound"]].groupby("family").size()
    table = pd.DataFrame(
        {
            "unit": unit,
            "spread": spread,
            "low": np.quantile(drawn[unit], 0.025),
            "high": np.quantile(drawn[unit], 0.975),
            "tasks inside": int(inside.get(unit.split(":")[0], 0)),
        }
        for unit, spread in spreads(best).items()
    )
    here = Path(__file__).parent
    probed = probes(runs, best)
    for name, frame in (("runs", runs), ("best", best), ("spread", table), ("probe", probed)):
        frame.to_csv(here / f"{name}.csv", index=False, float_format="%.6g")
    print(*(frame.to_string(index=False, float_format="%.3g") for frame in (best, table, probed)), sep="\n\n")


if __name__ == "__main__":
    main(sys.argv[1:])
