"""Splits, subsets and label noise as pure functions of labels and a seed."""

from __future__ import annotations

import math

import numpy as np

from ..command_line.errors import UserError


def stratified_split(classes: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """
    Split `range(len(classes))` in two so that the second part gets the same fraction of every class.

    Args:
        classes (`np.ndarray` of shape `(n,)`): The class of each example.
        share (`float`): Fraction of the second part, in (0, 1).
        seed (`int`): Random seed.

    Returns:
        Two sorted index arrays. A class with a single example stays in the first part.

    Raises:
        UserError: If one of the parts would be empty.
    """
    rng = np.random.default_rng(seed)
    held_out = []
    for members in _by_class(classes):
        count = min(round(share * len(members)), len(members) - 1)
        held_out.append(rng.permutation(members)[:count])
    second = np.sort(np.concatenate(held_out))
    first = np.setdiff1d(np.arange(len(classes)), second)
    if len(second) == 0 or len(first) == 0:
        raise UserError(f"{len(classes)} examples are too few to split off a fraction of {share}.")
    return first, second


def stratified_sample(classes: np.ndarray, total: int | None, per_class: int | None, seed: int) -> np.ndarray:
    """
    Draw `total` examples in the proportions of the classes (largest remainders), or `per_class` of each class.
    A class with few examples may then have none; see `total_for_every_class`.

    Returns:
        Sorted indices, `(total,)` or `(per_class * number of classes,)`.

    Raises:
        UserError: If there are too few examples.
    """
    rng = np.random.default_rng(seed)
    groups = _by_class(classes)
    if per_class is not None:
        counts = np.full(len(groups), per_class)
        smallest = min(len(members) for members in groups)
        if smallest < per_class:
            raise UserError(
                f"train_samples_per_class={per_class}, but the smallest class has only {smallest} examples; give at most "
                f"{smallest}, or --train_samples {min(len(classes), max(per_class * len(groups), total_for_every_class(classes)))} "
                f"for that many in the proportions of the classes."
            )
    else:
        if total > len(classes):
            raise UserError(f"{total} examples were requested, but there are only {len(classes)}.")
        shares = total * np.array([len(members) for members in groups]) / len(classes)
        counts = np.floor(shares).astype(int)
        counts[np.argsort(counts - shares, kind="stable")[: total - counts.sum()]] += 1
    return np.sort(np.concatenate([rng.permutation(m)[:count] for m, count in zip(groups, counts, strict=True)]))


def total_for_every_class(classes: np.ndarray) -> int:
    """Return a number of examples from which on `stratified_sample` draws some of every class."""
    return math.ceil(len(classes) / min(len(members) for members in _by_class(classes)))


def symmetric_noise(labels: np.ndarray, num_classes: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """
    Replace a fraction of the labels by another class, all other classes being equally likely.

    Args:
        labels (`np.ndarray` of shape `(n,)`): The true classes.
        num_classes (`int`): Number of classes, at least 2.
        share (`float`): Fraction of wrong labels; exactly `round(share * n)` labels change.
        seed (`int`): Random seed.

    Returns:
        The new labels, and the sorted indices of those that changed.
    """
    rng = np.random.default_rng(seed)
    changed = np.sort(rng.permutation(len(labels))[: round(share * len(labels))])
    noisy = labels.copy()
    noisy[changed] = (labels[changed] + rng.integers(1, num_classes, size=len(changed))) % num_classes
    return noisy, changed


def _by_class(classes: np.ndarray) -> list[np.ndarray]:
    return [np.flatnonzero(classes == value) for value in np.unique(classes)]
