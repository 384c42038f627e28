"""The tables of the study of wrong labels and their controls.

    python docs/results/noise/table.py          # from scores.csv
    python docs/results/noise/table.py outputs/comparison/noise_images outputs/comparison/noise_texts

`scores.csv`, next to this file, has test accuracy (%) and NLL of every run, and its accuracy on the validation split at
the last evaluation and at the best. Prints the means over seeds, and each treatment minus the best control.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from hf_sam.experiments.records import find_records
from hf_sam.reporting.statistics import student_interval

SCORES = Path(__file__).with_name("scores.csv")
CONTROLS = ("adamw", "adamw low", "adamw lowest", "smoothing", "parts of 4")
# Arms among which the validation split chooses one, by treatment.
TREATMENTS = {"batch": ("sam", "sam small"), "m 4": ("sam m 4",), "m 1": ("sam m 1", "sam m 1 large")}
KINDS = {"final": "", "stopped": ", stopped"}  # what is added to an arm's name


def read(folders: list[str]) -> pd.DataFrame:
    """One row per finished run."""
    rows = []
    for run in (run for folder in folders for run in find_records(folder)[0] if run.status == "finished"):
        validated = [100 * entry["eval_accuracy"] for entry in run.curves if "eval_accuracy" in entry]
        scores = 100 * run.metrics["accuracy"], run.metrics["nll"]
        rows.append((run.task, run.arm, run.seed, *scores, validated[-1], max(validated)))
    return pd.DataFrame(rows, columns=["task", "arm", "seed", "accuracy", "nll", "validation", "best validation"])


def chosen(scores: pd.DataFrame, names: tuple[str, ...], kind: str) -> str | None:
    """The arm among `names` with the best accuracy on the validation split; `None` if none of them was run."""
    arms = [name + KINDS[kind] for name in names if name + KINDS[kind] in set(scores.arm)]
    column = "validation" if kind == "final" else "best validation"
    return scores[scores.arm.isin(arms)].groupby("arm")[column].mean().idxmax() if arms else None


def differences(scores: pd.DataFrame) -> pd.DataFrame:
    """Test accuracy and NLL of each treatment minus the best control of its kind, paired over seeds."""
    rows = []
    for task, of_task in scores.groupby("task", sort=False):
        for kind in KINDS:
            control = chosen(of_task, CONTROLS, kind)
            for names in TREATMENTS.values():
                treated = chosen(of_task, names, kind)
                if control is None or treated is None:
                    continue
                row = {"task": task, "treatment": treated, "control": control}
                for metric, digits in (("accuracy", 1), ("nll", 2)):
                    by_arm = of_task.pivot(index="seed", columns="arm", values=metric)
                    gains = (by_arm[treated] - by_arm[control]).dropna()
                    low, high = student_interval(gains)
                    row[metric] = f"{gains.mean():+.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
                rows.append(row)
    return pd.DataFrame(rows)


def main(folders: list[str]) -> None:
    if folders:
        read(folders).sort_values(["task", "arm", "seed"]).to_csv(SCORES, index=False, float_format="%.5g")
    scores = pd.read_csv(SCORES)
    spread = scores.groupby(["task", "arm"], sort=False).agg(["mean", "std"]).drop(columns="seed")
    print(spread.to_string(float_format="%.2f"), differences(scores).to_string(index=False), sep="\n\n")


if __name__ == "__main__":
    main(sys.argv[1:])
