"""Magnitude pruning without retraining."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .weights import WeightMatrix


def prune_smallest(weight: Tensor, share: float) -> Tensor:
    """
    Set the entries of smallest magnitude to zero, like `torch.nn.utils.prune.l1_unstructured`.

    Args:
        weight (`Tensor`): A tensor of any shape.
        share (`float`): Fraction of entries to prune, in [0, 1]; their number is rounded.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share={share} must be in [0, 1].")
    count = round(share * weight.numel())
    pruned = weight.detach().clone()
    smallest = torch.topk(pruned.abs().flatten(), count, largest=False).indices
    pruned.view(-1)[smallest] = 0
    return pruned


def pruned(matrices: Mapping[str, WeightMatrix], share: float) -> dict[str, Tensor]:
    """Each of `matrices`, with the same fraction of its smallest entries set to zero."""
    return {name: prune_smallest(matrix.weight.contiguous(), share) for name, matrix in matrices.items()}
