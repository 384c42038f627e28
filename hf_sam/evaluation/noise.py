"""Gaussian noise on weights, in units of each tensor's own standard deviation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .weights import WeightMatrix


def add_noise(weight: Tensor, size: float, generator: torch.Generator) -> Tensor:
    """
    `weight + size * std(weight) * N(0, 1)`.

    Args:
        weight (`Tensor`): Of any shape and on any device.
        size (`float`): The noise's standard deviation relative to that of the entries of `weight`.
        generator (`torch.Generator`): On the CPU, so that every device gets the same noise.
    """
    draw = torch.randn(weight.shape, generator=generator, dtype=torch.float32).to(weight)
    return weight.detach() + size * weight.detach().std(correction=0) * draw


def noisy(matrices: Mapping[str, WeightMatrix], size: float, seed: int) -> dict[str, Tensor]:
    """Each of `matrices` with noise; the draws depend on `seed` and on the order of the parameters alone."""
    generator = torch.Generator().manual_seed(seed)
    return {name: add_noise(matrix.weight, size, generator) for name, matrix in matrices.items()}
