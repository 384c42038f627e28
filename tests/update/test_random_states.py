"""Numpy's state is read and set only after a draw, and nobody can tell."""

from __future__ import annotations

import numpy as np
import pytest

from hf_sam.update.random_states import RandomStates

DRAWS = {
    "nothing": lambda: None,
    "numbers": lambda: np.random.random(3),
    "one normal number of a pair": lambda: np.random.standard_normal(),
    "both normal numbers of a pair": lambda: np.random.standard_normal(2),
    "many": lambda: np.random.random(2000),
}


def now():
    kind, key, *rest = np.random.get_state()
    return kind, key.tolist(), *rest


@pytest.fixture(autouse=True)
def numpys_state():
    before = np.random.get_state()
    np.random.seed(0)
    yield
    np.random.set_state(before)


@pytest.mark.parametrize("second", DRAWS)
@pytest.mark.parametrize("first", DRAWS)
@pytest.mark.parametrize("before", DRAWS)
def test_states_captured_one_after_the_other_are_restored_in_any_order(before, first, second):
    DRAWS[before]()
    one, expected_one = RandomStates([]), now()
    DRAWS[first]()
    two, expected_two = RandomStates([]), now()
    DRAWS[second]()
    for states, expected in ((one, expected_one), (two, expected_two), (two, expected_two), (one, expected_one)):
        states.restore()
        assert now() == expected
        DRAWS[first]()
        DRAWS[second]()


def test_another_generator_of_numpys_is_restored_too():
    usual = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(np.random.PCG64(1))
        states = RandomStates([])
        drawn = np.random.random(3)
        states.restore()
        assert np.array_equal(np.random.random(3), drawn)
    finally:
        np.random.set_bit_generator(usual)


def test_a_state_set_from_outside_is_seen():
    np.random.standard_normal()
    kept = np.random.get_state()
    np.random.random()
    RandomStates([])
    np.random.set_state(kept)
    states, expected = RandomStates([]), now()
    np.random.random()
    states.restore()
    assert now() == expected


def test_half_a_pair_of_normal_numbers_that_is_put_back_from_outside_is_seen():
    np.random.standard_normal()
    kept = np.random.get_state()
    for _ in range(2):
        np.random.set_state(kept)
        states, expected = RandomStates([]), now()
        np.random.standard_normal()  # the other half, after which the generator's memory is the same
        RandomStates([])
        states.restore()
        assert now() == expected
