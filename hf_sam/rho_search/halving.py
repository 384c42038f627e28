"""Successive halving over rho within a budget of gradient passes.

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


def looks(seeds: int) -> list[int]:
    """The numbers of pairs after which a confirmation of `seeds` pairs may end: a third of them, and two thirds."""
    third = max(1, seeds // 3)
    return [pairs for pairs in (third, 2 * third) if pairs < seeds]


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
