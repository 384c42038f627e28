"""Turn records into the tables of a report: group runs, collect their scores, and compare the arms."""

from __future__ import annotations

import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd

from ..evaluation.metrics import METRICS, metric_of
from ..experiments.plan import BUDGETS, TUNING, Question
from ..experiments.records import RunRecord
from .statistics import (
    Estimate,
    PairedComparison,
    compare_paired,
    equivalence_p,
    holm,
    interquartile_mean,
    probability_of_improvement,
)

LEVEL = 0.05
POINTS_THAT_MATTER = 0.3  # the margin of equivalence of metrics in percent, unless the question names one


@dataclass(frozen=True)
class Cell:
    """The finished runs of one task under one condition and budget."""

    task: str
    condition: str
    budget: str
    runs: dict[str, list[RunRecord]] = field(compare=False)  # by arm

    @property
    def title(self) -> str:
        return self.task if self.condition == "clean" else f"{self.task}, {self.condition}"

    def scores(self, arm: str, metric: str) -> dict[int, float]:
        """Map seeds to scores, over the runs of hf_sam with a finite score."""
        return {
            run.seed: run.metrics[metric]
            for run in self.runs.get(arm, [])
            if run.status == "finished" and run.seed is not None and run.metrics.get(metric) is not None
        }

    def values(self, arm: str, name: str) -> list[float]:
        """Return a metric, a sharpness measure or a cost of all runs of an arm that have it."""
        found = (value_of(run, name) for run in self.runs.get(arm, []))
        return [value for value in found if value is not None]


@dataclass(frozen=True)
class Comparison:
    """
    One arm against the control in one cell.

    Args:
        cell (`Cell`): Task, condition and budget.
        arm, control, metric (`str`): The arm, what it is compared with, and the metric.
        paired (`PairedComparison`): The differences.
        margin (`float`, *optional*): The margin of equivalence, in the metric's own unit (accuracy between 0 and 1).
        p_holm (`float`, *optional*): The t-test's p-value adjusted over the cells of the same arm and budget.
        p_equivalent (`float`, *optional*): The p-value of the two one-sided tests against the margin, adjusted the same way.
        family (`int`, *optional*, defaults to 1): The number of those cells.
    """

    cell: Cell
    arm: str
    control: str
    metric: str
    paired: PairedComparison
    margin: float | None = None
    p_holm: float | None = None
    p_equivalent: float | None = None
    family: int = 1

    @property
    def is_equivalent(self) -> bool:
        """Whether the difference is shown to be within the margin."""
        return self.p_equivalent is not None and self.p_equivalent <= LEVEL

    @property
    def verdict(self) -> str:
        """
        `"better"` or `"worse"` if the paired t-test is significant at 5 % after Holm's adjustment; `"equivalent"` if two
        one-sided tests, adjusted the same way, show that the difference is within the margin; `"leans better"` or `"leans
        worse"` if the t-test is significant only before the adjustment; else `"undecided"`, or `"one seed"`.
        """
        if self.paired.t_p is None:
            return "one seed"
        word = "better" if (self.paired.difference.value > 0) == metric_of(self.metric).higher_is_better else "worse"
        if self.p_holm is not None and self.p_holm <= LEVEL:
            return word
        if self.is_equivalent:
            return "equivalent"
        return f"leans {word}" if self.paired.t_p <= LEVEL else "undecided"


@dataclass(frozen=True)
class Overall:
    """One arm against the control across all tasks of one budget, as gains: higher is better for every metric."""

    arm: str
    control: str
    budget: str
    tasks: int
    gain: Estimate
    probability: Estimate


def value_of(run: RunRecord, name: str) -> float | None:
    """Return a metric, its train-test gap (`gap.<name>`), a sharpness measure (`sharpness.<name>`) or a cost."""
    if name.startswith("sharpness."):
        return run.sharpness.get(name.removeprefix("sharpness."))
    if name.startswith("gap."):
        name = name.removeprefix("gap.")
        train, test = run.metrics.get(f"train_{name}"), run.metrics.get(name)
        return train - test if train is not None and test is not None else None
    if name in ("passes", "seconds", "samples_per_second") and not run.has_whole_costs:
        return None
    if name in ("steps", "passes", "seconds", "samples_per_second", "peak_memory"):
        return getattr(run, name)
    return run.metrics.get(name)


def noise_level(condition: str) -> float | None:
    """Parse the share of wrong training labels from a condition's name: `"noise 0.4"` is 0.4, `"clean"` is 0."""
    if condition == "clean":
        return 0.0
    match = re.fullmatch(r"noise (\d*\.?\d+)", condition)
    return float(match[1]) if match else None


def natural(text: str) -> list:
    """Return a sort key that compares numbers in names by value (`noise 0.10` before `noise 0.4`); `clean` is first."""
    parts = re.split(r"(\d+(?:\.\d+)?)", text)
    return [
        text != "clean",
        *((0, float(part), "") if index % 2 else (1, 0.0, part) for index, part in enumerate(parts)),
    ]


def is_trial(run: RunRecord) -> bool:
    """Whether the run is a tuning trial: its budget then reads `tuning steps`, `tuning steps+passes`, ..."""
    return run.budget.startswith(TUNING)


def count_trials(records: Iterable[RunRecord]) -> dict[str, set[int]]:
    """Return, for each arm, the distinct numbers of finished trials per task, condition and budget."""
    found: dict[str, dict[tuple, int]] = defaultdict(lambda: defaultdict(int))
    for run in records:
        if is_trial(run) and run.status == "finished":
            for budget in run.budget.removeprefix(TUNING).strip().split("+"):
                found[run.arm][run.task, run.condition, budget] += 1
    return {arm: set(counts.values()) for arm, counts in found.items()}


def in_budget(run: RunRecord, budget: str) -> bool:
    """Whether a run counts under `budget`; one that costs the same under both says `steps+passes`."""
    return budget in run.budget.split("+")


def arm_order(records: Iterable[RunRecord], first: Sequence[str] = ()) -> list[str]:
    """Return all arms: those in `first` in that order, then the others in order of appearance."""
    found = dict.fromkeys(run.arm for run in records)
    return [arm for arm in dict.fromkeys([*first, *found]) if arm in found]


def uses_sam(run: RunRecord) -> bool:
    """Whether the record states a sharpness-aware method with rho above 0."""
    return bool((run.config.get("sam") or {}).get("rho"))


def make_cells(records: Iterable[RunRecord]) -> list[Cell]:
    """Group finished and external runs by task, condition and budget."""
    groups: dict[tuple[str, str, str], dict[str, list[RunRecord]]] = defaultdict(lambda: defaultdict(list))
    for run in records:
        if run.status in ("finished", "external") and not is_trial(run):
            for budget in run.budget.split("+"):
                groups[run.task, run.condition, budget][run.arm].append(run)
    keys = sorted(
        groups,
        key=lambda key: (natural(key[0]), natural(key[1]), list(BUDGETS).index(key[2]) if key[2] in BUDGETS else 9),
    )
    return [Cell(*key, dict(groups[key])) for key in keys]


def guess_question(
    records: Sequence[RunRecord],
    control: str | None,
    treatment: str | None,
    metric: str | None,
    margin: float | None = None,
) -> Question:
    """
    Complete a question from the records: AdamW or the first arm as control, `sam` or the next arm as treatment, the
    first of `METRICS` that most runs have, and a margin of `POINTS_THAT_MATTER` if the metric is in percent.

    Raises:
        ValueError: If no record has the named arm or metric.
    """
    done = [run for run in records if run.status in ("finished", "external") and not is_trial(run)]
    arms = arm_order(done)
    for name, arm in (("control", control), ("treatment", treatment)):
        if arm is not None and arms and arm not in arms:
            raise ValueError(f"{name}={arm!r} is not an arm of these records, which have: {', '.join(arms)}.")
    without_sam = [run.arm for run in done if run.status == "finished" and not uses_sam(run)]
    control = control or next(
        (arm for arm in arms if arm.lower() == "adamw"), next(iter([*without_sam, *arms]), "adamw")
    )
    others = [arm for arm in arms if arm != control]
    treatment = treatment or next((arm for arm in others if arm.lower() == "sam"), next(iter(others), control))
    counts: dict[str, int] = defaultdict(int)
    for run in done:
        for name, value in run.metrics.items():
            counts[name] += value is not None
    if metric is not None and counts and metric not in counts:
        raise ValueError(f"metric={metric!r} is not in any record. Allowed: {', '.join(counts)}.")
    most = max(counts.values(), default=0)
    known = [name for name in [*METRICS, *counts] if counts.get(name) == most > 0]
    metric = metric or next(iter(known), "accuracy")
    if margin is None and metric_of(metric).scale == 100:
        margin = POINTS_THAT_MATTER
    return Question(control, treatment, metric, margin)


def compare_arms(
    cells: Sequence[Cell],
    control: str,
    metric: str,
    arms: Sequence[str],
    rng: np.random.Generator,
    margin: float | None = None,
) -> list[Comparison]:
    """Compare every arm with the control in every cell, Holm-adjusted over the cells of the same arm and budget."""
    found = []
    margin = None if margin is None else margin / metric_of(metric).scale
    for cell in cells:
        scores = cell.scores(control, metric)
        for arm in arms:
            paired = compare_paired(cell.scores(arm, metric), scores, rng) if arm != control else None
            if paired is not None:
                found.append(Comparison(cell, arm, control, metric, paired, margin))
    families: dict[tuple[str, str], list[int]] = defaultdict(list)
    for index, comparison in enumerate(found):
        families[comparison.arm, comparison.cell.budget].append(index)
    for members in families.values():
        pairs = [found[index].paired for index in members]
        equivalent = [
            None
            if margin is None or paired.spread is None
            else equivalence_p(paired.difference.value, paired.spread, len(paired.seeds), margin)
            for paired in pairs
        ]
        adjusted = zip(holm([paired.t_p for paired in pairs]), holm(equivalent), strict=True)
        for index, (p_holm, p_equivalent) in zip(members, adjusted, strict=True):
            found[index] = replace(found[index], p_holm=p_holm, p_equivalent=p_equivalent, family=len(members))
    return found


def compare_overall(comparisons: Sequence[Comparison], rng: np.random.Generator) -> list[Overall]:
    """Compute interquartile mean gain and probability of improvement per arm and budget, over two or more cells."""
    groups: dict[tuple[str, str], list[Comparison]] = defaultdict(list)
    for comparison in comparisons:
        groups[comparison.arm, comparison.cell.budget].append(comparison)
    overall = []
    for (arm, budget), members in groups.items():
        if len(members) < 2:
            continue
        sign = 1 if metric_of(members[0].metric).higher_is_better else -1
        gains, pairs = [], []
        for entry in members:
            treated, control = entry.cell.scores(arm, entry.metric), entry.cell.scores(entry.control, entry.metric)
            gains.append(sign * np.array(entry.paired.differences))
            pairs.append(tuple([sign * scores[seed] for seed in entry.paired.seeds] for scores in (treated, control)))
        gain, probability = interquartile_mean(gains, rng), probability_of_improvement(pairs, rng)
        overall.append(Overall(arm, members[0].control, budget, len(members), gain, probability))
    return overall


def pairing_problems(records: Iterable[RunRecord]) -> list[str]:
    """Return a message for each task, condition and seed whose runs did not start from the same model and data."""
    groups: dict[tuple, list[RunRecord]] = defaultdict(list)
    for run in records:
        if run.status == "finished" and not is_trial(run):
            groups[run.task, run.condition, run.seed].append(run)
    problems = []
    for (task, condition, seed), runs in groups.items():
        for what, prints in (
            ("initial weights", {run.arm: run.model.get("fingerprint") for run in runs}),
            ("training data", {run.arm: (run.data.get("train") or {}).get("fingerprint") for run in runs}),
            ("test data", {run.arm: (run.data.get("test") or {}).get("fingerprint") for run in runs}),
        ):
            if len({value for value in prints.values() if value is not None}) > 1:
                problems.append(f"{task}, {condition}, seed {seed}: the arms did not have the same {what}.")
    return problems


def runs_table(records: Iterable[RunRecord], folder: Path) -> pd.DataFrame:
    """Tabulate the records, with a column per metric, cost and sharpness measure; paths are relative to `folder`."""
    return pd.DataFrame(
        {
            "task": run.task,
            "condition": run.condition,
            "budget": run.budget,
            "arm": run.arm,
            "seed": run.seed,
            "status": run.status,
            **run.metrics,
            **{f"sharpness.{name}": value for name, value in run.sharpness.items()},
            "steps": run.steps,
            "passes": run.passes,
            "seconds": run.seconds,
            "samples_per_second": run.samples_per_second,
            "peak_memory": run.peak_memory,
            "error": run.error and f"{run.error.get('type')}: {run.error.get('message')}",
            "record": run.path and os.path.relpath(run.path, folder),
        }
        for run in records
    )


def comparisons_table(comparisons: Iterable[Comparison]) -> pd.DataFrame:
    """Tabulate the comparisons in the metric's own unit (accuracy between 0 and 1)."""
    return pd.DataFrame(
        {
            "task": entry.cell.task,
            "condition": entry.cell.condition,
            "budget": entry.cell.budget,
            "arm": entry.arm,
            "control": entry.control,
            "metric": entry.metric,
            "seeds": len(entry.paired.seeds),
            "difference": entry.paired.difference.value,
            "bootstrap_low": entry.paired.difference.low,
            "bootstrap_high": entry.paired.difference.high,
            "student_low": entry.paired.t_low,
            "student_high": entry.paired.t_high,
            "t_p": entry.paired.t_p,
            "spread": entry.paired.spread,
            "margin": entry.margin,
            "p_equivalent": entry.p_equivalent,
            "within": entry.paired.within,
            "detectable": entry.paired.detectable,
            "sign_flip_p": entry.paired.p_value,
            "p_floor": entry.paired.p_floor,
            "p_holm": entry.p_holm,
            "family": entry.family,
            "verdict": entry.verdict,
        }
        for entry in comparisons
    )


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and sample standard deviation (NaN for fewer than two values)."""
    if not values:
        return math.nan, math.nan
    if len(values) < 2:
        return float(np.mean(values)), math.nan
    spread = (
        float(np.std(values, ddof=1)) if min(values) < max(values) else 0.0
    )  # equal values may leave a rounding error
    return float(np.mean(values)), spread
