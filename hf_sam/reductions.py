"""Norms and inner products over all parameters together, in float32 or better, without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor


class Reductions:
    """Global norms and inner products of lists of tensors that this process holds whole.

    Every method returns a 0-dim tensor on the device of the first argument and does not synchronise with the host.
    Engines that shard parameters override `sum` and `max`, through which every other method goes.
    """

    def sum(self, parts: Tensor) -> Tensor:
        """Add one value per tensor, shape `(n,)`, up to a scalar."""
        return parts.sum()

    def max(self, parts: Tensor) -> Tensor:
        """The largest of one value per tensor, shape `(n,)`."""
        return parts.max()

    def norm(self, tensors: list[Tensor], order: float = 2.0) -> Tensor:
        """`||v||_order` of the concatenation `v` of all tensors, for `order` in [1, inf]."""
        parts = _stack(torch._foreach_norm(tensors, order, dtype=accumulation_dtype(tensors)))
        if order == float("inf"):
            return self.max(parts)
        return self.sum(parts**order) ** (1 / order)

    def dot(self, left: list[Tensor], right: list[Tensor]) -> Tensor:
        """The inner product of the concatenations of both lists."""
        dtype = accumulation_dtype(left)
        return self.sum(
            _stack([torch.dot(a.flatten().to(dtype), b.flatten().to(dtype)) for a, b in zip(left, right, strict=True)])
        )

    def count(self, masks: list[Tensor]) -> Tensor:
        """How many elements of the boolean masks are true."""
        return self.sum(_stack([mask.sum() for mask in masks]).to(torch.float64))


def accumulation_dtype(tensors: list[Tensor]) -> torch.dtype:
    """float64 where any tensor is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _stack(scalars: list[Tensor]) -> Tensor:
    device = scalars[0].device  # a model split over several devices has scalars on each
    return torch.stack([scalar.to(device) for scalar in scalars])
