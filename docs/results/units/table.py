"""The tables of the study of the unit of rho.

    python docs/results/units/table.py          # from runs.csv
    python docs/results/units/table.py outputs/comparison/units_*

`runs.csv`, next to this file, has the runs of every family with the seeds with which it has finished in all tasks: their
scores, and the quantities from which units are computed. Prints the tables of the page in Markdown: the best value of every task in
every unit, the spread of each unit over tasks in decades, and the rho from which `hf-sam find-rho` would start, beside
the best.
"""

from __future__ import annotations

import math
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from hf_sam.experiments.records import RunRecord, find_records
from hf_sam.rho_search.probe import middle_rho

RUNS = Path(__file__).with_name("runs.csv")
CONTROL = "adamw"
EARLY = 1 / 6  # of the steps: the first entries of every log
LOSSES = ("nll", "nll_per_token")  # a run has one of them
FAMILIES = ["sam", "no-embeddings", "no-embeddings-no-head", "asam", "precond", "lesam"]
DERIVED = ["rho ‖g‖", "rho / ‖w‖", "sharpness / loss", "share in the head"]  # of runs of plain SAM


def describe(run: RunRecord) -> dict:
    """One row: what was run, its scores, and the quantities from which units are computed."""
    family, _, value = run.arm.rpartition(" ")
    logged = pd.DataFrame([entry for entry in run.curves if "sam_rho" in entry])
    median = logged.median(numeric_only=True) if len(logged) else pd.Series(dtype=float)
    early = [e for e in logged.to_dict("records") if e["step"] <= EARLY * logged.step.max()] if len(logged) else []
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
        "weight norm": run.model["trainable_norm"],  # before the first step
        "probe": middle_rho(early),
    }


def read(folders: list[str]) -> pd.DataFrame:
    """All runs of the seeds with which AdamW and plain SAM have finished in every task, and the family in every task."""
    runs = pd.DataFrame(
        describe(run) for folder in folders for run in find_records(folder)[0] if run.status == "finished"
    )
    cells = runs[runs.family.isin([CONTROL, "sam"])].groupby("seed").size()
    runs = runs[runs.seed.isin(cells.index[cells == cells.max()])]
    have = runs[runs.family == "no-embeddings-no-head"].task.unique()
    same = runs[(runs.family == "no-embeddings") & ~runs.task.isin(have)]  # the head is the embedding
    runs = pd.concat([runs, same.assign(family="no-embeddings-no-head")])
    runs = runs[runs.groupby(["family", "seed"])["task"].transform("nunique") == runs.task.nunique()]
    return runs.sort_values(["task", "family", "value", "seed"])


def best_values(runs: pd.DataFrame) -> pd.DataFrame:
    """
    The best value of every family in every task, in all units that it has, and whether it is only a bound.

    It is the one with the largest mean gain over AdamW of the same seed, because not all values were run with all seeds.
    """
    control = runs[runs.family == CONTROL].set_index(["task", "seed"])["loss"].rename("control")
    arms = runs[runs.family != CONTROL].join(control, on=["task", "seed"])
    arms["gain"] = arms.control - arms.loss
    rows = []
    for (task, family), group in arms.groupby(["task", "family"], sort=False):
        mean = group.groupby("value")["gain"].mean()
        best = mean.idxmax()
        at_best = group[group.value == best]
        gains = at_best.gain
        error = gains.std() / math.sqrt(len(gains)) if len(gains) > 1 else math.inf
        row = {
            "task": task,
            "family": family,
            "value": best,
            "gain": gains.mean(),
            "seeds": len(gains),
            "is_bound": best in (mean.index.min(), mean.index.max()) or not gains.mean() > 2 * error,
        }
        if family == "sam":
            at_best = at_best.mean(numeric_only=True)
            row |= {
                "rho ‖g‖": best * at_best["gradient norm"],
                "rho / ‖w‖": best / at_best["weight norm"],
                "sharpness / loss": at_best["sharpness / loss"],
                "share in the head": at_best["share in the head"],
            }
        rows.append(row)
    return pd.DataFrame(rows)


def spreads(best: pd.DataFrame) -> dict[str, float]:
    """Largest minus smallest base-10 logarithm over tasks, by unit; infinite if a value is 0, NaN if a task is missing."""
    found = {}
    for family in FAMILIES:
        group = best[best.family == family]
        for unit in ["value", *(DERIVED if family == "sam" else [])]:
            values = group[unit].astype(float)
            spread = math.log10(values.max() / values.min()) if values.min() > 0 else math.inf
            is_whole = len(group) == best.task.nunique()
            found[family if unit == "value" else f"{family}: {unit}"] = spread if is_whole else math.nan
    return found


def spread_table(runs: pd.DataFrame) -> pd.DataFrame:
    """
    The spread of every unit, its value when each seed is taken alone, how often it is at most half of that of plain rho
    over all resamples of the seeds, and in how many tasks the best value is no bound.
    """
    seeds, best = sorted(runs.seed.unique()), best_values(runs)
    alone = [spreads(best_values(runs[runs.seed == seed])) for seed in seeds]
    resampled = [spreads(best_values(resample(runs, drawn))) for drawn in product(seeds, repeat=len(seeds))]
    inside = best[~best["is_bound"]].groupby("family").size()
    rows = []
    for unit, spread in spreads(best).items():
        halves = [one[unit] <= one["sam"] / 2 for one in resampled]
        whole = all(math.isfinite(one[unit]) for one in alone) and len(seeds) > 1
        rows.append(
            {
                "unit": unit,
                "decades": f"{spread:.1f}",
                "by seed": ", ".join("-" if math.isnan(one[unit]) else f"{one[unit]:.1f}" for one in alone),
                "at most half of plain rho": f"{100 * np.mean(halves):.0f} %" if whole else "-",
                "no bound in": int(inside.get(unit.split(":")[0], 0)),
            }
        )
    return pd.DataFrame(rows)


def resample(runs: pd.DataFrame, drawn: tuple[int, ...]) -> pd.DataFrame:
    """The runs of the `drawn` seeds, as if each were a seed of its own."""
    return pd.concat(runs[runs.seed == seed].assign(seed=place) for place, seed in enumerate(drawn))


def probes(runs: pd.DataFrame, best: pd.DataFrame) -> pd.DataFrame:
    """The rho that the probe finds in runs with the smallest rho, the best one, and their distance in decades."""
    plain = runs[runs.family == "sam"]
    smallest = plain[plain.value == plain.groupby("task")["value"].transform("min")]
    found = smallest.groupby("task", sort=False)["probe"].median()
    table = best[best.family == "sam"].set_index("task")[["value", "is_bound"]].join(found).reset_index()
    return table.assign(decades=np.log10(table.probe / table.value))


def markdown(runs: pd.DataFrame) -> list[str]:
    """The tables of the page; * marks a bound."""
    best = best_values(runs)
    cells = best.assign(
        cell=[f"{row.value:g}{'*' if row.is_bound else ''} ({row.gain:+.3f})" for row in best.itertuples()]
    )
    values = cells.pivot(index="task", columns="family", values="cell")[FAMILIES].reset_index()
    derived = best[best.family == "sam"][["task", *DERIVED]].map(lambda x: x if isinstance(x, str) else f"{x:.2g}")
    probed = probes(runs, best)
    probed = pd.DataFrame(
        {
            "task": probed.task,
            "best rho": [f"{row.value:g}{'*' if row.is_bound else ''}" for row in probed.itertuples()],
            "probe": [f"{value:.2g}" for value in probed.probe],
            "decades": [f"{value:+.1f}" for value in probed.decades],
        }
    )
    return [as_markdown(table) for table in (values, derived, spread_table(runs), probed)]


def as_markdown(table: pd.DataFrame) -> str:
    """A table in Markdown."""
    rows = [list(table.columns), ["---"] * len(table.columns), *table.astype(str).to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(folders: list[str]) -> None:
    if folders:
        read(folders).to_csv(RUNS, index=False, float_format="%.5g")
    print(*markdown(pd.read_csv(RUNS)), sep="\n\n")


if __name__ == "__main__":
    main(sys.argv[1:])
