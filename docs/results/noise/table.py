"""The tables of the studies of wrong labels.

    python docs/results/noise/table.py          # from scores.csv
    python docs/results/noise/table.py outputs/comparison/noise_*

`scores.csv`, next to this file, has test accuracy (%) and NLL of every run of whole seeds, and its accuracy on the
validation split at the last evaluation and at the best. Prints the means over seeds, and each treatment minus the control
that is best on the validation split.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from hf_sam.experiments.records import find_records
from hf_sam.reporting.statistics import student_interval

SCORES = Path(__file__).with_name("scores.csv")
MEASURES = ["accuracy", "nll", "validation", "best validation"]
STOPPED = ", stopped"
AVERAGED = ("ema", "swa")  # validated before the weights are averaged, so never chosen


def read(folder: Path) -> pd.DataFrame:
    """One row per run of a study, of the seeds with which all arms of a task have finished."""
    rows = []
    for run in (run for run in find_records(folder)[0] if run.status == "finished"):
        validated = [100 * entry["eval_accuracy"] for entry in run.curves if "eval_accuracy" in entry]
        scores = 100 * run.metrics["accuracy"], run.metrics["nll"], validated[-1], max(validated)
        rows.append((folder.name, run.task, run.arm, run.seed, *scores))
    scores = pd.DataFrame(rows, columns=["study", "task", "arm", "seed", *MEASURES])
    arms = scores.groupby(["task", "seed"])["arm"].transform("size")
    return scores[arms == scores.arm.nunique()]


def chosen(scores: pd.DataFrame, arms: list[str]) -> str:
    """The arm that is best on the validation split: as it ends, or at its best if it is stopped."""
    is_stopped = scores.arm.str.endswith(STOPPED)
    validated = scores["best validation"].where(is_stopped, scores["validation"]).groupby(scores.arm).mean()
    return str(validated[arms].idxmax())


def differences(scores: pd.DataFrame) -> pd.DataFrame:
    """Accuracy and NLL of every treatment minus those of the best control, paired over seeds, in each study and task."""
    rows = []
    for (study, task), cell in scores.groupby(["study", "task"], sort=False):
        arms = list(cell.arm.unique())
        controls = [arm for arm in arms if not arm.startswith(("sam", *AVERAGED))]
        control = chosen(cell, controls)
        for treated in (arm for arm in arms if arm.startswith("sam")):
            for metric in ("accuracy", "nll"):
                by_arm = cell.pivot(index="seed", columns="arm", values=metric)
                gains = by_arm[treated] - by_arm[control]
                found = len(gains), gains.mean(), *student_interval(gains)
                rows.append((study, task, treated, control, metric, *found))
    columns = ["study", "task", "treatment", "control", "metric", "seeds", "difference", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


def main(folders: list[str]) -> None:
    if folders:
        scores = pd.concat(read(Path(folder)) for folder in folders)
        scores.sort_values(["study", "task", "arm", "seed"]).to_csv(SCORES, index=False, float_format="%.5g")
    scores = pd.read_csv(SCORES)
    means = scores.groupby(["study", "task", "arm"], sort=False)[MEASURES].mean()
    print(
        means.to_string(float_format="%.2f"),
        differences(scores).to_string(index=False, float_format="%.2f"),
        sep="\n\n",
    )


if __name__ == "__main__":
    main(sys.argv[1:])
