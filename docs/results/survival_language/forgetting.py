"""The second fine-tuning of the survival study: first-task loss at matched training loss on the second task.

    python docs/results/survival_language/forgetting.py                               # from forgetting.csv
    python docs/results/survival_language/forgetting.py outputs/forgetting/language   # from the report of the runs

`forgetting.csv`, next to this file, has the losses of every run. Prints `sam` minus each other start, paired over seeds:
at the lowest training loss that all runs reach, which is the plan's outcome, and at a higher one.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
from scipy import stats

from hf_sam.evaluation.forgetting import match

LOSSES = Path(__file__).with_name("forgetting.csv")
COLUMNS = ["start", "replicate", "learning_rate", "second_train_loss", "second_loss", "first_loss"]
HIGHER_TARGET = 1.75  # in the middle of the grids, where all starts still have a point on either side


def matched(losses: pd.DataFrame, target: float | None = None) -> tuple[float, pd.DataFrame]:
    """The training loss at which starts are compared, and the first-task losses there, one column per start."""
    paths = {
        start: {
            seed: list(zip(path.second_train_loss, path.first_loss, strict=True))
            for seed, path in of_start.sort_values("learning_rate").groupby("replicate")
        }
        for start, of_start in losses.groupby("start", sort=False)
    }
    found = match(paths, target)
    return found.target, pd.DataFrame(found.losses)


def differences(losses: pd.DataFrame, target: float | None = None, treated: str = "sam") -> pd.DataFrame:
    """One start minus each other one: mean, Student's interval and p-value over pairs."""
    target, first = matched(losses, target)
    rows = []
    for start in first.columns.drop(treated):
        values = (first[treated] - first[start]).dropna()
        result = stats.ttest_1samp(values, 0.0)
        interval = result.confidence_interval(0.95)
        rows.append((target, start, len(values), values.mean(), interval.low, interval.high, result.pvalue))
    return pd.DataFrame(rows, columns=["training loss", "minus", "pairs", "difference", "low", "high", "p"])


def main(folders: list[str]) -> None:
    if folders:
        runs = pd.read_csv(Path(folders[0]) / "report/data/runs.csv")
        runs[COLUMNS].to_csv(LOSSES, index=False, float_format="%.6g")
    losses = pd.read_csv(LOSSES)
    print(losses.groupby(["start", "learning_rate"], sort=False)[COLUMNS[3:]].mean().round(3).to_string())
    for target in (None, HIGHER_TARGET):
        print(f"\n{differences(losses, target).to_string(index=False, float_format='%.4g')}")


if __name__ == "__main__":
    main(sys.argv[1:])
