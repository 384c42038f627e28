"""Splits, subsets and noise: what they promise, counted."""

from __future__ import annotations

import numpy as np
import pytest

from hf_sam.tasks.command_line.errors import UserError
from hf_sam.tasks.data.sampling import stratified_sample, stratified_split, symmetric_noise

CLASSES = np.repeat([0, 1, 2], [80, 40, 20])


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_split_gives_every_class_the_same_share(share):
    first, second = stratified_split(CLASSES, share, seed=0)
    assert sorted([*first, *second]) == list(range(140))
    assert np.array_equal(np.bincount(CLASSES[second]), np.round(share * np.array([80, 40, 20])))


def test_split_depends_on_its_seed_alone():
    np.random.seed(0)
    again = stratified_split(CLASSES, 0.25, seed=1)
    np.random.seed(1)
    assert all(np.array_equal(a, b) for a, b in zip(stratified_split(CLASSES, 0.25, seed=1), again, strict=True))
    assert not np.array_equal(again[1], stratified_split(CLASSES, 0.25, seed=2)[1])


def test_a_single_example_stays_in_training():
    first, _ = stratified_split(np.array([0] * 9 + [1]), 0.5, seed=0)
    assert 9 in first


def test_split_that_would_be_empty():
    with pytest.raises(UserError, match="too few"):
        stratified_split(np.array([0, 1]), 0.1, seed=0)


@pytest.mark.parametrize("total", [1, 7, 70, 139, 140])
def test_sample_keeps_proportions(total):
    kept = stratified_sample(CLASSES, total, None, seed=0)
    assert len(set(kept.tolist())) == total
    assert np.abs(np.bincount(CLASSES[kept], minlength=3) - total * np.array([80, 40, 20]) / 140).max() < 1


def test_sample_per_class():
    assert np.array_equal(np.bincount(CLASSES[stratified_sample(CLASSES, None, 5, seed=0)]), [5, 5, 5])


def test_noise_changes_exactly_its_share_and_only_to_other_classes():
    labels = np.random.default_rng(0).integers(0, 10, 6000)
    noisy, changed = symmetric_noise(labels, 10, 0.4, seed=0)
    assert len(changed) == 2400
    assert np.array_equal(np.flatnonzero(noisy != labels), changed)
    shifts = np.bincount((noisy - labels)[changed] % 10, minlength=10)
    assert shifts[0] == 0
    expected = 2400 / 9
    assert ((shifts[1:] - expected) ** 2 / expected).sum() < 26.1  # chi squared, 8 degrees of freedom, p = 0.001


def test_noise_depends_on_its_seed_alone():
    labels = np.arange(100) % 3
    first, second = symmetric_noise(labels, 3, 0.5, seed=1)[0], symmetric_noise(labels, 3, 0.5, seed=2)[0]
    assert np.array_equal(first, symmetric_noise(labels, 3, 0.5, seed=1)[0])
    assert not np.array_equal(first, second)
