"""First-task loss at matched second-task training loss, on paths whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from hf_sam.evaluation.forgetting import common_loss, loss_at, match

PATH = [(2.0, 1.0), (1.0, 1.4), (0.5, 2.4)]  # larger rates learn more and forget more


def test_between_two_rates_the_path_is_straight():
    for target in (1.9, 1.25, 1.0, 0.6):
        x, y = np.array(PATH[::-1]).T
        assert loss_at(PATH, target) == pytest.approx(np.interp(target, x, y))


def test_a_loss_that_is_not_reached_is_none():
    assert loss_at(PATH, 0.4) is None
    assert loss_at(PATH, 2.1) is None
    assert loss_at([], 1.0) is None


def test_a_rate_so_large_that_training_fails_does_not_count_against_the_path():
    assert loss_at([*PATH, (3.0, 9.0)], 1.5) == pytest.approx(1.2)


def test_the_target_is_the_lowest_loss_that_all_have():
    worse = [(2.2, 1.0), (0.8, 1.1)]
    assert common_loss([PATH, worse]) == 0.8
    assert common_loss([PATH, [(0.4, 1.0), (0.3, 1.1)]]) is None  # already below it at the smallest rate


def test_matched_losses_come_by_start_and_replicate():
    shifted = [(x, y + 0.1) for x, y in PATH]
    found = match({"a": {0: PATH, 1: shifted}, "b": {0: [(2.0, 0.5), (0.8, 0.9)]}})
    assert found.target == 0.8
    assert found.losses == {"a": {0: pytest.approx(1.8), 1: pytest.approx(1.9)}, "b": {0: 0.9}}
    assert found.unreached == {}
    assert match({"a": {0: PATH}}, 0.1).unreached == {"a": [0]}
    assert match({"a": {0: PATH}, "b": {0: [(0.4, 1.0)]}}).target is None
