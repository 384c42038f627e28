"""Operations on lists of tensors with one kernel launch per bucket, whatever the number of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from operator import attrgetter

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

# Maximum size of a temporary copy, counted in float32.
BUCKET_BYTES = 64 * 2**20
# A bucket holds at most 1/BUCKET_SHARE of a list, since 64 MiB are most of a small model, but at least SMALLEST_BUCKET.
BUCKET_SHARE, SMALLEST_BUCKET = 4, 2**16
# A piece, copied to a wider dtype, holds 1/PIECE_SHARE of the elements of a list, but at least SMALLEST_PIECE.
PIECE_SHARE, SMALLEST_PIECE = 32, 2**12
# Devices and dtypes for which the fused SGD kernel adds a multiple to a whole list; it reads the factor and a flag that
# disables it on the device. (On the CPU it skips most of a 16-bit tensor; elsewhere its factor is float32.)
_FUSED = {
    "cpu": (torch.float32, torch.float64),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}

# Tensor sizes on which the kernel is tested: below and above the SIMD width, and not multiples of it.
_PROBE_SIZES = (1, 7, 1000, 4099)

_dtype, _device = attrgetter("dtype"), attrgetter("device")


# --- grouping --------------------------------------------------------------------------------------------------------


def grouped(*lists: Sequence[Tensor], max_bytes: int | None = None, apart: Sequence[int] = ()) -> list[list[int]]:
    """Group the indices of the lists such that each group has one device and one dtype per list.

    Args:
        max_bytes (`int`, *optional*): Maximum size of a group in the first list, counted in float32.
        apart (`Sequence[int]`, *optional*): A label per tensor; tensors with different labels are kept apart.
    """
    first = lists[0]
    if not first:
        return []
    sizes = [] if max_bytes is None else [4 * t.numel() for t in first]
    is_alike = not any(apart) and all(len({*map(_dtype, ts)}) == 1 == len({*map(_device, ts)}) for ts in lists)
    if is_alike and (max_bytes is None or sum(sizes) <= max_bytes):
        return [list(range(len(first)))]
    groups: dict[tuple, list[int]] = {}
    filled: dict[tuple, int] = {}
    complete = []
    for i, tensor in enumerate(first):
        key = (tensor.device, *(tensors[i].dtype for tensors in lists), apart[i] if apart else 0)
        if max_bytes is not None:
            if key in groups and filled[key] + sizes[i] > max_bytes:
                complete.append(groups.pop(key))
                filled[key] = 0
            filled[key] = filled.get(key, 0) + sizes[i]
        groups.setdefault(key, []).append(i)
    return [*complete, *groups.values()]


def buckets(*lists: Sequence[Tensor]) -> Iterator[tuple[list[Tensor], ...]]:
    """Yield corresponding buckets of all lists, of one device and dtype each, limited by the size of the first list."""
    for group in grouped(*lists, max_bytes=bucket_bytes(lists[0])):
        yield tuple(pick(tensors, group) for tensors in lists)


def bucket_bytes(tensors: Iterable[Tensor]) -> int:
    """Maximum bytes of a bucket, counted in float32: a few copies of it are small compared with all tensors."""
    return min(BUCKET_BYTES, max(4 * sum(map(Tensor.numel, tensors)) // BUCKET_SHARE, SMALLEST_BUCKET))


def piece_size(tensors: Iterable[Tensor], share: int = PIECE_SHARE) -> int:
    """Number of elements to copy at a time, such that the copies are small compared with all tensors."""
    share = sum(map(Tensor.numel, tensors)) // share
    return min(max(share, SMALLEST_PIECE), BUCKET_BYTES // 4)


def pieces(size: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield views of equally shaped tensors, split along the first dimension into pieces of about `size` elements."""
    numel = tensors[0].numel()
    if numel <= size or not tensors[0].dim():
        yield tensors
        return
    rows = max(1, size * len(tensors[0]) // numel)
    yield from zip(*(t.split(rows) for t in tensors), strict=True)


def pick(entries: Sequence, group: list[int]) -> list:
    """The entries at the sorted indices of a group."""
    return list(entries) if len(group) == len(entries) else [entries[i] for i in group]


def for_each(
    function: Callable[..., Sequence[Tensor]], *lists: Sequence[Tensor], max_bytes: int | None = None
) -> list[Tensor]:
    """Apply `function` to each group of the lists and return the results in the order of the lists."""
    groups = grouped(*lists, max_bytes=max_bytes)
    if len(groups) == 1:
        return list(function(*map(list, lists)))
    made: list[Tensor] = [None] * len(lists[0])
    for group in groups:
        for i, tensor in zip(group, function(*(pick(tensors, group) for tensors in lists)), strict=True):
            made[i] = tensor
    return made


def flattened(tensors: list[Tensor]) -> Tensor:
    """A bucket as one 1-dim tensor, copied unless it is a single tensor."""
    return tensors[0].reshape(-1) if len(tensors) == 1 else _flatten_dense_tensors(tensors)


def in_float32(tensors: list[Tensor]) -> list[Tensor]:
    """A bucket in float32 or better, copied only if it has 16 bits; do not change it."""
    exact = torch.promote_types(tensors[0].dtype, torch.float32)
    if tensors[0].dtype == exact:
        return tensors
    return list(_unflatten_dense_tensors(flattened(tensors).to(exact), tensors))


# --- arithmetic ------------------------------------------------------------------------------------------------------


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of all tensors."""
    return for_each(lambda group: torch._foreach_mul(group, 1), tensors)


def multiplied(tensors: Sequence[Tensor], factor: float | Tensor) -> list[Tensor]:
    """`factor * t` for every tensor, in new memory, rounded once."""

    def one_group(group: list[Tensor]) -> Sequence[Tensor]:
        if isinstance(factor, Tensor) and group[0].dtype.itemsize == 2:
            return multiply_(torch._foreach_mul(group, 1), factor)
        return torch._foreach_mul(group, _scalar_like(group[0], factor))

    return for_each(one_group, tensors)


def multiply_(tensors: list[Tensor], factor: float | Tensor) -> list[Tensor]:
    """Multiply in place."""
    for group in (pick(tensors, indices) for indices in grouped(tensors)):
        if isinstance(factor, Tensor) and group[0].dtype.itemsize == 2:
            # The kernel of gradient scalers keeps the factor in float32; a 16-bit product would round it.
            unused = torch.zeros((), device=group[0].device)
            scale = factor.to(group[0].device, torch.float32)
            torch._amp_foreach_non_finite_check_and_unscale_(group, unused, scale)
        else:
            torch._foreach_mul_(group, _scalar_like(group[0], factor))
    return tensors


def add_number_(tensors: list[Tensor], number: float | Tensor) -> None:
    """Add a number to every entry, in place."""
    for group in (pick(tensors, indices) for indices in grouped(tensors)):
        if isinstance(number, Tensor):  # `torch._foreach_add_` would read it on the host
            torch.ops.aten._foreach_add_.Tensor(group, _scalar_like(group[0], number))
        else:
            torch._foreach_add_(group, number)


def add_(mine: list[Tensor], theirs: list[Tensor], factor: float | Tensor | None) -> None:
    """`mine += factor * theirs`, in place."""
    for left, right in buckets(mine, theirs):
        if isinstance(factor, Tensor):
            add_multiple_(left, right, factor)
        else:
            torch._foreach_add_(left, right, alpha=1 if factor is None else factor)


def divide_(tensors: list[Tensor], divisor: float | Tensor) -> None:
    """Divide in place."""
    for group in (pick(tensors, indices) for indices in grouped(tensors)):
        if isinstance(divisor, Tensor) and group[0].dtype.itemsize == 2:
            multiply_(group, 1 / divisor.float())
        else:
            torch._foreach_div_(group, _scalar_like(group[0], divisor))


def add_multiple_(
    mine: list[Tensor],
    theirs: list[Tensor],
    factor: float | Tensor,
    unless: Tensor | None = None,
    rounded: Callable[[Tensor, torch.dtype], Tensor] | None = None,
) -> None:
    """`mine += factor * theirs` for one bucket, computed in float32 or better, without synchronising with the device.

    Args:
        unless (`Tensor`, *optional*): A 0-dim flag; if it is 1, nothing is added even if `theirs` has NaNs.
        rounded (`Callable`, *optional*): Rounds sums to the dtype of `mine`; the default is round-to-nearest.
    """
    weight = mine[0]
    exact = torch.promote_types(weight.dtype, torch.float32)
    if not isinstance(factor, Tensor):
        factor = torch.full((), factor, dtype=exact, device=weight.device)
    factor = factor.to(weight.device, exact)
    rounds = rounded is not None and weight.dtype != exact
    if not rounds and _have_same_layout(mine, theirs):
        # The fused SGD kernel, maximising: one launch for the list, which reads factor and flag on the device.
        _add_fused_(mine, theirs, factor, None if unless is None else unless.to(weight.device, torch.float32))
        return
    if len(mine) == 1 and weight.numel() > 4 * SMALLEST_PIECE:  # float32 copies take twice the memory
        parts = list(pieces(max(SMALLEST_PIECE, weight.numel() // (64 if rounds else 16)), weight, theirs[0]))
    else:
        parts = []
    if len(parts) > 1:
        for part, along in parts:
            add_multiple_([part], [along], factor, unless, rounded)
        return
    change = flattened(theirs).to(exact) * factor
    if unless is not None:
        change = torch.where(unless.to(weight.device).bool(), torch.zeros_like(change), change)
    total = change.add_(flattened(mine))
    total = rounded(total, weight.dtype) if rounds else total.to(weight.dtype)
    torch._foreach_copy_(mine, _unflatten_dense_tensors(total, mine))


def _add_fused_(mine: list[Tensor], theirs: list[Tensor], factor: Tensor, unless: Tensor | None) -> None:
    torch._fused_sgd_(
        mine,
        theirs,
        [],
        weight_decay=0.0,
        momentum=0.0,
        lr=factor,
        dampening=0.0,
        nesterov=False,
        maximize=True,
        is_first_step=False,
        grad_scale=None,
        found_inf=unless,
    )


def _scalar_like(tensor: Tensor, factor: float | Tensor) -> float | Tensor:
    return factor.to(tensor.device, tensor.dtype) if isinstance(factor, Tensor) else factor


def _have_same_layout(mine: list[Tensor], theirs: list[Tensor]) -> bool:
    """Whether the fused kernel applies: both lists of the bucket have the same dtype and dense memory layout."""
    if mine[0].dtype != theirs[0].dtype or mine[0].dtype not in _FUSED.get(mine[0].device.type, ()):
        return False
    if not _fused_kernel_is_correct(mine[0].device, mine[0].dtype):
        return False
    if all(map(Tensor.is_contiguous, mine)) and all(map(Tensor.is_contiguous, theirs)):
        return True
    return all(a.stride() == b.stride() and is_dense(a) for a, b in zip(mine, theirs, strict=True))


@cache
def _fused_kernel_is_correct(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the fused kernel updates every element for all probe sizes; tested once, which synchronises once."""
    tensors = [torch.ones(size, device=device, dtype=dtype) for size in _PROBE_SIZES]
    _add_fused_(tensors, [tensor.clone() for tensor in tensors], torch.full((), 2.0, device=device), None)
    return all(bool((tensor == 3).all()) for tensor in tensors)


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a contiguous range of memory without overlap."""
    if tensor.is_contiguous():
        return True
    steps = [(size - 1, stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
    return all(stride > 0 for _, stride in steps) and sum(n * s for n, s in steps) + 1 == tensor.numel()


# --- functions of lists ----------------------------------------------------------------------------------------------


def in_pairs_(
    function: Callable[[list[Tensor], list[Tensor]], object], mine: list[Tensor], theirs: list[Tensor]
) -> None:
    """Call a function that changes the first of two lists in place, once per dtype and device."""
    for group in grouped(mine, theirs):
        function(pick(mine, group), pick(theirs, group))


def each(function: Callable[[list[Tensor]], Sequence[Tensor]], tensors: list[Tensor]) -> list[Tensor]:
    """Apply an elementwise function of a list, once per dtype and device."""
    return for_each(function, tensors)


def map_lists(function: Callable[[list[Tensor]], Sequence[Tensor]], tensors: list[Tensor]) -> list[Tensor]:
    """Apply a function of lists, once per bucket."""
    return for_each(function, tensors, max_bytes=BUCKET_BYTES)


def map_lists_(function: Callable[[list[Tensor]], object], tensors: list[Tensor]) -> None:
    """As `map_lists`, with a function that works in place."""
    for (bucket,) in buckets(tensors):
        function(bucket)


# --- one scalar per tensor -------------------------------------------------------------------------------------------


def norms(tensors: Sequence[Tensor], order: float, dtype: torch.dtype) -> list[Tensor]:
    """`||t||_order` of each tensor, 0-dim; 0 for an empty tensor."""

    def one_group(group: list[Tensor]) -> list[Tensor]:
        is_widened = order in (1, 2) and group[0].device.type == "cpu" and group[0].dtype != dtype
        if is_widened and any(t.numel() > 4 * SMALLEST_PIECE for t in group):  # the CPU computes it from a wider copy
            return [_norm(t, order, dtype) for t in group]
        if order in (1, 2, float("inf")):
            return torch._foreach_norm(group, order, dtype=dtype)
        powers = torch._foreach_abs(in_float32(group))  # there is no list kernel for other orders
        torch._foreach_pow_(powers, order)
        return torch._foreach_pow(torch._foreach_norm(powers, 1, dtype=dtype), 1 / order)

    filled = [t for t in tensors if t.numel()]
    max_bytes = None if order in (1, 2, float("inf")) else BUCKET_BYTES
    found = for_each(one_group, filled, max_bytes=max_bytes) if filled else []
    if len(filled) == len(tensors):
        return found
    of_filled = iter(found)
    return [next(of_filled) if t.numel() else t.new_zeros((), dtype=dtype) for t in tensors]


def _norm(tensor: Tensor, order: float, dtype: torch.dtype) -> Tensor:
    size = max(4 * SMALLEST_PIECE, tensor.numel() // PIECE_SHARE)
    parts = [torch.linalg.vector_norm(part, order, dtype=dtype) for (part,) in pieces(size, tensor)]
    return torch.linalg.vector_norm(torch.stack(parts), order) if len(parts) > 1 else parts[0]


def dots(left: Sequence[Tensor], right: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The inner product of each pair, 0-dim, computed in float32 or better.

    torch has list kernels for norms but not for sums, so with products `x`: `sum x = 2 sum max(x, 0) - sum |x|`.
    """

    def one_group(a: list[Tensor], b: list[Tensor]) -> Sequence[Tensor]:
        products = torch._foreach_mul(in_float32(a), in_float32(b))
        sizes = norms(products, 1, dtype)
        torch._foreach_clamp_min_(products, 0.0)
        positive = norms(products, 1, dtype)
        torch._foreach_mul_(positive, 2.0)
        torch._foreach_sub_(positive, sizes)
        return positive

    return for_each(one_group, left, right, max_bytes=BUCKET_BYTES)
