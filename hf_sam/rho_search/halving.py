"""Successive halving over rho within a budget of gradient passes, and the rule that recommends a rho.

optuna's `SuccessiveHalvingPruner` and `HyperbandPruner` do not fit:

- They halve asynchronously, so the number of trials that reach a rung, and thus the cost, depends on their order.
- A pruned trial cannot be resumed.
- They would prune `rho = 0`, the control that every other value is compared with.

Synchronous halving (Jamieson & Talwalkar 2016, arXiv 1502.07943) that keeps the control takes a few lines, and its cost
is known exactly beforehand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.05  # probability of recommending a rho if none helps, over all values tried
MAX_SEEDS = 10

# Gradient passes of a run with rho > 0: (steps of its schedule, first step, step before which it stops) -> passes.
PassCount = Callable[[int, int, int], float]


@dataclass(frozen=True)
class Rung:
    """
    One round of the search.

    Args:
        step (`int`): Optimizer step at which the runs are compared.
        rhos (`int`): Number of values above 0 in this round; 0 is always included.
    """

    step: int
    rhos: int


@dataclass(frozen=True)
class SearchPlan:
    """
    The runs of a search: its rungs, then a confirmation of the best value.

    Args:
        length (`int`): Optimizer steps of an ordinary run.
        rungs (`tuple[Rung, ...]`): The rungs of the search, all with the same seed.
        horizon (`int`): Steps of the confirmation, which runs the best value and 0 with each of `seeds` new seeds.
        seeds (`int`): Number of seeds of the confirmation.
        schedule (`int`): Steps of the learning rate schedule: `length`, or `horizon` if annealed.
        passes (`float`): Total gradient passes, at most the budget.
        probe (`int`): Steps of the probe that the values come from; 0 if they were given.
    """

    length: int
    rungs: tuple[Rung, ...]
    horizon: int
    seeds: int
    schedule: int
    passes: float
    probe: int = 0


def geometric_grid(low: float, high: float, points: int) -> list[float]:
    """`points` values from `low` to `high` with a constant ratio, rounded to two digits."""
    return sorted({float(f"{rho:.2g}") for rho in np.geomspace(low, high, points)})


def halving(rhos: int, horizon: int, reduction: int) -> tuple[Rung, ...]:
    """
    Rungs that reduce `rhos` values to one. Each rung is `reduction` times as long as the one before, and `horizon`
    `reduction` times as long as the last.
    """
    counts = []
    while rhos > 1:
        counts.append(rhos)
        rhos = math.ceil(rhos / reduction)
    return tuple(Rung(horizon // reduction ** (len(counts) - i), count) for i, count in enumerate(counts))


def search_passes(rungs: Sequence[Rung], schedule: int, passes: PassCount) -> float:
    """Total gradient passes of the rungs; promoted runs resume from where they stopped."""
    total, begin = 0.0, 0
    for rung in rungs:
        total += rung.rhos * passes(schedule, begin, rung.step) + (rung.step - begin)
        begin = rung.step
    return total


def make_plan(
    length: int,
    rhos: int,
    budget: float,
    passes: PassCount,
    *,
    seeds: int,
    reduction: int,
    annealed: bool = False,
    probe: int = 0,
) -> SearchPlan:
    """
    The longest search within the budget. At full length, what is left of the budget goes into more seeds.

    Args:
        length (`int`): Optimizer steps of an ordinary run.
        rhos (`int`): Number of values above 0.
        budget (`float`): Budget in ordinary runs without SAM, that is, `budget * length` gradient passes.
        passes (`PassCount`): The cost of a run with rho > 0.
        seeds (`int`): Minimum number of seeds of the confirmation.
        reduction (`int`): One in `reduction` values is promoted.
        annealed (`bool`, *optional*, defaults to `False`):
            Schedule the learning rate over the horizon instead of over the ordinary run.
        probe (`int`, *optional*, defaults to 0): Steps of a probe with rho > 0 before the search.

    Raises:
        ValueError: The budget is too small for the shortest search, with one step in the first rung.
    """

    def plan(horizon: int, seeds: int) -> SearchPlan:
        rungs, schedule = halving(rhos, horizon, reduction), horizon if annealed else length
        pair = passes(schedule, 0, horizon) + horizon
        total = passes(length, 0, probe) + search_passes(rungs, schedule, passes) + seeds * pair
        return SearchPlan(length, rungs, horizon, seeds, schedule, total, probe)

    allowed = budget * length
    shortest = reduction ** len(halving(rhos, 1, reduction))
    if shortest > length:
        raise ValueError(
            f"A run of {length} steps is too short for a search that needs at least {shortest}. Give fewer rhos."
        )
    least = plan(shortest, seeds).passes
    if least > allowed:
        raise ValueError(
            f"budget={budget:g} is too small: {allowed:g} gradient passes, while the shortest search takes {least:g}. Give a "
            f"budget of at least {math.ceil(100 * least / length) / 100:g}, fewer points or fewer seeds."
        )
    low, high = shortest, length  # `low` is within the budget
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if plan(middle, seeds).passes <= allowed else (low, middle - 1)
    while low == length and seeds < MAX_SEEDS and plan(length, seeds + 1).passes <= allowed:
        seeds += 1
    return plan(low, seeds)


def first_pairs(seeds: int) -> int:
    """
    The number of pairs after which a confirmation of `seeds` pairs ends if they show no gain: the first third of them.

    Significance takes gains that agree over seeds, so the other pairs could hardly bring the value back; and ending early
    for an answer of 0 cannot raise the rate of wrong recommendations.
    """
    return max(1, seeds // 3)


def survivors(gains: Mapping[float, float | None], keep: int) -> list[float]:
    """
    The values that are promoted, best first.

    Args:
        gains (`Mapping[float, float | None]`): Gain of each value, higher is better; `None` if its run failed or
            diverged.
        keep (`int`): Number of values to keep; on ties the smaller value is kept.
    """
    scored = {rho: gain for rho, gain in gains.items() if gain is not None and math.isfinite(gain)}
    return sorted(scored, key=lambda rho: (-scored[rho], rho))[:keep]


# --- the rule ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExampleScores:
    """
    The per-example parts of a metric that is a mean over examples: `totals.sum() / weights.sum()`.

    Args:
        totals (`np.ndarray` of shape `(n,)`): Contribution of each example.
        weights (`np.ndarray` of shape `(n,)`): Weight of each example: 1, or its number of tokens.
    """

    totals: np.ndarray
    weights: np.ndarray

    @property
    def value(self) -> float:
        """The metric."""
        return float(self.totals.sum() / self.weights.sum())

    def influence(self) -> np.ndarray:
        """
        `n` times the influence of each example on the metric, `(n,)`.

        Its variance divided by `n` is the variance of the metric over resampled examples: for a mean, the bootstrap has
        this closed form.
        """
        return (self.totals - self.value * self.weights) / self.weights.mean()


@dataclass(frozen=True)
class Gain:
    """
    The gain of a rho over 0, on the same examples and with the same seeds.

    Args:
        value (`float`): Mean over seeds; positive is better, whatever the metric.
        low, high (`float`): Confidence interval.
        confidence (`float`): Two-sided confidence level.
        seeds (`int`): Number of pairs. With one, the interval does not include the variation between seeds.
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
    The gain over `rho = 0`, with an interval over seeds and validation examples.

    - The standard error is `sqrt(s^2 + e^2)`, with `s` that of the mean over seeds, and `e` that over examples of the
      mean over seeds. The interaction of example and seed is counted in both, which errs on the safe side.
    - The quantile is Student's, with the degrees of freedom of Welch (1947) and Satterthwaite (1946); few seeds make it
      large.
    - The level is divided by the number of values tried (Bonferroni), since the value was selected on the same
      validation examples.

    Args:
        treated, control (`Sequence[ExampleScores]`): One per seed, in the same order, on the same examples.
        higher_is_better (`bool`): Direction of the metric.
        rhos (`int`): Number of values above 0 that were tried.
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
    """`rho` if its gain over 0 is significant with at least two seeds, else 0."""
    is_sure = rho is not None and gain is not None and gain.seeds > 1 and gain.low > 0
    return rho if is_sure else 0.0
