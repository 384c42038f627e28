"""The search for rho as pure functions: cost to the pass, halving by hand, and how often the rule is wrong."""

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from hf_sam import SAMConfig
from hf_sam.experiments.records import RECORD_NAME, RunRecord
from hf_sam.reporting.rho_search import conclusion
from hf_sam.rho_search.halving import (
    Rung,
    SearchPlan,
    geometric_grid,
    halving,
    looks,
    make_plan,
    search_passes,
    survivors,
)
from hf_sam.rho_search.phases import (
    PREDICTIONS_NAME,
    UNTRAINED,
    Phase,
    RhoWorkshop,
    Search,
    pass_counter,
)
from hf_sam.rho_search.probe import has_a_scale, middle_rho, probe_steps, values_around
from hf_sam.rho_search.rule import is_settled, paired_gain, recommended
from hf_sam.rho_search.scores import ExampleScores, constant_scores, example_scores
from hf_sam.update.schedule import Schedule


def two_passes(length, begin, end):
    return 2 * (end - begin)


def scores(values):
    return ExampleScores(np.asarray(values, dtype=float), np.ones(len(values)))


# --- what it costs -------------------------------------------------------------------------------------------------


def test_rungs_by_hand():
    assert halving(4, 80, 2) == (Rung(20, 4), Rung(40, 2))
    assert halving(6, 90, 3) == (Rung(10, 6), Rung(30, 2))
    assert halving(5, 80, 2) == (Rung(10, 5), Rung(20, 3), Rung(40, 2))
    assert halving(1, 80, 2) == ()


def test_passes_by_hand():
    """Rung 1: 4 runs x 20 steps x 2 passes and 20 of rho 0; rung 2: 2 x 20 x 2 and 20, the rest being done already."""
    assert search_passes(halving(4, 80, 2), 1000, two_passes) == (160 + 20) + (80 + 20)


def test_a_plan_by_hand():
    """280 passes in the rungs as above, and 3 seeds x 80 steps x (1 + 2) passes: 1000 in all for a horizon of 80."""
    plan = make_plan(500, 4, 2.0, two_passes, seeds=3, reduction=2)
    assert (plan.horizon, plan.seeds, plan.schedule, plan.passes) == (80, 3, 500, 1000)
    assert make_plan(500, 4, 1.999, two_passes, seeds=3, reduction=2).horizon == 79
    assert make_plan(500, 4, 2.0, two_passes, seeds=3, reduction=2, annealed=True).schedule == 80


def test_what_is_left_at_the_full_length_buys_seeds():
    """To the end: 2.25 + 1.25 ordinary runs in the rungs, and 3 for each seed."""
    plans = {budget: make_plan(100, 4, budget, two_passes, seeds=2, reduction=2) for budget in (9.4, 9.5, 12.5, 15.4)}
    assert {budget: (plan.horizon, plan.seeds) for budget, plan in plans.items()} == {
        9.4: (99, 2),
        9.5: (100, 2),
        12.5: (100, 3),
        15.4: (100, 3),
    }


@pytest.mark.parametrize("method", ["sam", "late", "periodic", "msam", "subset", "looksam"])
@pytest.mark.parametrize("budget", [1.0, 2.0, 5.3, 40])
@pytest.mark.parametrize("annealed", [False, True])
def test_the_budget_is_never_exceeded(method, budget, annealed):
    counter = pass_counter(SAMConfig(method=method), lambda length: length // 10)
    for length in (97, 1000):
        for rhos, reduction, seeds in ((1, 2, 2), (4, 2, 3), (7, 3, 2)):
            plan = make_plan(length, rhos, budget, counter, seeds=seeds, reduction=reduction, annealed=annealed)
            again = search_passes(plan.rungs, plan.schedule, counter)
            again += plan.seeds * (counter(plan.schedule, 0, plan.horizon) + plan.horizon)
            assert again == plan.passes <= budget * length
            assert plan.seeds >= seeds


def test_a_budget_that_is_too_small_names_the_least():
    with pytest.raises(ValueError, match=r"budget=0\.1 is too small: 10 gradient passes.*at least 0\.5"):
        make_plan(100, 4, 0.1, two_passes, seeds=3, reduction=2)
    make_plan(100, 4, 0.5, two_passes, seeds=3, reduction=2)
    with pytest.raises(ValueError, match="too short for a search"):
        make_plan(3, 4, 100, two_passes, seeds=3, reduction=2)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"method": "late", "start": 0.4, "end": 0.9},
        {"method": "periodic", "interval": 3, "start": 7},
        {"method": "msam"},
        {"method": "subset", "interval": 2},
        {"ascent_steps": 3, "start": 5, "end": 6},
    ],
)
def test_passes_are_those_of_the_steps_one_by_one(settings):
    config = SAMConfig(**settings)
    schedule, counter = Schedule.resolve(config, 50, 5), pass_counter(config, lambda length: 5)
    for begin in range(0, 50, 3):
        for end in range(begin + 1, 51):
            each = [config.passes_per_step if schedule.perturbs(step) else 1 for step in range(begin, end)]
            assert counter(50, begin, end) == pytest.approx(sum(each)), (begin, end)


# --- which go on ---------------------------------------------------------------------------------------------------


def test_the_grid_is_geometric():
    assert geometric_grid(0.005, 0.2, 4) == [0.005, 0.017, 0.058, 0.2]
    assert geometric_grid(0.1, 0.1, 1) == [0.1]


def test_the_probe_finds_where_sharpness_is_a_tenth_of_the_loss():
    def entry(loss, sharpness, rho):
        return {"sam_sharpness": sharpness, "sam_perturbed_loss": loss + sharpness, "sam_rho": rho, "loss": 99.0}

    curves = [entry(2.0, 0.02, 0.01), entry(2.0, 0.01, 0.01), entry(2.0, 0.04, 0.01), {"eval_loss": 1.0}]
    assert middle_rho(curves) == pytest.approx(0.1)  # 0.2, 0.1 and 0.05
    assert middle_rho([entry(2.0, 0.002, 0.001)]) == pytest.approx(0.1)  # a schedule that raises rho
    for unusable in (
        [],
        [{"loss": 1.0}],
        [entry(2.0, -0.02, 0.01)],
        [entry(2.0, 0.0, 0.01)],
        [entry(2.0, np.nan, 0.01)],
    ):
        assert middle_rho(unusable) is None
    assert values_around(0.1, 1) == [0.1]
    assert values_around(0.1, 3) == [0.032, 0.1, 0.32]
    assert values_around(0.1, 4) == [0.01, 0.032, 0.1, 0.32]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, True),
        ({"method": "asam"}, True),
        ({"perturb": "norm"}, True),
        ({"method": "msam"}, False),
        ({"method": "lesam"}, False),
        ({"rho_schedule": "linear", "rho_min": 0.01}, False),
    ],
)
def test_the_probe_is_for_methods_whose_sharpness_grows_with_rho(settings, expected):
    assert has_a_scale(SAMConfig(**{"rho": 0.05, **settings})) is expected


@pytest.mark.parametrize(("length", "steps"), [(2, 2), (24, 4), (100, 5), (1000, 50)])
def test_the_probe_takes_a_twentieth_of_an_ordinary_run(length, steps):
    assert probe_steps(length) == steps


def test_a_plan_with_a_probe_by_hand():
    """40 passes for the probe, 171 + 95 in the rungs, and 3 seeds x 77 steps x 3."""
    plan = make_plan(500, 4, 2.0, two_passes, seeds=3, reduction=2, probe=20)
    assert (plan.horizon, plan.passes, plan.probe) == (77, 40 + 171 + 95 + 693, 20)


def test_the_best_go_on_and_of_equal_ones_the_smaller():
    gains = {0.2: 1.0, 0.005: 0.5, 0.05: 1.0, 0.01: None, 0.02: float("nan")}
    assert survivors(gains, 1) == [0.05]
    assert survivors(gains, 9) == [0.05, 0.2, 0.005]
    assert survivors({0.1: None}, 2) == []


# --- the rule ------------------------------------------------------------------------------------------------------


def test_the_interval_over_examples_is_that_of_the_paired_t_test():
    """One seed: nothing but examples vary, so that scipy's paired t-test gives the same interval."""
    rng = np.random.default_rng(0)
    treated, control = rng.normal(0.3, 1, 40), rng.normal(0, 1, 40)
    gain = paired_gain([scores(treated)], [scores(control)], True, rhos=2)
    oracle = stats.ttest_rel(treated, control).confidence_interval(0.95)
    assert (gain.low, gain.high, gain.confidence) == pytest.approx((oracle.low, oracle.high, 0.95))
    assert paired_gain([scores(control)], [scores(treated)], False, rhos=2).low == pytest.approx(gain.low)


def test_the_standard_error_of_a_mean_over_tokens_is_that_of_the_bootstrap_over_texts():
    rng = np.random.default_rng(1)
    tokens = rng.integers(1, 30, 400).astype(float)
    treated, control = (tokens * rng.gamma(2, 1, 400) for _ in range(2))
    gain = paired_gain([ExampleScores(treated, tokens)], [ExampleScores(control, tokens)], False, rhos=2)
    drawn = rng.integers(0, 400, (4000, 400))
    means = (control - treated)[drawn].sum(1) / tokens[drawn].sum(1)
    half = stats.t.ppf(0.975, 399) * means.std()
    assert gain.high - gain.value == pytest.approx(half, rel=0.05)
    assert gain.value == pytest.approx((control.sum() - treated.sum()) / tokens.sum())


def test_seeds_that_disagree_give_the_interval_of_students_test():
    """Examples that all move alike add nothing, so that the interval is Student's over the seeds."""
    gains = [0.1, 0.4, 0.3]
    treated = [scores(np.full(50, gain)) for gain in gains]
    gain = paired_gain(treated, [scores(np.zeros(50))] * 3, True, rhos=2)
    oracle = stats.ttest_1samp(gains, 0).confidence_interval(0.95)
    assert (gain.low, gain.high) == pytest.approx((oracle.low, oracle.high))


def test_zero_is_recommended_where_nothing_differs_or_one_seed_was_run():
    same = scores([1, 0, 1, 1])
    gain = paired_gain([same, same], [same, same], True, rhos=4)
    assert (gain.low, gain.value, gain.high) == (0, 0, 0)
    assert recommended(0.05, gain) == 0
    one = paired_gain([scores(np.arange(1, 9))], [scores(np.zeros(8))], True, rhos=4)
    assert one.low > 0
    assert recommended(0.05, one) == 0
    assert recommended(None, None) == 0


def pairs_made(treated, rhos):
    """How many of the pairs with the `treated` runs, against zero, a confirmation makes before it ends."""
    zero = scores(np.zeros(len(treated[0].influence())))
    seeds = len(treated)
    return next((k for k in looks(seeds) if is_settled(treated[:k], [zero] * k, True, rhos, seeds)), seeds)


def simulate(rng, gains, *, seeds=3, examples=200, over_examples=0.0, over_seeds=0.0, noise=0.3, ends_early=True):
    """
    A search on a made-up curve: what it recommends. The gain of each rho over 0 varies over examples (the same ones in
    search and confirmation), over seeds, and from example to example and seed to seed.
    """
    moved = {rho: gain + rng.normal(0, over_examples, examples) for rho, gain in gains.items()}

    def run(rho):
        return scores(moved[rho] + rng.normal(0, over_seeds) + rng.normal(0, noise, examples))

    zero = scores(np.zeros(examples))
    rhos = list(gains)
    for rung in halving(len(rhos), 64, 2)[1:]:
        rhos = survivors({rho: run(rho).value for rho in rhos}, rung.rhos)
    (best,) = survivors({rho: run(rho).value for rho in rhos}, 1)
    treated = [run(best) for _ in range(seeds)]
    made = pairs_made(treated, len(gains)) if ends_early else seeds
    return recommended(best, paired_gain(treated[:made], [zero] * made, True, len(gains)))


@pytest.mark.parametrize("seeds", [2, 3, 6])
@pytest.mark.parametrize(
    "spread", [{}, {"over_examples": 0.3}, {"over_seeds": 0.03}, {"over_examples": 0.3, "over_seeds": 0.03}]
)
def test_where_no_rho_helps_one_is_recommended_in_five_percent_of_searches_at_most(seeds, spread):
    """400 searches: of a true rate of 5 %, more than 31 come less than once in a hundred times."""
    rng = np.random.default_rng(0)
    null = dict.fromkeys((0.005, 0.017, 0.058, 0.2), 0.0)
    wrong = sum(simulate(rng, null, seeds=seeds, **spread) > 0 for _ in range(400))
    assert wrong <= 31


def test_the_best_rho_of_a_clear_curve_is_recommended():
    rng = np.random.default_rng(0)
    curve = {0.005: 0.02, 0.017: 0.06, 0.058: 0.15, 0.2: -0.3}
    found = [simulate(rng, curve, over_examples=0.3, over_seeds=0.02) for _ in range(200)]
    assert found.count(0.058) > 180
    harmful = {0.005: -0.02, 0.017: -0.06, 0.058: -0.1, 0.2: -0.3}
    assert not any(simulate(rng, harmful, over_examples=0.3, over_seeds=0.02) for _ in range(200))


@pytest.mark.parametrize(
    ("seeds", "expected"), [(1, []), (2, [1]), (3, [1, 2]), (4, [1, 2]), (6, [2, 4]), (10, [3, 6])]
)
def test_a_confirmation_may_end_after_a_third_and_two_thirds(seeds, expected):
    assert looks(seeds) == expected


def test_a_question_is_settled_by_agreeing_gains_and_by_hopeless_ones():
    """Examples that move alike, so that the intervals are those of Student's test over the seeds."""

    def settled(*gains, seeds=3, higher=True):
        treated = [scores(np.full(50, gain)) for gain in gains]
        return is_settled(treated, [scores(np.zeros(50))] * len(gains), higher, 1, seeds)

    assert settled(-0.1)
    assert settled(0.0)
    assert settled(0.1, higher=False)
    assert not settled(0.1)  # one seed is never significant, and two more such pairs would be
    assert settled(0.1, 0.101)
    assert not settled(0.1, 0.2)  # +0.15, with a one-sided 97.5 % bound of 0.05 * 12.7 below it
    low = 0.15 - 0.05 * stats.t.ppf(0.975, 1)
    assert low < 0
    # [-0.3, 0.1] and another 0.1: -0.033, so not even above 0; [-0.1, 0.1] and another 0.1: 0.033, where significance
    # takes 2.92 * 0.115 / sqrt(3) = 0.195, of which it is 0.17
    assert settled(-0.3, 0.1)
    assert settled(-0.1, 0.1)
    # [0.02, 0.1, 0.1]: 0.073, where significance takes 2.92 * 0.0267 = 0.078
    assert not settled(0.02, 0.1)


def test_a_search_costs_less_where_no_rho_helps_and_where_one_does():
    """In horizons: 3 for the rungs, 3 for each pair. All of it is 12."""

    def cost(gain):
        spent = []
        for n in range(200):
            rng = np.random.default_rng(n)
            treated = [scores(gain + rng.normal(0, 0.02) + rng.normal(0, 0.3, 200)) for _ in range(3)]
            spent.append(3 + 3 * pairs_made(treated, 3))
        return np.mean(spent)

    assert cost(0.0) < 8
    assert cost(0.2) < 10


@pytest.mark.parametrize("seeds", [2, 3, 6])
@pytest.mark.parametrize("gain", [0.03, 0.06, 0.12])
def test_ending_early_costs_hardly_any_recommendation(seeds, gain):
    """At most three in a hundred of them are lost, over gains of half a standard deviation over seeds to two."""

    def is_found(n, ends_early):
        rng = np.random.default_rng(n)
        return simulate(rng, {0.05: gain}, seeds=seeds, over_seeds=0.06, ends_early=ends_early) > 0

    whole = [n for n in range(400) if is_found(n, ends_early=False)]
    lost = [n for n in whole if not is_found(n, ends_early=True)]
    assert len(lost) <= 0.03 * len(whole)


@pytest.mark.parametrize(
    ("best", "further"), [(0.1, " It is the largest value tried; --low 0.1 --high 0.6 looks further."), (0.03, "")]
)
def test_a_recommended_value_at_the_upper_end_of_the_grid_names_the_next_search(best, further, monkeypatch):
    plan = SearchPlan(100, (), 100, 2, 100, 0.0)
    workshop = RhoWorkshop(Search(Path("nowhere"), [], "r", (), {}, (0.01, 0.03, 0.1), 0, "accuracy", plan))
    pairs = [[Phase(0, rho, seed, 0, 100) for rho in (0.0, best)] for seed in (1, 2)]
    monkeypatch.setattr(workshop, "stages", lambda: [[phase for pair in pairs for phase in pair]])
    monkeypatch.setattr(workshop, "score", lambda phase: scores(np.full(8, 0.6 if phase.rho else 0.5)))
    rho, _, sentence = conclusion(workshop)
    assert rho == best
    assert sentence.endswith(f"2 seeds, after 100 of 100 steps).{further}")


def test_a_search_that_ended_early_says_after_how_many_seeds(monkeypatch):
    plan = SearchPlan(100, (), 100, 3, 100, 0.0)
    workshop = RhoWorkshop(Search(Path("nowhere"), [], "r", (), {}, (0.1,), 0, "accuracy", plan))
    monkeypatch.setattr(workshop, "has_ended", lambda phase: True)
    monkeypatch.setattr(workshop, "score", lambda phase: scores(np.full(8, 0.4 if phase.rho else 0.5)))
    monkeypatch.setattr(workshop, "has_learnt", lambda runs: True)
    monkeypatch.setattr(workshop, "stages", lambda: [workshop._confirmation(0.1)])
    assert workshop.ended_early
    rho, gain, sentence = conclusion(workshop)
    assert (rho, gain.seeds) == (0.0, 1)
    assert sentence.endswith("The search ended there, after 1 of 3 seeds.")
    workshop.search = dataclasses.replace(workshop.search, rhos=(0.1, 0.3))
    sentence = conclusion(workshop)[2]
    assert sentence.endswith(" seeds. It is the smallest value tried; --low 0.02 --high 0.1 looks at smaller ones.")
    workshop.search = dataclasses.replace(workshop.search, rhos=(0.1,))
    monkeypatch.setattr(workshop, "score", lambda phase: scores(np.full(8, 0.6 if phase.rho else 0.5)))
    assert workshop.ended_early  # two pairs that agree
    assert (conclusion(workshop)[0], len(workshop.stages()[0])) == (0.1, 4)
    gains = {1: 0.6, 2: 0.7, 3: 0.8}
    monkeypatch.setattr(workshop, "score", lambda phase: scores(np.full(8, gains[phase.seed] if phase.rho else 0.5)))
    assert not workshop.ended_early
    assert len(workshop.stages()[0]) == 6


# --- what is scored ------------------------------------------------------------------------------------------------


def test_the_floor_is_the_best_answer_that_looks_at_nothing():
    probabilities = [np.array([0.9, 0.1])] * 4
    classes = pd.DataFrame({"label": [0, 0, 0, 1], "prediction": [0] * 4, "probabilities": probabilities})
    floor = constant_scores(classes)
    assert floor["accuracy"].value == 0.75
    assert floor["nll"].value == pytest.approx(-0.75 * np.log(0.75) - 0.25 * np.log(0.25))
    assert constant_scores(pd.DataFrame({"label": [1.0, 3.0], "prediction": [0.0, 9.0]}))["mse"].value == 1.0
    several = pd.DataFrame({"label": [np.array([0.0, 1.0]), np.array([1.0, 1.0])], "probabilities": [[0.2, 0.9]] * 2})
    assert constant_scores(several)["subset_accuracy"].value == 0.5
    assert constant_scores(pd.DataFrame({"nll": [2.0, 9.0], "tokens": [1, 10]})) == {}


@pytest.mark.parametrize(("columns", "expected"), [({}, 4.0), ({"answers": 1, "correct": 1, "most_frequent": 0}, 0.0)])
def test_the_untrained_model_is_the_floor_only_where_there_is_no_constant_answer(columns, expected, tmp_path):
    """A language model, and a text-to-text classifier, whose predictions also hold tokens."""
    workshop = RhoWorkshop(Search(tmp_path, [], "seq2seq", (), {}, (0.1,), 0, None, None))
    phase = Phase(0, 0.0, 0, 0, 1)
    for folder, nll in ((tmp_path / UNTRAINED, 4.0), (workshop.folder(phase), 1.0)):
        folder.mkdir(parents=True)
        kept = pd.DataFrame(
            {"nll": [nll, nll], "tokens": [1, 1], **{name: [value] * 2 for name, value in columns.items()}}
        )
        kept.to_parquet(folder / PREDICTIONS_NAME)
    RunRecord(task="t", arm="a", status="finished").write(workshop.folder(phase) / RECORD_NAME)
    assert workshop.floor([phase]) == expected
    assert workshop.has_learnt([phase])


def test_scores_of_kept_predictions_by_hand():
    classes = pd.DataFrame(
        {"label": [0, 1], "prediction": [0, 0], "probabilities": [np.array([0.8, 0.2]), np.array([0.6, 0.4])]}
    )
    found = example_scores(classes)
    assert list(found) == ["accuracy", "brier", "nll"]
    assert found["accuracy"].value == 0.5
    assert found["nll"].value == pytest.approx(-np.log([0.8, 0.4]).mean())
    assert found["brier"].value == pytest.approx((0.08 + 0.72) / 2)
    several = pd.DataFrame({"label": [np.array([0.0, 1.0])] * 2, "probabilities": [[0.2, 0.9], [0.7, 0.9]]})
    found = example_scores(several)
    assert found["subset_accuracy"].value == 0.5
    assert found["nll"].totals == pytest.approx([-np.log(0.8) - np.log(0.9), -np.log(0.3) - np.log(0.9)])
    assert example_scores(pd.DataFrame({"label": [1.0, 2.0], "prediction": [1.5, 2.0]}))["mse"].value == 0.125
    texts = example_scores(pd.DataFrame({"nll": [2.0, 9.0], "tokens": [1, 10]}))
    assert texts["nll_per_token"].value == 1.0
    assert example_scores(pd.DataFrame({"nll": [np.nan, 9.0], "tokens": [1, 10]})) == {}
