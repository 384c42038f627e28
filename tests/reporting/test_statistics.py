"""Against scipy's own results, numbers worked out by hand, and simulations whose answer is known."""

import itertools

import numpy as np
import pytest
from scipy import stats

from hf_sam.reporting.statistics import (
    bootstrap_examples,
    bootstrap_mean,
    compare_paired,
    detectable_effect,
    equivalence_p,
    established_effect,
    holm,
    interquartile_mean,
    mcnemar_p,
    paired_t_p,
    probability_of_improvement,
    ratio_of_means,
    resolution,
    seeds_needed,
    sign_flip_p,
    student_interval,
)


def generator():
    return np.random.default_rng(0)


def test_bootstrap_interval_is_scipys():
    values = np.random.default_rng(1).normal(size=12)
    expected = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=9_999, rng=generator(), batch=1000)
    estimate = bootstrap_mean(values, generator())
    assert estimate.value == values.mean()
    assert (estimate.low, estimate.high) == pytest.approx(tuple(expected.confidence_interval))


def test_bootstrap_of_three_values_against_all_27_resamples():
    values = [1.0, 2.0, 6.0]
    means = sorted(np.mean(draw) for draw in itertools.product(values, repeat=3))
    estimate = bootstrap_mean(values, generator())
    # 1 of the 27 equally likely resamples is (1, 1, 1) and 1 is (6, 6, 6): 3.7 % each, more than the tails of 2.5 %
    assert (means[0], means[-1]) == (estimate.low, estimate.high) == (1.0, 6.0)


def test_student_interval_is_scipys():
    values = np.random.default_rng(2).normal(size=5)
    assert student_interval(values) == pytest.approx(tuple(stats.ttest_1samp(values, 0).confidence_interval(0.95)))


def test_the_paired_t_test_is_scipys_and_agrees_with_its_interval():
    rng = np.random.default_rng(4)
    treatment, control = rng.normal(0.5, 1, (2, 5))
    expected = stats.ttest_rel(treatment, control)
    paired = compare_paired(dict(enumerate(treatment)), dict(enumerate(control)), generator())
    assert paired.t_p == pytest.approx(expected.pvalue)
    assert (paired.t_low, paired.t_high) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    edge = np.array([-1.0, 0.0, 1.0]) + established_effect(3)  # spread 1
    assert paired_t_p(edge) == pytest.approx(0.05)
    assert student_interval(edge)[0] == pytest.approx(0, abs=1e-12)


SCORES = {
    "normal": lambda rng, n: rng.normal(size=(2, n)),
    "skewed": lambda rng, n: rng.exponential(size=(2, n)),
    "heavy-tailed": lambda rng, n: rng.standard_t(2, size=(2, n)),
    "bimodal": lambda rng, n: rng.normal(size=(2, n)) - 40 * (rng.random((2, n)) < 0.15),  # runs that fail to train
    "coarse": lambda rng, n: rng.binomial(4, 0.5, size=(2, n)) / 40,
    "coin": lambda rng, n: rng.integers(2, size=(2, n)) / 40,
}


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
@pytest.mark.parametrize("kind", SCORES)
def test_arms_that_do_not_differ_are_told_apart_in_no_more_than_one_of_twenty_cases(kind, seeds):
    rng, cases = np.random.default_rng(seeds), 2000
    wrong = 0
    for _ in range(cases):
        treatment, control = SCORES[kind](rng, seeds)
        wrong += paired_t_p(treatment - control, resolution([*treatment, *control])) <= 0.05
    assert wrong / cases <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / cases)


def test_three_equal_differences_of_one_example_establish_nothing():
    """As a spread of zero they would, at any level."""
    paired = compare_paired({0: 0.9, 1: 0.9, 2: 0.9}, {0: 0.875, 1: 0.875, 2: 0.875}, generator())
    assert paired.t_p == pytest.approx(2 * stats.t.sf(np.sqrt(3), 2))
    assert paired.t_low < 0 < paired.t_high
    assert resolution([0.5, 0.5]) == 0.0
    assert compare_paired({0: 0.5, 1: 0.5}, {0: 0.5, 1: 0.5}, generator()).t_p == 1.0


# --- evidence of absence --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "shift", "margin"), [(2, 0.1, 1.0), (5, 0.0, 0.5), (8, -0.3, 0.4), (30, 0.2, 0.1)])
def test_the_equivalence_test_is_two_one_sided_t_tests(n, shift, margin):
    values = np.random.default_rng(n).normal(shift, 1, n)
    oracle = max(
        stats.ttest_1samp(values, -margin, alternative="greater").pvalue,
        stats.ttest_1samp(values, margin, alternative="less").pvalue,
    )
    assert equivalence_p(values.mean(), values.std(ddof=1), n, margin) == pytest.approx(oracle, rel=1e-10)


def test_the_least_margin_is_the_one_that_the_equivalence_test_just_establishes():
    scores = {s: 0.8 + s / 100 for s in range(5)}, {s: 0.8 + s / 90 for s in range(5)}
    paired = compare_paired(*scores, generator())
    mean, spread = paired.difference.value, paired.spread
    assert spread == pytest.approx(np.std(paired.differences, ddof=1), rel=1e-12)
    assert equivalence_p(mean, spread, 5, paired.within) == pytest.approx(0.05, rel=1e-9)
    oracle = stats.ttest_1samp(paired.differences, 0).confidence_interval(0.9)
    assert paired.equivalence_interval == pytest.approx((oracle.low, oracle.high), rel=1e-10)
    alone = compare_paired({1: 0.5}, {1: 0.4}, generator())
    assert alone.within is alone.spread is None


def test_equivalence_is_seldom_declared_where_the_difference_is_the_margin():
    draws = np.random.default_rng(1).normal(1.0, 1.5, (4000, 6))
    p = [equivalence_p(row.mean(), row.std(ddof=1), 6, 1.0) for row in draws]
    assert np.mean(np.array(p) <= 0.05) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 4000)


def test_without_any_spread_the_mean_decides():
    assert equivalence_p(0.1, 0.0, 4, 0.2) == 0.0
    assert equivalence_p(0.2, 0.0, 4, 0.2) == 1.0


@pytest.mark.parametrize(("effect", "spread"), [(1.0, 0.5), (1.0, 2.0), (0.3, 1.0)])
def test_the_seeds_needed_by_the_noncentral_t(effect, spread):
    def power(n):
        critical, shift = stats.t.ppf(0.975, n - 1), effect / spread * np.sqrt(n)
        return stats.nct.sf(critical, n - 1, shift) + stats.nct.cdf(-critical, n - 1, shift)

    n = seeds_needed(effect, spread)
    assert power(n) > 0.8 - 2e-3
    assert power(n - 1) < 0.8 + 2e-3


def test_more_seeds_than_anyone_runs_are_no_number():
    assert seeds_needed(0.01, 1.0) is None
    assert seeds_needed(100.0, 1.0) == 2


@pytest.mark.parametrize("seeds", [3, 6])
def test_the_detectable_effect_is_found_four_times_in_five(seeds):
    draws = np.random.default_rng(5).normal(detectable_effect(seeds), 1, (4000, seeds))
    assert np.mean(stats.ttest_1samp(draws, 0, axis=1).pvalue <= 0.05) == pytest.approx(0.8, abs=0.02)


def test_fiellers_interval_inverts_the_paired_t_test():
    rng = np.random.default_rng(3)
    whole = rng.normal(8, 2, 6)
    part = 0.9 * whole + rng.normal(0, 1, 6)
    estimate = ratio_of_means(part, whole)
    assert estimate.value == pytest.approx(part.mean() / whole.mean())
    for end, outwards in ((estimate.low, -1), (estimate.high, 1)):
        assert stats.ttest_rel(part, end * whole).pvalue == pytest.approx(0.05)
        assert stats.ttest_rel(part, (end + outwards * 0.01) * whole).pvalue < 0.05
    assert stats.ttest_rel(part, estimate.value * whole).pvalue == pytest.approx(1)


def test_fiellers_interval_has_no_end_where_there_is_nothing_to_divide_by():
    part, whole = [1.0, 2.0, 1.5], [3.0, -3.0, 0.5]
    assert stats.ttest_1samp(whole, 0).pvalue > 0.05
    assert ratio_of_means(part, whole).low is ratio_of_means(part, whole).high is None
    assert ratio_of_means([1.0], [2.0]).low is None


def test_sign_flip_p_by_hand():
    # of the 8 sign patterns of (1, 2, 3), with means * 3 = 6 4 2 0 0 -2 -4 -6, two are as far out as 6
    assert sign_flip_p([1, 2, 3], generator()) == pytest.approx(2 / 8)
    # (3, 2, -1): sum 4, as far out are 6, 4, -4, -6
    assert sign_flip_p([3, 2, -1], generator()) == pytest.approx(4 / 8)
    assert sign_flip_p([1, -1], generator()) == 1.0
    assert sign_flip_p([0.0, 0.0, 0.0], generator()) == 1.0


@pytest.mark.parametrize("n", [2, 5, 8])
def test_sign_flip_p_equals_its_definition_and_reaches_its_floor(n):
    values = np.random.default_rng(n).normal(0.3, 1, size=n)
    signs = np.array(list(itertools.product([-1, 1], repeat=n)))
    expected = np.mean(np.abs((signs * values).mean(1)) >= abs(values.mean()) - 1e-12)
    assert sign_flip_p(values, generator()) == pytest.approx(expected)
    assert sign_flip_p(np.abs(values), generator()) == pytest.approx(2 / 2**n)


def test_five_seeds_cannot_go_below_one_in_sixteen():
    result = compare_paired({s: 1.0 + s for s in range(5)}, {s: 0.5 * s for s in range(5)}, generator())
    assert result.p_value == result.p_floor == 0.0625


def test_the_false_positive_rate_under_the_null_is_the_level():
    rng = np.random.default_rng(0)
    p_values = np.array([sign_flip_p(rng.standard_t(3, size=6), rng) for _ in range(2000)])
    for level in (2 / 64, 4 / 64, 10 / 64):  # attainable levels of 6 seeds, where the exact test is exact
        rate = np.mean(p_values <= level + 1e-9)
        assert abs(rate - level) < 4 * np.sqrt(level * (1 - level) / 2000)


def test_holm_keeps_the_family_wise_error_under_the_null():
    rng = np.random.default_rng(0)
    rejected = [min(holm(rng.uniform(size=8))) <= 0.05 for _ in range(4000)]
    assert abs(np.mean(rejected) - (1 - (1 - 0.05 / 8) ** 8)) < 4 * np.sqrt(0.05 * 0.95 / 4000)


def test_holm_by_hand():
    # sorted .01 .02 .03 .04 times 4 3 2 1 = .04 .06 .06 .04, made monotone: .04 .06 .06 .06
    assert holm([0.04, 0.01, None, 0.03, 0.02]) == pytest.approx([0.06, 0.04, None, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_coverage_of_the_two_intervals_with_five_seeds_is_what_the_report_states():
    """The percentile bootstrap is too narrow for few seeds, Student's interval is not: both are shown."""
    rng = np.random.default_rng(0)
    samples = rng.normal(size=(400, 5))
    bootstrap = [bootstrap_mean(sample, rng) for sample in samples]
    student = [student_interval(sample) for sample in samples]
    assert 0.78 < np.mean([estimate.low <= 0 <= estimate.high for estimate in bootstrap]) < 0.88
    assert 0.92 < np.mean([low <= 0 <= high for low, high in student]) < 0.98


def test_one_seed_gives_a_difference_and_nothing_more():
    result = compare_paired({7: 0.9, 8: 0.1}, {7: 0.8, 9: 0.3}, generator())
    assert result.difference.value == pytest.approx(0.1)
    assert result.seeds == (7,)
    assert result.difference.low is result.difference.high is result.p_value is result.p_floor is result.t_low is None
    assert compare_paired({1: 0.5}, {2: 0.5}, generator()) is None


def test_pairing_removes_what_the_seeds_share():
    rng = np.random.default_rng(0)
    shared = rng.normal(0, 10, size=6)
    control = dict(enumerate(shared))
    treatment = {seed: value + 0.5 + rng.normal(0, 0.1) for seed, value in control.items()}
    result = compare_paired(treatment, control, generator())
    assert 0.4 < result.difference.low < 0.5 < result.difference.high < 0.65
    assert result.p_value == pytest.approx(2 / 64)


def test_interquartile_mean_is_the_mean_of_the_middle_half():
    # pooled and sorted: -100 1 2 3 4 5 6 100, of which 2 3 4 5 remain
    estimate = interquartile_mean([[-100, 6, 2, 3], [1, 4, 5, 100]], generator())
    assert estimate.value == 3.5
    assert estimate.low < 3.5 < estimate.high


def test_the_stratified_bootstrap_resamples_within_each_task():
    # within each task nothing varies, so resampling may not move anything although the tasks lie far apart
    estimate = interquartile_mean([[0.0] * 5, [10.0] * 5], generator())
    assert estimate.low == estimate.value == estimate.high == 5.0


def test_probability_of_improvement_by_hand_and_by_mann_whitney():
    treatment, control = [1, 3, 5], [2, 3, 0]
    by_hand = (1 + 0 + 0) + (1 + 0.5 + 1) + (1 + 1 + 1)  # against 0 2 3, for 1, then 3, then 5
    estimate = probability_of_improvement([(treatment, control)], generator())
    assert estimate.value == pytest.approx(by_hand / 9)
    assert estimate.value == pytest.approx(stats.mannwhitneyu(treatment, control).statistic / 9)
    two = probability_of_improvement([(treatment, control), ([1, 1], [0, 0])], generator())
    assert two.value == pytest.approx((by_hand / 9 + 1) / 2)


def test_probability_of_improvement_draws_both_arms_of_a_seed_together():
    # seeds differ by far more than the arms; drawn together, no draw can make treatment lose to its own pair
    seeds = np.array([0.0, 100.0])
    estimate = probability_of_improvement([(seeds + 1, seeds)], generator())
    # draws (0, 0) and (1, 1): 1; (0, 1) and (1, 0): 3 of 4 runs won
    assert (estimate.value, estimate.low, estimate.high) == (0.75, 0.75, 1.0)


def test_probability_of_improvement_under_the_null_is_a_half():
    rng = np.random.default_rng(0)
    values = [probability_of_improvement([(rng.normal(size=5), rng.normal(size=5))], rng).value for _ in range(200)]
    assert abs(np.mean(values) - 0.5) < 0.05


def test_bootstrap_over_examples_agrees_with_the_normal_approximation():
    correct = np.arange(400) % 5 != 0
    estimate = bootstrap_examples(lambda index: correct[index].mean(), 400, generator())
    half = 1.96 * np.sqrt(0.8 * 0.2 / 400)
    assert estimate.value == 0.8
    assert (estimate.low, estimate.high) == pytest.approx((0.8 - half, 0.8 + half), abs=0.006)


def test_mcnemar_by_hand():
    # only a right 8 times, only b right 2 times: 2 * sum_{k<=2} C(10, k) / 2^10 = 2 * 56 / 1024
    a = [True] * 8 + [False] * 2 + [True] * 50
    b = [False] * 8 + [True] * 2 + [True] * 50
    assert mcnemar_p(a, b) == pytest.approx(112 / 1024)
    assert mcnemar_p(a, a) == 1.0


def test_the_same_generator_gives_the_same_numbers():
    scores = ({s: 0.9 + s / 100 for s in range(4)}, {s: 0.8 + s * s / 100 for s in range(4)})
    assert compare_paired(*scores, generator()) == compare_paired(*scores, generator())
