"""The tables of the confirmation in the study of wrong labels.

    python docs/results/noise/confirm.py          # from confirmation.csv
    python docs/results/noise/confirm.py outputs/comparison/noise_confirm

`confirmation.csv` has the same columns as `scores.csv`. Prints the means over seeds, and each treatment minus the control
that is best on the validation split.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).parent))
from table import read

from hf_sam.reporting.statistics import student_interval

SCORES = Path(__file__).with_name("confirmation.csv")
TREATMENTS = ("sam m 4", "sam", "sam m 4, stopped", "sam, stopped")


def on_validation(scores: pd.DataFrame) -> pd.Series:
    """Mean accuracy on the validation split, by arm: of the last model, or of the best one of arms that are stopped."""
    is_stopped = scores.arm.str.endswith(", stopped")
    return scores["best validation"].where(is_stopped, scores["validation"]).groupby(scores.arm).mean()


def differences(scores: pd.DataFrame) -> pd.DataFrame:
    """Test accuracy and NLL of each treatment minus the best control, paired over seeds, on each task."""
    rows = []
    for task, of_task in scores.groupby("task", sort=False):
        control = on_validation(of_task).drop(list(TREATMENTS)).idxmax()
        for treated in TREATMENTS:
            for metric in ("accuracy", "nll"):
                by_arm = of_task.pivot(index="seed", columns="arm", values=metric)
                gains = (by_arm[treated] - by_arm[control]).dropna()
                low, high = student_interval(gains)
                rows.append((task, treated, control, metric, len(gains), gains.mean(), low, high))
    return pd.DataFrame(rows, columns=["task", "treatment", "control", "metric", "seeds", "difference", "low", "high"])


def main(folders: list[str]) -> None:
    if folders:
        scores = read(folders)
        seeds = scores.groupby(["task", "seed"])["arm"].transform("size")
        scores = scores[seeds == seeds.max()]  # whole seeds only
        scores.sort_values(["task", "arm", "seed"]).to_csv(SCORES, index=False, float_format="%.5g")
    scores = pd.read_csv(SCORES)
    means = scores.groupby(["task", "arm"], sort=False)[["accuracy", "nll", "validation", "best validation"]].mean()
    print(means.to_string(float_format="%.2f"), differences(scores).to_string(index=False, float_format="%.2f"), sep="\n\n")


if __name__ == "__main__":
    main(sys.argv[1:])
