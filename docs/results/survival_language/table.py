"""The tables of the language-model part of the survival study.

    python docs/results/survival_language/table.py                                        # from losses.csv
    python docs/results/survival_language/table.py outputs/comparison/survival_language   # from the records of the runs

`losses.csv`, next to this file, has the test NLL per byte of every run under every treatment, and is written anew from
records. Prints the means over seeds and the tests of the plan: paired t-tests of `sam` minus `adamw` at 3 and 2 bits in both budgets, adjusted after
Holm, and the same differences from every other arm, which are not adjusted.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
from scipy import stats

from hf_sam.experiments.records import find_records
from hf_sam.reporting.statistics import holm

LOSSES = Path(__file__).with_name("losses.csv")
BUDGETS = {"steps": "equal steps", "passes": "equal passes"}
TREATMENTS = ("as trained", "8 bits", "4 bits", "3 bits", "2 bits")
PRIMARY = ("3 bits", "2 bits")


def read(folder: str) -> pd.DataFrame:
    """One row per run and treatment; a run that serves both budgets has a row in each."""
    rows = []
    for run in find_records(folder)[0]:
        for entry in run.survival:
            treatment = "as trained" if entry["kind"] == "none" else f"{entry['level']:g} bits"
            for budget in run.budget.split("+"):
                rows.append((BUDGETS[budget], run.arm, run.seed, treatment, entry["loss"], run.steps, run.passes))
    return pd.DataFrame(rows, columns=["budget", "arm", "seed", "treatment", "loss", "steps", "passes"])


def differences(losses: pd.DataFrame, budget: str, treatment: str, treated: str, control: str) -> pd.Series:
    """Loss of one arm minus that of the other, by seed."""
    cell = losses[(losses.budget == budget) & (losses.treatment == treatment)]
    by_arm = cell.pivot(index="seed", columns="arm", values="loss")
    return (by_arm[treated] - by_arm[control]).dropna()


def tested(losses: pd.DataFrame, treated: str, control: str) -> pd.DataFrame:
    """Mean difference, Student's interval and p-value in every cell of the primary outcome."""
    rows = []
    for treatment in PRIMARY:
        for budget in BUDGETS.values():
            values = differences(losses, budget, treatment, treated, control)
            result = stats.ttest_1samp(values, 0.0)
            interval = result.confidence_interval(0.95)
            rows.append((treatment, budget, len(values), values.mean(), interval.low, interval.high, result.pvalue))
    return pd.DataFrame(rows, columns=["treatment", "budget", "seeds", "difference", "low", "high", "p"])


def primary_outcome(losses: pd.DataFrame) -> pd.DataFrame:
    """The four tests of the plan."""
    table = tested(losses, "sam", "adamw")
    return table.assign(**{"p, Holm": holm(table.p.tolist())})


def main(folders: list[str]) -> None:
    if folders:
        read(folders[0]).to_csv(LOSSES, index=False, float_format="%.6g")
    losses = pd.read_csv(LOSSES)
    for budget in BUDGETS.values():
        cell = losses[losses.budget == budget]
        for name, function in (("mean", "mean"), ("standard deviation", "std")):
            table = cell.pivot_table(index="arm", columns="treatment", values="loss", aggfunc=function, sort=False)
            print(f"\n{budget}, {name} over seeds\n{table[list(TREATMENTS)].round(3).to_string()}")
    print(f"\nsam minus adamw\n{primary_outcome(losses).to_string(index=False, float_format='%.4g')}")
    for treated in ("sam", "flatten"):
        for control in losses.arm.unique():
            if control not in (treated, "adamw" if treated == "sam" else treated):
                table = tested(losses, treated, control)
                print(f"\n{treated} minus {control}\n{table.to_string(index=False, float_format='%.4g')}")


if __name__ == "__main__":
    main(sys.argv[1:])
