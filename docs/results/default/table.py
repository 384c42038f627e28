"""The tables of the study of the default.

    python docs/results/default/table.py          # from scores.csv
    python docs/results/default/table.py outputs/comparison/default_choice outputs/comparison/default_confirm

`scores.csv`, next to this file, has test accuracy (%), NLL and ECE (%) of every run of whole seeds. Prints the tables of
the page in Markdown, one for each arm, and the mean over tasks.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pandas as pd

from hf_sam.experiments.records import find_records
from hf_sam.reporting.statistics import student_interval

SCORES = Path(__file__).with_name("scores.csv")
CONTROL = "adamw"
SCALES = {"accuracy": 100, "nll": 1, "ece": 100}
DIGITS = {"accuracy": 1, "nll": 3, "ece": 1}


def read(folder: Path) -> pd.DataFrame:
    """One row per run, of the seeds with which all arms have finished in all tasks."""
    rows = [
        (run.task, run.arm, run.seed, *(scale * run.metrics[name] for name, scale in SCALES.items()))
        for run in find_records(folder)[0]
        if run.status == "finished"
    ]
    scores = pd.DataFrame(rows, columns=["task", "arm", "seed", *SCALES])
    runs = scores.groupby("seed")["arm"].transform("size")
    return scores[runs == runs.max()]


def differences(scores: pd.DataFrame) -> pd.DataFrame:
    """Every arm minus AdamW, paired over seeds, with Student's 95 % interval, in each task and metric."""
    rows = []
    for task, cell in scores.groupby("task", sort=False):
        for metric in SCALES:
            by_arm = cell.pivot(index="seed", columns="arm", values=metric)
            for arm in by_arm.columns.drop(CONTROL):
                pairs = by_arm[[arm, CONTROL]].dropna()
                gains = pairs[arm] - pairs[CONTROL]
                found = (pairs[CONTROL].mean(), len(gains), gains.mean(), *student_interval(gains))
                rows.append((task, arm, metric, *found))
    columns = ["task", "arm", "metric", "control", "seeds", "difference", "low", "high"]
    return pd.DataFrame(rows, columns=columns).dropna()


def markdown(scores: pd.DataFrame) -> dict[str, str]:
    """
    The table of every arm: AdamW's mean accuracy with the same seeds, and what the arm adds in each metric, by task.
    """
    tables = {}
    for arm, rows in differences(scores).groupby("arm"):
        lines = ["| task | AdamW | seeds | accuracy | NLL | ECE |", "|---|---|---|---|---|---|"]
        for task, row in rows.groupby("task"):
            by_metric = {entry.metric: entry for entry in row.itertuples()}
            cells = [interval(by_metric[metric], digits) for metric, digits in DIGITS.items()]
            lines.append(
                f"| {task} | {by_metric['accuracy'].control:.1f} | {by_metric['nll'].seeds} | {' | '.join(cells)} |"
            )
        tables[arm] = "\n".join(lines)
    return tables


def overall(scores: pd.DataFrame, arm: str) -> dict[str, str]:
    """The difference in accuracy of one arm, averaged over the tasks of each kind, with its interval over seeds."""
    kinds = scores.task.map(lambda task: "30 % wrong" if "wrong" in task else "5e-5" if "5e-5" in task else "right")
    found = {}
    for kind, cell in scores.groupby(kinds):
        means = cell[cell.arm.isin([arm, CONTROL])].groupby(["seed", "arm"])["accuracy"].mean().unstack().dropna()
        if arm not in means:
            continue
        gains = means[arm] - means[CONTROL]
        low, high = student_interval(gains)
        found[kind] = f"{gains.mean():+.1f} [{low:+.1f}, {high:+.1f}]"
    return found


def interval(row: Any, digits: int) -> str:
    """A difference with its interval."""
    return f"{row.difference:+.{digits}f} [{row.low:+.{digits}f}, {row.high:+.{digits}f}]"


def main(folders: list[str]) -> None:
    if folders:
        scores = pd.concat(read(Path(folder)) for folder in folders).drop_duplicates(["task", "arm", "seed"])
        scores.sort_values(["task", "arm", "seed"]).to_csv(SCORES, index=False, float_format="%.5g")
    for arm, table in markdown(pd.read_csv(SCORES)).items():
        print(f"{arm}\n\n{table}\n\naccuracy over tasks: {overall(pd.read_csv(SCORES), arm)}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
