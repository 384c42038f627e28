"""The tables of the fine-tuned encoders in the survival study.

    python docs/results/survival_encoders/table.py          # from scores.csv
    python docs/results/survival_encoders/table.py outputs/comparison/survival_texts outputs/comparison/survival_images

`scores.csv`, next to this file, has test accuracy (%), NLL and ECE (%) of every run under every treatment of the plan.
Prints the mean accuracies over seeds, and the primary outcome: accuracy at 4 bits, `sam` minus `adamw`, paired over
seeds, adjusted after Holm over the tasks of a budget.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
from scipy import stats

from hf_sam.experiments.records import find_records
from hf_sam.reporting.statistics import holm

SCORES = Path(__file__).with_name("scores.csv")
BUDGETS = {"steps": "equal steps", "passes": "equal passes"}
NAMES = {"none": "as trained", "bits per channel": "{:g} bits", "pruned": "{:.0%} pruned"}
CELLS = 7 * 2  # arms and budgets
TREATMENTS = ("as trained", "4 bits", "3 bits", "2 bits", "50% pruned")


def read(folders: list[str]) -> pd.DataFrame:
    """One row per run and treatment of the plan; a run that serves both budgets has a row in each."""
    rows = []
    for run in (run for folder in folders for run in find_records(folder)[0] if run.status == "finished"):
        for entry in run.survival:
            if entry["kind"] in NAMES:
                treatment = NAMES[entry["kind"]].format(entry["level"])
                scores = 100 * entry["accuracy"], entry["nll"], 100 * entry["ece"]
                rows += [
                    (run.task, BUDGETS[budget], run.arm, run.seed, treatment, *scores)
                    for budget in run.budget.split("+")
                ]
    return pd.DataFrame(rows, columns=["task", "budget", "arm", "seed", "treatment", "accuracy", "nll", "ece"])


def complete(scores: pd.DataFrame) -> pd.DataFrame:
    """The scores of the seeds with which all arms of a task have finished, of tasks with several such seeds."""
    runs = scores[["task", "budget", "arm", "seed"]].drop_duplicates()
    counts = runs.groupby(["task", "seed"]).size()
    kept = counts[counts == CELLS].reset_index()
    kept = kept[kept.groupby("task")["seed"].transform("size") > 1]
    return scores.merge(kept[["task", "seed"]])


def differences(scores: pd.DataFrame, treatment: str, treated: str = "sam", control: str = "adamw") -> pd.DataFrame:
    """Accuracy of one arm minus that of another: mean, Student's interval and adjusted p-value in every task and budget."""
    rows = []
    for budget in BUDGETS.values():
        cells = scores[(scores.budget == budget) & (scores.treatment == treatment)]
        of_budget = []
        for task, cell in cells.groupby("task", sort=False):
            by_arm = cell.pivot(index="seed", columns="arm", values="accuracy")
            values = (by_arm[treated] - by_arm[control]).dropna()
            result = stats.ttest_1samp(values, 0.0)
            interval = result.confidence_interval(0.95)
            of_budget.append([task, budget, len(values), values.mean(), interval.low, interval.high, result.pvalue])
        rows += [[*row, p] for row, p in zip(of_budget, holm([row[-1] for row in of_budget]), strict=True)]
    return pd.DataFrame(rows, columns=["task", "budget", "seeds", "difference", "low", "high", "p", "p, Holm"])


def main(folders: list[str]) -> None:
    if folders:
        complete(read(folders)).to_csv(SCORES, index=False, float_format="%.6g")
    scores = pd.read_csv(SCORES)
    for (task, budget), cell in scores.groupby(["task", "budget"], sort=False):
        table = cell.pivot_table(index="arm", columns="treatment", values="accuracy", sort=False)
        print(f"\n{task}, {budget}\n{table[list(TREATMENTS)].round(1).to_string()}")
    for treatment in TREATMENTS:
        print(
            f"\nsam minus adamw, {treatment}\n{differences(scores, treatment).to_string(index=False, float_format='%.3g')}"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
