"""Norms and inner products over all parameters, in float32 or better, without synchronising with the device."""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter

import torch
import torch.distributed as dist
from torch import Tensor

from . import buckets

_dtype, _device = attrgetter("dtype"), attrgetter("device")


class Reductions:
    """Norms and inner products of lists of tensors that this process holds completely.

    Methods return 0-dim tensors on the device of the first argument and do not synchronise with the host.
    `ShardedReductions` overrides `sum` and `max`, which all other methods use.
    """

    def sum(self, parts: Tensor) -> Tensor:
        """Sum one value per tensor, shape `(n,)`, to a scalar."""
        return parts.sum()

    def max(self, parts: Tensor) -> Tensor:
        """Maximum of one value per tensor, shape `(n,)`."""
        return parts.max()

    def norm(self, tensors: list[Tensor], order: float = 2.0, in_buckets: bool = False) -> Tensor:
        """`||v||_order` of the concatenation `v` of all tensors, for `order` in [1, inf]."""
        dtype = accumulation_dtype(tensors)
        if in_buckets:
            return self.combine_norms(stack_scalars(buckets.norms(tensors, order, dtype)), order)
        if order == float("inf"):  # an empty shard has no maximum
            parts = stack_scalars(
                [
                    torch.linalg.vector_norm(t, order).to(dtype) if t.numel() else t.new_zeros((), dtype=dtype)
                    for t in tensors
                ]
            )
        elif any(t.dtype != dtype and t.device.type == "cpu" for t in tensors):
            # The CPU kernel would make a wider copy of each whole tensor.
            size = buckets.piece_size(tensors)
            parts = stack_scalars([_norm_of_pieces(buckets.pieces(size, t), order, dtype) for t in tensors])
        else:
            parts = stack_scalars(torch._foreach_norm(tensors, order, dtype=dtype))
        return self.max(parts) if order == float("inf") else self.sum(parts**order) ** (1 / order)

    def combine_norms(self, norms: Tensor, order: float) -> Tensor:
        """The global norm from the norms of the tensors, shape `(n,)`."""
        return torch.linalg.vector_norm(norms, order)

    def dot(self, left: list[Tensor], right: list[Tensor], in_buckets: bool = False) -> Tensor:
        """The inner product of the concatenations of two lists."""
        dtype = accumulation_dtype(left)
        if in_buckets:
            return self.sum(stack_scalars(buckets.dots(left, right, dtype)))
        size = buckets.piece_size(left)
        pairs = zip(left, right, strict=True)
        return self.sum(stack_scalars([_dot(a.flatten(), b.flatten(), dtype, size) for a, b in pairs]))

    def count(self, tensors: list[Tensor]) -> int:
        """Number of elements over all processes."""
        return sum(t.numel() for t in tensors)


class ShardedReductions(Reductions):
    """Reductions of sharded tensors: each takes one all-reduce of a scalar.

    Args:
        shares (`list[Tensor]`):
            One 0-dim tensor per tensor of the lists: 1 over the number of processes that hold the same shard, so that
            replicated shards count once.
    """

    def __init__(self, shares: list[Tensor]):
        self._shares = torch.stack(shares)

    def sum(self, parts: Tensor) -> Tensor:
        total = torch.sum(parts * self._shares.to(parts.dtype))
        dist.all_reduce(total)
        return total

    def max(self, parts: Tensor) -> Tensor:
        largest = parts.max()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest

    def combine_norms(self, norms: Tensor, order: float) -> Tensor:
        return self.max(norms) if order == float("inf") else self.sum(norms**order) ** (1 / order)

    def count(self, tensors: list[Tensor]) -> int:
        """Number of elements over all processes; synchronises with them."""
        counts = torch.tensor([t.numel() for t in tensors], dtype=torch.float64, device=self._shares.device)
        return int(self.sum(counts).item())


def accumulation_dtype(tensors: list[Tensor]) -> torch.dtype:
    """float64 if any tensor has it, else float32."""
    return torch.float64 if torch.float64 in map(_dtype, tensors) else torch.float32


def stack_scalars(scalars: list[Tensor]) -> Tensor:
    """One 1-dim tensor from 0-dim tensors, on the device of the first."""
    device = scalars[0].device
    if len({*map(_device, scalars)}) > 1:  # the model is split over several devices
        scalars = [scalar.to(device) for scalar in scalars]
    return torch.stack(scalars)


def _dot(left: Tensor, right: Tensor, dtype: torch.dtype, size: int) -> Tensor:
    """The inner product of two flat tensors, in `dtype`, without a full copy of either."""
    if left.dtype == right.dtype == dtype:
        return torch.dot(left, right)
    products = [torch.dot(a.to(dtype), b.to(dtype)) for a, b in buckets.pieces(size, left, right)]
    return torch.stack(products).sum() if len(products) > 1 else products[0]


def _norm_of_pieces(parts: Iterable[tuple[Tensor]], order: float, dtype: torch.dtype) -> Tensor:
    norms = [torch.linalg.vector_norm(part, order, dtype=dtype) for (part,) in parts]
    return torch.linalg.vector_norm(torch.stack(norms), order) if len(norms) > 1 else norms[0]
