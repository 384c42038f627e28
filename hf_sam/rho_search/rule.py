"""The rule that recommends a rho: its gain over 0, with an interval over seeds and validation examples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from .scores import ExampleScores

LEVEL = 0.05  # probability of recommending a rho if none helps, over all values tried
HOPELESS = 0.5  # of what significance takes


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


def is_settled(
    treated: Sequence[ExampleScores], control: Sequence[ExampleScores], higher_is_better: bool, rhos: int, seeds: int
) -> bool:
    """
    Whether a confirmation of `seeds` pairs may end after the given ones.

    - Yes, if the gain is significant at half the level; half, because there are further looks at it.
    - Yes, if it is hopeless: were all other pairs as good as the best one so far, the gain would not reach half of what
      significance takes. Ending for an answer of 0 cannot raise the rate of wrong recommendations.
    """
    now = paired_gain(treated, control, higher_is_better, 2 * rhos)
    if now.seeds > 1 and now.low > 0:
        return True
    sign = 1 if higher_is_better else -1
    pairs = list(zip(treated, control, strict=True))
    best = max(pairs, key=lambda pair: sign * (pair[0].value - pair[1].value))
    pairs += [best] * (seeds - len(pairs))
    hoped = paired_gain([a for a, _ in pairs], [b for _, b in pairs], higher_is_better, rhos)
    return not hoped.value > HOPELESS * (hoped.value - hoped.low)


def recommended(rho: float | None, gain: Gain | None) -> float:
    """`rho` if its gain over 0 is significant with at least two seeds, else 0."""
    is_sure = rho is not None and gain is not None and gain.seeds > 1 and gain.low > 0
    return rho if is_sure else 0.0
