"""The functions of `buckets` that Vectors use, for a CPU: tensor by tensor if that keeps a tensor in the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .buckets import piece_size, pieces


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of all tensors."""
    return list(map(torch.clone, tensors))


def multiplied(tensors: list[Tensor], factor: float | Tensor) -> list[Tensor]:
    """`factor` times every tensor, in new memory."""
    if not isinstance(factor, Tensor) or all(t.device == factor.device for t in tensors):
        return list(torch._foreach_mul(tensors, factor))
    return [t * factor.to(t.device) for t in tensors]


def multiply_(tensors: list[Tensor], factor: float | Tensor) -> None:
    """The same in place."""
    for group, here in _by_device(tensors, factor):
        torch._foreach_mul_(group, here)


def divide_(tensors: list[Tensor], divisor: float | Tensor) -> None:
    """Divide in place."""
    for group, here in _by_device(tensors, divisor):
        torch._foreach_div_(group, here)


def add_number_(tensors: list[Tensor], number: float | Tensor) -> None:
    """Add a number to every entry, in place."""
    for group, here in _by_device(tensors, number):
        torch._foreach_add_(group, here)


def add_(mine: list[Tensor], theirs: list[Tensor], factor: float | Tensor | None) -> None:
    """`mine += factor * theirs`, in place."""
    if not isinstance(factor, Tensor):
        torch._foreach_add_(mine, theirs, alpha=1 if factor is None else factor)
        return
    size = piece_size(mine)
    for pair in zip(mine, theirs, strict=True):  # not addcmul in 16 bits, which would round the factor to them
        for left, right in pieces(size, *pair):
            torch._foreach_add_([left], torch._foreach_mul([right], factor.to(left.device)))


def in_pairs_(
    function: Callable[[list[Tensor], list[Tensor]], object], mine: list[Tensor], theirs: list[Tensor]
) -> None:
    """Call a function of two lists that changes the first."""
    function(mine, theirs)


def each(function: Callable[[list[Tensor]], Sequence[Tensor]], tensors: list[Tensor]) -> list[Tensor]:
    """The elementwise results of a function of a list."""
    return list(function(tensors))


def map_lists(function: Callable[[list[Tensor]], Sequence[Tensor]], tensors: list[Tensor]) -> list[Tensor]:
    """The results of a function of lists of at most one bucket each."""
    return [new for tensor in tensors for new in function([tensor])]


def map_lists_(function: Callable[[list[Tensor]], object], tensors: list[Tensor]) -> None:
    """The same in place."""
    for tensor in tensors:
        function([tensor])


def _by_device(tensors: list[Tensor], scalar: float | Tensor) -> Iterator[tuple[list[Tensor], float | Tensor]]:
    """The tensors of each device, with the scalar on that device."""
    if not isinstance(scalar, Tensor) or all(t.device == scalar.device for t in tensors):
        yield tensors, scalar
        return
    for device in dict.fromkeys(t.device for t in tensors):
        yield [t for t in tensors if t.device == device], scalar.to(device)
