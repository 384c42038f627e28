"""Slices through the loss: along random filter-normalised directions, and between two checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .loss import SubsetLoss


@dataclass(frozen=True)
class Line:
    """The loss on the straight line from one checkpoint to another.

    Args:
        t (`list[float]`): Positions on the line, 0 at the first checkpoint and 1 at the second.
        losses (`list[float]`): `L((1 - t) w_0 + t w_1)`.
    """

    t: list[float]
    losses: list[float]

    @property
    def barrier(self) -> float:
        """The largest height of the loss above the chord between its ends (Frankle et al. 2020); at least 0."""
        chord = (1 - np.array(self.t)) * self.losses[0] + np.array(self.t) * self.losses[-1]
        return float((np.array(self.losses) - chord).max())


def filter_normalised_direction(loss: SubsetLoss, seed: int = 0) -> Tensor:
    """A Gaussian direction in which each filter has the norm of the weights' filter (Li et al. 2018, Section 4).

    A filter is a row: all weights of one output unit or channel. The direction is 0 for vectors (biases, normalisation
    layers).

    Returns:
        `Tensor`: Shape `(P,)`.
    """
    generator = torch.Generator().manual_seed(seed)
    direction = torch.zeros_like(loss.weights)
    weights = loss.views(loss.weights)
    for name, part in loss.views(direction).items():
        if part.ndim < 2:
            continue
        noise = torch.randn(part.shape, generator=generator).to(part).flatten(1)
        norms = weights[name].flatten(1).norm(dim=1, keepdim=True)
        part.copy_((noise / noise.norm(dim=1, keepdim=True) * norms).view(part.shape))
    return direction


def slice_1d(loss: SubsetLoss, direction: Tensor, alphas: list[float]) -> list[float]:
    """`L(w + alpha d)` for each alpha."""
    return [loss(loss.weights + alpha * direction) for alpha in alphas]


def slice_2d(loss: SubsetLoss, first: Tensor, second: Tensor, alphas: list[float]) -> list[list[float]]:
    """`L(w + alpha d_1 + beta d_2)`: one row per beta, one column per alpha, both over the same grid."""
    return [[loss(loss.weights + alpha * first + beta * second) for alpha in alphas] for beta in alphas]


def line_between(first: SubsetLoss, second: SubsetLoss, points: int = 11) -> Line:
    """The loss between two checkpoints of one architecture, on the subset of the first.

    Running statistics are interpolated like weights, not re-estimated.

    Raises:
        ValueError: The checkpoints have parameters of different names or shapes.
    """
    if first.shapes != second.shapes:
        names = [n for n in {**first.shapes, **second.shapes} if first.shapes.get(n) != second.shapes.get(n)]
        raise ValueError(
            f"A line needs two checkpoints of one architecture, but these differ in {len(names)} parameters, such as "
            f"{names[0]!r}."
        )
    t = [float(value) for value in np.linspace(0, 1, points)]
    return Line(t, [_between(first, second, value) for value in t])


def _between(first: SubsetLoss, second: SubsetLoss, t: float) -> float:
    buffers = {
        name: torch.lerp(a, second.buffers[name], t) if a.is_floating_point() else a
        for name, a in first.buffers.items()
    }
    return first.with_buffers(buffers)(torch.lerp(first.weights, second.weights, t))
