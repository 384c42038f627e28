"""Norms and inner products over all parameters together, in float32 or better, without waiting for the device."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from .buckets import buckets, piece_size, pieces


class Reductions:
    """Global norms and inner products of lists of tensors that this process holds whole.

    Every method returns a 0-dim tensor on the device of the first argument and does not synchronise with the host.
    `ShardedReductions` overrides `sum` and `max`, through which every other method goes.
    """

    # Whether tensors may be added up together before `sum` sees them.
    treats_all_alike = True

    def sum(self, parts: Tensor) -> Tensor:
        """Add one value per tensor, shape `(n,)`, up to a scalar."""
        return parts.sum()

    def max(self, parts: Tensor) -> Tensor:
        """The largest of one value per tensor, shape `(n,)`."""
        return parts.max()

    def norm(self, tensors: list[Tensor], order: float = 2.0) -> Tensor:
        """`||v||_order` of the concatenation `v` of all tensors, for `order` in [1, inf]."""
        dtype = accumulation_dtype(tensors)
        if order == float("inf"):  # which an empty shard does not have
            largest = [torch.linalg.vector_norm(t, order) if t.numel() else t.new_zeros(()) for t in tensors]
            return self.max(_stack([value.to(dtype) for value in largest]))
        if any(t.dtype != dtype and t.device.type == "cpu" for t in tensors):  # there norms are taken of a wider copy
            size = piece_size(tensors)
            parts = _stack([_sum_of_powers(pieces(size, t), order, dtype) for t in tensors])
        else:
            parts = _stack(torch._foreach_norm(tensors, order, dtype=dtype)) ** order
        return self.sum(parts) ** (1 / order)

    def dot(self, left: list[Tensor], right: list[Tensor], in_buckets: bool = False) -> Tensor:
        """The inner product of the concatenations of both lists."""
        dtype = accumulation_dtype(left)
        # As many operations as there are buckets, each on a copy of at most one.
        groups = buckets(left, right) if in_buckets and self.treats_all_alike else zip(left, right, strict=True)
        size = piece_size(left)
        return self.sum(_stack([_dot(_flat(a), _flat(b), dtype, size) for a, b in groups]))


class ShardedReductions(Reductions):
    """The same where each process holds a part of every tensor: one all-reduce of one number for each reduction.

    Args:
        shares (`list[Tensor]`):
            For each tensor of the lists to come one 0-dim tensor: 1 over the number of processes that hold the same
            part of it, so that what is replicated counts once.
    """

    treats_all_alike = False

    def __init__(self, shares: list[Tensor]):
        self._shares = shares

    def sum(self, parts: Tensor) -> Tensor:
        total = torch.sum(parts * torch.stack(self._shares).to(parts.dtype))
        dist.all_reduce(total)
        return total

    def max(self, parts: Tensor) -> Tensor:
        largest = parts.max()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest


def accumulation_dtype(tensors: list[Tensor]) -> torch.dtype:
    """float64 where any tensor is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _stack(scalars: list[Tensor]) -> Tensor:
    device = scalars[0].device  # a model split over several devices has scalars on each
    return torch.stack([scalar.to(device) for scalar in scalars])


def _flat(tensors: Tensor | list[Tensor]) -> Tensor:
    if isinstance(tensors, Tensor):
        return tensors.flatten()
    return torch.cat([t.flatten() for t in tensors]) if len(tensors) > 1 else tensors[0].flatten()


def _dot(left: Tensor, right: Tensor, dtype: torch.dtype, size: int) -> Tensor:
    """The inner product of two flat tensors, in `dtype`, without a copy of either as a whole."""
    if left.dtype == right.dtype == dtype:
        return torch.dot(left, right)
    products = [torch.dot(a.to(dtype), b.to(dtype)) for a, b in pieces(size, left, right)]
    return torch.stack(products).sum() if len(products) > 1 else products[0]


def _sum_of_powers(parts: Iterable[tuple[Tensor]], order: float, dtype: torch.dtype) -> Tensor:
    powers = [torch.linalg.vector_norm(part, order, dtype=dtype) ** order for (part,) in parts]
    return torch.stack(powers).sum() if len(powers) > 1 else powers[0]
