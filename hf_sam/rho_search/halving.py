"""Successive halving over rho within a budget of gradient passes, and the rule by which a rho is recommended.

optuna's `SuccessiveHalvingPruner` and `HyperbandPruner` do not fit: they halve asynchronously, so that how many trials
reach a rung, and with it the cost, depends on their order; a pruned trial cannot be taken up again; and `rho = 0`, the
control that every other value is compared with, would be pruned like any other. Synchronous halving (Jamieson &
Talwalkar 2016, arXiv 1502.07943) with the control kept is a few lines, and its cost is known beforehand, to the pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.05  # chance to recommend a rho where none helps, over all that were tried
MAX_SEEDS = 10

# Gradient passes of a run with rho > 0: (steps of its schedule, first step, step before which it stops) -> passes.
PassCount = Callable[[int, int, int], float]


@dataclass(frozen=True)
class Rung:
    """
    One round of the search.

    Args:
        step (`int`): Up to which every run goes before they are compared.
        rhos (`int`): How many values above 0 take part, beside 0 itself.
    """

    step: int
    rhos: int


@dataclass(frozen=True)
class SearchPlan:
    """
    What a search will run.

    Args:
        length (`int`): Optimizer steps of an ordinary run.
        rungs (`tuple[Rung, ...]`): Of the search, all with one seed.
        horizon (`int`): Steps of the confirmation: the best value and 0, once with each of `seeds` new seeds.
        seeds (`int`): How many those are.
        schedule (`int`): Steps over which the learning rate is scheduled: `length`, or `horizon` if annealed.
        passes (`float`): Gradient passes of all of it; at most the budget.
    """

    length: int
    rungs: tuple[Rung, ...]
    horizon: int
    seeds: int
    schedule: int
    passes: float


def geometric_grid(low: float, high: float, points: int) -> list[float]:
    """`points` values from `low` to `high` with a constant ratio, rounded to two digits."""
    return sorted({float(f"{rho:.2g}") for rho in np.geomspace(low, high, points)})


def halving(rhos: int, horizon: int, reduction: int) -> tuple[Rung, ...]:
    """
    Rungs that leave one of `rhos` values, each `reduction` times as long as the one before, `horizon` the next of them.
    """
    counts = []
    while rhos > 1:
        counts.append(rhos)
        rhos = math.ceil(rhos / reduction)
    return tuple(Rung(horizon // reduction ** (len(counts) - i), count) for i, count in enumerate(counts))


def search_passes(rungs: Sequence[Rung], schedule: int, passes: PassCount) -> float:
    """Gradient passes of the rungs; a run that is promoted goes on from where it stopped."""
    total, begin = 0.0, 0
    for rung in rungs:
        total += rung.rhos * passes(schedule, begin, rung.step) + (rung.step - begin)
        begin = rung.step
    return total


def make_plan(
    length: int, rhos: int, budget: float, passes: PassCount, *, seeds: int, reduction: int, annealed: bool = False
) -> SearchPlan:
    """
    The longest search that the budget pays for; what is left at the full length buys more seeds.

    Args:
        length (`int`): Optimizer steps of an ordinary run.
        rhos (`int`): Values above 0.
        budget (`float`): In ordinary runs without SAM: `budget * length` gradient passes.
        passes (`PassCount`): What a run with rho > 0 costs.
        seeds (`int`): Of the confirmation, at least.
        reduction (`int`): One in so many values is promoted.
        annealed (`bool`, *optional*, defaults to `False`):
            Schedule the learning rate over the horizon instead of over the ordinary run.

    Raises:
        ValueError: The budget does not pay for the shortest search, one step in the first rung.
    """

    def plan(horizon: int, seeds: int) -> SearchPlan:
        rungs, schedule = halving(rhos, horizon, reduction), horizon if annealed else length
        pair = passes(schedule, 0, horizon) + horizon
        total = search_passes(rungs, schedule, passes) + seeds * pair
        return SearchPlan(length, rungs, horizon, seeds, schedule, total)

    allowed = budget * length
    shortest = reduction ** len(halving(rhos, 1, reduction))
    if shortest > length:
        raise ValueError(f"A run of {length} steps is too short to be halved {shortest}-fold; give fewer rhos.")
    least = plan(shortest, seeds).passes
    if least > allowed:
        raise ValueError(
            f"budget={budget:g} ordinary runs of {length} steps are {allowed:g} gradient passes, and the shortest search "
            f"takes {least:g}: give a budget of at least {math.ceil(100 * least / length) / 100:g}, fewer points or "
            "fewer seeds."
        )
    low, high = shortest, length  # `low` is paid for
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if plan(middle, seeds).passes <= allowed else (low, middle - 1)
    while low == length and seeds < MAX_SEEDS and plan(length, seeds + 1).passes <= allowed:
        seeds += 1
    return plan(low, seeds)


def survivors(gains: Mapping[float, float | None], keep: int) -> list[float]:
    """
    The values that go on, the best first.

    Args:
        gains (`Mapping[float, float | None]`): Value to score, more is better; `None` where the run failed or diverged.
        keep (`int`): How many; of equal ones the smaller.
    """
    scored = {rho: gain for rho, gain in gains.items() if gain is not None and math.isfinite(gain)}
    return sorted(scored, key=lambda rho: (-scored[rho], rho))[:keep]


# --- the rule ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExampleScores:
    """
    A metric that is a mean over examples, example by example: `totals.sum() / weights.sum()`.

    Args:
        totals (`np.ndarray` of shape `(n,)`): What each example adds.
        weights (`np.ndarray` of shape `(n,)`): What each counts: 1, or its tokens.
    """

    totals: np.ndarray
    weights: np.ndarray

    @property
    def value(self) -> float:
        """The metric."""
        return float(self.totals.sum() / self.weights.sum())

    def influence(self) -> np.ndarray:
        """
        `n` times what each example moves the metric by, `(n,)`. Its variance over `n` is the variance of the metric
        over resampled examples, which for a mean the bootstrap needs no draws to find.
        """
        return (self.totals - self.value * self.weights) / self.weights.mean()


@dataclass(frozen=True)
class Gain:
    """
    How much better a rho is than 0, on the same examples with the same seeds.

    Args:
        value (`float`): Mean over seeds; above 0 is better, whatever the metric.
        low, high (`float`): Interval that covers the truth with `confidence`.
        confidence (`float`): Two-sided.
        seeds (`int`): Pairs behind it. From one the interval knows nothing of other seeds.
    """

    value: float
    low: float
    high: float
    confidence: float
    seeds: int


def paired_gain(
    treated: Sequence[ExampleScores], control: Sequence[ExampleScores], higher_is_better: bool, rhos: int
) -> Gain:
    """
    The gain over `rho = 0` with an interval over seeds and over validation examples.

    Both are resampled: the standard error is `sqrt(s^2 + e^2)`, `s` that of the mean over seeds, `e` that over the
    examples of the seeds' mean. What differs by chance between an example under one seed and under another is counted
    in both, which errs on the safe side. Student's quantile has the degrees of freedom of Welch (1947) and
    Satterthwaite (1946); few seeds make it large. The level is divided by the number of values tried (Bonferroni),
    since the one that is looked at was chosen on the same validation examples.

    Args:
        treated, control (`Sequence[ExampleScores]`): One per seed, in the same order, on the same examples.
        higher_is_better (`bool`): Of the metric.
        rhos (`int`): How many values above 0 were tried.
    """
    sign = 1 if higher_is_better else -1
    gains = np.array([sign * (a.value - b.value) for a, b in zip(treated, control, strict=True)])
    moved = np.mean([sign * (a.influence() - b.influence()) for a, b in zip(treated, control, strict=True)], axis=0)
    seeds, examples = len(gains), len(moved)
    parts = [(moved.var(ddof=1) / examples, examples - 1)] if examples > 1 else []
    if seeds > 1:
        parts.append((gains.var(ddof=1) / seeds, seeds - 1))
    variance = sum(part for part, _ in parts)
    confidence = 1 - 2 * LEVEL / max(rhos, 1)
    half = 0.0
    if variance > 0:
        freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts)
        half = float(stats.t.ppf((1 + confidence) / 2, freedom) * math.sqrt(variance))
    mean = float(gains.mean())
    return Gain(mean, mean - half, mean + half, confidence, seeds)


def recommended(rho: float | None, gain: Gain | None) -> float:
    """`rho` where its gain over 0 is more than noise, over two seeds or more; 0 else, ties included."""
    is_sure = rho is not None and gain is not None and gain.seeds > 1 and gain.low > 0
    return rho if is_sure else 0.0
