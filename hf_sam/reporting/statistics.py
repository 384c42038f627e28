"""Paired statistics over seeds, tasks and test examples. scipy does the resampling; the caller provides the generator.

A difference is `treatment - control` between two runs with the same seed, and therefore the same initial head, data
order, label noise and splits. One seed gives no intervals and no p-values: they are `None`.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import optimize, stats

CONFIDENCE = 0.95
RESAMPLES = 9_999
MAX_EXACT_SEEDS = 14  # 2^14 sign patterns are enumerated; with more seeds, that many are drawn


@dataclass(frozen=True)
class Estimate:
    """
    A value with its bootstrap interval.

    Args:
        value (`float`): The statistic of the data itself.
        low, high (`float` or `None`): Ends of the interval; `None` if there is only one observation.
        n (`int`): Number of observations (seeds, examples).
    """

    value: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class PairedComparison:
    """
    Treatment against control over their common seeds.

    Args:
        difference (`Estimate`): Mean of the paired differences, percentile bootstrap over seeds.
        t_low, t_high (`float` or `None`): Student's interval of the same mean, which is wider for few seeds.
        t_p (`float` or `None`): Two-sided p-value of the paired t-test, which decides verdicts.
        spread (`float` or `None`): Standard deviation of the differences, at least one step of the metric.
        detectable (`float` or `None`): The difference that the t-test detects four times in five, at this spread.
        p_value (`float` or `None`): Two-sided p-value of the exact sign-flip test.
        p_floor (`float` or `None`): The smallest sign-flip p-value for this number of seeds, `2 / 2^n`.
        differences (`tuple[float, ...]`): One per seed, in the order of `seeds`.
        seeds (`tuple[int, ...]`): The seeds that both arms finished.
    """

    difference: Estimate
    t_low: float | None
    t_high: float | None
    t_p: float | None
    spread: float | None
    detectable: float | None
    p_value: float | None
    p_floor: float | None
    differences: tuple[float, ...]
    seeds: tuple[int, ...]

    @property
    def equivalence_interval(self) -> tuple[float | None, float | None]:
        """Student's interval at 90 %: two one-sided tests at 5 % show equivalence for any margin that contains it."""
        if self.spread is None:
            return None, None
        half = self.spread / math.sqrt(len(self.seeds)) * stats.t.ppf(CONFIDENCE, len(self.seeds) - 1)
        return float(self.difference.value - half), float(self.difference.value + half)

    @property
    def within(self) -> float | None:
        """The smallest margin for which two one-sided tests at 5 % show equivalence."""
        return None if self.spread is None else max(map(abs, self.equivalence_interval))


def compare_paired(
    treatment: Mapping[int, float], control: Mapping[int, float], rng: np.random.Generator
) -> PairedComparison | None:
    """
    Compare two arms over their common seeds.

    Args:
        treatment, control (`Mapping[int, float]`): From seed to score.
        rng (`numpy.random.Generator`): The generator of the bootstrap.

    Returns:
        `PairedComparison`, or `None` if there are no common seeds.
    """
    seeds = tuple(sorted(treatment.keys() & control.keys()))
    if not seeds:
        return None
    differences = np.array([treatment[seed] - control[seed] for seed in seeds])
    several = len(seeds) > 1
    least = resolution([*treatment.values(), *control.values()])
    t_low, t_high = student_interval(differences, least) if several else (None, None)
    return PairedComparison(
        difference=bootstrap_mean(differences, rng),
        t_low=t_low,
        t_high=t_high,
        t_p=paired_t_p(differences, least) if several else None,
        spread=_spread(differences, least) if several else None,
        detectable=_spread(differences, least) * detectable_effect(len(seeds)) if several else None,
        p_value=sign_flip_p(differences, rng) if several else None,
        p_floor=2.0 ** (1 - len(seeds)) if several else None,
        differences=tuple(differences.tolist()),
        seeds=seeds,
    )


def bootstrap_mean(values: Sequence[float], rng: np.random.Generator) -> Estimate:
    """Compute the mean of `values` with its percentile bootstrap interval; one value gives no interval."""
    return _stratified([np.asarray(values, dtype=float)], lambda sample: sample.mean(-1), rng)


def resolution(scores: Sequence[float]) -> float:
    """
    Compute the step size of scores: the smallest gap between two different scores, 0 if all are equal.

    Accuracies on a small test split are multiples of one example. Differences over few seeds are then often equal, and
    a spread of zero would make any of them significant, so the spread is taken to be at least one step.
    """
    gaps = np.diff(np.unique(np.asarray(scores, dtype=float)))
    gaps = gaps[gaps > 1e-12]
    return float(gaps.min()) if len(gaps) else 0.0


def student_interval(values: Sequence[float], least_spread: float = 0.0) -> tuple[float, float]:
    """Compute Student's interval of the mean of two or more values, with a spread of at least `least_spread`."""
    values = np.asarray(values, dtype=float)
    error = _spread(values, least_spread) / math.sqrt(len(values))
    half = error * stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)
    return float(values.mean() - half), float(values.mean() + half)


def paired_t_p(differences: Sequence[float], least_spread: float = 0.0) -> float:
    """
    Compute the two-sided p-value of the paired t-test.

    Under the null hypothesis, the two scores of a pair are exchangeable, so differences are symmetric around zero for
    any distribution of scores. The t-test then keeps its level: in simulation it errs in at most 5.2 % of cases for
    2 to 10 seeds of normal, skewed, heavy-tailed, bimodal and coarse scores (`tests/reporting/test_statistics.py`). An
    exact sign-flip test cannot go below 2 / 2^n: with five seeds it never reaches 5 %.
    """
    differences = np.asarray(differences, dtype=float)
    error = _spread(differences, least_spread) / math.sqrt(len(differences))
    if error == 0:
        return 1.0 if differences.mean() == 0 else 0.0
    return float(2 * stats.t.sf(abs(differences.mean()) / error, len(differences) - 1))


def equivalence_p(mean: float, spread: float, n: int, margin: float) -> float:
    """
    Compute the p-value of two one-sided t-tests (Schuirmann 1987) against a true mean difference of `margin` or more in either
    direction.

    A small value is evidence that there is no difference of that size. A large p-value of the test for a difference is
    not: it may come from too few or too variable pairs.

    Args:
        mean, spread (`float`): Mean and sample standard deviation of the paired differences.
        n (`int`): Number of pairs, at least two.
        margin (`float`): The margin of equivalence, above 0.
    """
    room, error = margin - abs(mean), spread / math.sqrt(n)
    if error == 0:
        return 0.0 if room > 0 else 1.0
    return float(stats.t.sf(room / error, n - 1))


def established_effect(n: int, level: float = 1 - CONFIDENCE) -> float:
    """Return the mean difference, in standard deviations, that is just significant at `level` with `n` pairs."""
    return float(stats.t.ppf(1 - level / 2, n - 1) / math.sqrt(n))


@lru_cache
def detectable_effect(n: int, level: float = 1 - CONFIDENCE, power: float = 0.8) -> float:
    """Return the true difference, in standard deviations, that the paired t-test of `n` pairs detects with `power`."""
    critical = stats.t.ppf(1 - level / 2, n - 1)
    # scipy's noncentral t gives NaN in the far tails, so average the power over quantiles of the sample spread
    found = np.sqrt(stats.chi2.ppf((np.arange(2000) + 0.5) / 2000, n - 1) / (n - 1))

    def excess(effect: float) -> float:
        shift = effect * math.sqrt(n)
        right, wrong = stats.norm.sf(critical * found - shift), stats.norm.cdf(-critical * found - shift)
        return float(np.mean(right + wrong)) - power

    return float(optimize.brentq(excess, 0.0, 10 * critical))


def seeds_needed(effect: float, spread: float, most: int = 1000) -> int | None:
    """Return the smallest number of pairs that detects a true `effect` four times in five; `None` if above `most`."""
    if spread * detectable_effect(most) > effect:
        return None
    return 2 + bisect.bisect_left(range(2, most + 1), True, key=lambda n: spread * detectable_effect(n) <= effect)


def _spread(values: np.ndarray, least: float) -> float:
    return max(float(np.std(values, ddof=1)), least)


def ratio_of_means(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """
    Compute `mean(numerators) / mean(denominators)` of pairs, with Fieller's interval (Fieller 1954, JRSS B 16).

    The interval contains every `k` for which the paired t-test does not reject `numerators = k * denominators`.

    Args:
        numerators, denominators (`Sequence[float]`): Aligned pairs, at least one.

    Returns:
        `Estimate`: Without ends if the mean of the denominators does not differ significantly from zero: then any ratio
        is possible.
    """
    x, y = np.asarray(numerators, dtype=float), np.asarray(denominators, dtype=float)
    n, ratio = len(x), float(x.mean() / y.mean()) if y.mean() else math.nan
    if n < 2:
        return Estimate(ratio, None, None, n)
    (v_xx, v_xy), (_, v_yy) = np.cov(x, y) / n
    t = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)
    # (mean x - k mean y)^2 <= t^2 var(mean x - k mean y), a quadratic in k
    a = y.mean() ** 2 - t**2 * v_yy
    b = x.mean() * y.mean() - t**2 * v_xy
    c = x.mean() ** 2 - t**2 * v_xx
    if a <= 0:
        return Estimate(ratio, None, None, n)
    half = math.sqrt(max(b * b - a * c, 0.0))
    return Estimate(ratio, float((b - half) / a), float((b + half) / a), n)


def sign_flip_p(differences: Sequence[float], rng: np.random.Generator) -> float:
    """
    Compute the two-sided sign-flip (paired permutation) p-value of a mean difference.

    Under the null hypothesis, the two scores of a pair are exchangeable, so every pattern of signs is equally likely. Up
    to `MAX_EXACT_SEEDS` seeds, all `2^n` are enumerated and the test is exact; above, `2^MAX_EXACT_SEEDS` are drawn.
    """
    differences = np.asarray(differences, dtype=float)
    is_exact = len(differences) <= MAX_EXACT_SEEDS
    if is_exact:
        signs = _every_sign(len(differences))
    else:
        signs = rng.integers(2, size=(2**MAX_EXACT_SEEDS, len(differences))) * 2.0 - 1.0
    sums, rounding = np.abs(signs @ differences), 1e-12 * np.abs(differences).sum()
    as_large = int((sums >= abs(differences.sum()) - rounding).sum())
    return as_large / len(signs) if is_exact else (as_large + 1) / (len(signs) + 1)


@lru_cache
def _every_sign(n: int) -> np.ndarray:
    """Return all patterns of signs of `n` values, one per row: `(2^n, n)`."""
    return ((np.arange(2**n)[:, None] >> np.arange(n)) & 1) * 2.0 - 1.0


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Apply Holm's step-down adjustment, keeping the order; `None` stays `None` and does not count."""
    known = [index for index, p in enumerate(p_values) if p is not None]
    adjusted: list[float | None] = [None] * len(p_values)
    running = 0.0
    for rank, index in enumerate(sorted(known, key=lambda index: p_values[index])):
        running = max(running, min(1.0, (len(known) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


# --- across tasks: resampling seeds within each task (stratified), both arms of a pair together -------------------


def interquartile_mean(differences_by_task: Sequence[Sequence[float]], rng: np.random.Generator) -> Estimate:
    """Compute the mean of the middle half of all paired differences, tasks pooled (Agarwal et al. 2021, 2108.13264)."""
    samples = [np.asarray(differences, dtype=float) for differences in differences_by_task]
    return _stratified(samples, lambda *drawn: stats.trim_mean(np.concatenate(drawn, -1), 0.25, axis=-1), rng)


def probability_of_improvement(
    pairs_by_task: Sequence[tuple[Sequence[float], Sequence[float]]], rng: np.random.Generator
) -> Estimate:
    """
    Compute the probability that a treatment run beats a control run on a random task, ties counting half (Agarwal et
    al. 2021).

    Args:
        pairs_by_task (`Sequence[tuple[Sequence[float], Sequence[float]]]`):
            Scores of treatment and of control for each task, aligned by seed; higher is better.
        rng (`numpy.random.Generator`): The generator of the bootstrap.
    """
    wins = []  # per task, (treatment run, control run)
    for treatment, control in pairs_by_task:
        gap = np.subtract.outer(np.asarray(treatment, dtype=float), np.asarray(control, dtype=float))
        wins.append(np.heaviside(gap, 0.5))

    def probability(*drawn):  # each (..., seeds): the indices drawn of one task
        per_task = []
        for win, index in zip(wins, drawn, strict=True):
            counts = _counts(index, len(win))
            per_task.append(((counts @ win) * counts).sum(-1) / len(win) ** 2)
        return np.mean(per_task, axis=0)

    return _stratified([np.arange(len(win)) for win in wins], probability, rng)


def _counts(index: np.ndarray, n: int) -> np.ndarray:
    """Count each of `0 ... n - 1` along the last axis of `index`, which has length `n`; same shape as `index`."""
    rows = index.reshape(-1, n)
    counted = np.bincount((rows + n * np.arange(len(rows))[:, None]).ravel(), minlength=rows.size)
    return counted.reshape(index.shape).astype(float)


def _stratified(samples: Sequence[np.ndarray], statistic: Callable[..., np.ndarray], rng) -> Estimate:
    """Compute `statistic(*samples)` with a bootstrap that resamples each sample separately, along the last axis."""
    value = float(statistic(*samples))
    n = sum(len(sample) for sample in samples)
    if min(len(sample) for sample in samples) < 2:
        return Estimate(value, None, None, n)
    result = stats.bootstrap(
        samples,
        lambda *drawn, axis: statistic(*drawn),
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        vectorized=True,
        rng=rng,
        batch=1000,
    )
    return Estimate(value, float(result.confidence_interval.low), float(result.confidence_interval.high), n)


# --- over test examples -------------------------------------------------------------------------------------------


def bootstrap_examples(
    metric: Callable[[np.ndarray], float], n: int, rng: np.random.Generator, resamples: int = 1000
) -> Estimate:
    """
    Compute a metric with its percentile bootstrap interval over test examples.

    Args:
        metric (`Callable[[np.ndarray], float]`): Computes the metric from indices of examples, with repetition.
        n (`int`): Number of examples.
        rng (`numpy.random.Generator`): The generator of the bootstrap.
        resamples (`int`, *optional*, defaults to 1000): Number of resamples.
    """
    value = float(metric(np.arange(n)))
    if n < 2:
        return Estimate(value, None, None, n)
    result = stats.bootstrap(
        (np.arange(n),),
        metric,
        n_resamples=resamples,
        confidence_level=CONFIDENCE,
        method="percentile",
        vectorized=False,
        rng=rng,
    )
    return Estimate(value, float(result.confidence_interval.low), float(result.confidence_interval.high), n)


def mcnemar_p(correct_a: Sequence[bool], correct_b: Sequence[bool]) -> float:
    """Compute the exact McNemar p-value of two classifiers: a binomial test on examples that only one got right."""
    a, b = np.asarray(correct_a, dtype=bool), np.asarray(correct_b, dtype=bool)
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return 1.0 if only_a + only_b == 0 else float(stats.binomtest(only_a, only_a + only_b).pvalue)
