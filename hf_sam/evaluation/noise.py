"""Gaussian noise on weights, in units of each tensor's standard deviation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .weights import WeightMatrix


def add_noise(weight: Tensor, size: float, generator: torch.Generator) -> Tensor:
    """
    `weight + size * std(weight) * N(0, 1)`.

    Args:
        weight (`Tensor`): A tensor of any shape, on any device.
        size (`float`): Standard deviation of the noise relative to that of the entries of `weight`.
        generator (`torch.Generator`): A generator on the CPU, so that every device gets the same noise.
    """
    draw = torch.randn(weight.shape, generator=generator, dtype=torch.float32).to(weight)
    return weight.detach() + size * weight.detach().std(correction=0) * draw


def noisy(matrices: Mapping[str, WeightMatrix], size: float, seed: int) -> dict[str, Tensor]:
    """Each of `matrices` with added noise, which depends only on `seed` and the order of the parameters."""
    generator = torch.Generator().manual_seed(seed)
    return {name: add_noise(matrix.weight, size, generator) for name, matrix in matrices.items()}
