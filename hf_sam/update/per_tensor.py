"""The list operations of `buckets` for the CPU: tensor by tensor where that keeps each tensor in the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .buckets import piece_size, pieces


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of all tensors."""
    return list(map(torch.clone, tensors))


def multiplied(tensors: list[Tensor], factor: float | Tensor) -> list[Tensor]:
    """`factor * t` for every tensor, in new memory."""
    if not isinstance(factor, Tensor) or all(t.device == factor.device for t in tensors):
        return list(torch._foreach_mul(tensors, factor))
    return [t * factor.to(t.device) for t in tensors]


def multiply_(tensors: list[Tensor], factor: float | Tensor) -> None:
    """Multiply in place."""
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
    for pair in zip(
        mine, theirs, strict=True
    ):  # not addcmul, which would round the factor to 16 bits for 16-bit tensors
        for left, right in pieces(size, *pair):
            torch._foreach_add_([left], torch._foreach_mul([right], factor.to(left.device)))


def in_pairs_(
    function: Callable[[list[Tensor], list[Tensor]], object], mine: list[Tensor], theirs: list[Tensor]
) -> None:
    """Call a function that changes the first of two lists in place."""
    function(mine, theirs)


def each(function: Callable[[list[Tensor]], Sequence[Tensor]], tensors: list[Tensor]) -> list[Tensor]:
    """Apply an elementwise function of a list."""
    return list(function(tensors))


def map_lists(function: Callable[[list[Tensor]], Sequence[Tensor]], tensors: list[Tensor]) -> list[Tensor]:
    """Apply a function of lists to each tensor."""
    return [new for tensor in tensors for new in function([tensor])]


def map_lists_(function: Callable[[list[Tensor]], object], tensors: list[Tensor]) -> None:
    """As `map_lists`, with a function that works in place."""
    for tensor in tensors:
        function([tensor])


def _by_device(tensors: list[Tensor], scalar: float | Tensor) -> Iterator[tuple[list[Tensor], float | Tensor]]:
    """Yield the tensors of each device with the scalar on that device."""
    if not isinstance(scalar, Tensor) or all(t.device == scalar.device for t in tensors):
        yield tensors, scalar
        return
    for device in dict.fromkeys(t.device for t in tensors):
        yield [t for t in tensors if t.device == device], scalar.to(device)
