"""Lists of tensors in groups that are worked on together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor

# Temporary copies are made of this much at a time, counted in float32.
BUCKET_BYTES = 64 * 2**20
# A bucket is at most this share of a list, so that three temporary copies of it are less than the list: in a model of a few
# tens of millions of weights 64 MiB are most of them.
BUCKET_SHARE = 4
# A piece of a tensor, copied to a wider type, is of this share of a list, but no less than this many numbers.
PIECE_SHARE, SMALLEST_PIECE = 32, 2**12


def buckets(*lists: Sequence[Tensor]) -> Iterator[tuple[list[Tensor], ...]]:
    """The same groups of every list: of one device and type each, and at most `BUCKET_BYTES` and a quarter of the first one."""
    most = min(BUCKET_BYTES, max(4 * sum(t.numel() for t in lists[0]) // BUCKET_SHARE, 4 * SMALLEST_PIECE))
    groups: dict[tuple, list[int]] = {}
    sizes: dict[tuple, int] = {}

    def group(indices: list[int]) -> tuple[list[Tensor], ...]:
        return tuple([tensors[i] for i in indices] for tensors in lists)

    for i, tensor in enumerate(lists[0]):
        key = (tensor.device, *(tensors[i].dtype for tensors in lists))
        size = 4 * tensor.numel()
        if key in groups and sizes[key] + size > most:
            yield group(groups.pop(key))
            sizes[key] = 0
        groups.setdefault(key, []).append(i)
        sizes[key] = sizes.get(key, 0) + size
    yield from map(group, groups.values())


def piece_size(tensors: Iterable[Tensor], share: int = PIECE_SHARE) -> int:
    """How many numbers of these tensors may be copied at a time, for all copies to be small beside the whole."""
    share = sum(t.numel() for t in tensors) // share
    return min(max(share, SMALLEST_PIECE), BUCKET_BYTES // 4)


def pieces(size: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of tensors of one shape, cut alike along their first dimension into parts of about `size` numbers."""
    numel = tensors[0].numel()
    if numel <= size or not tensors[0].dim():
        yield tensors
        return
    rows = max(1, size * len(tensors[0]) // numel)
    yield from zip(*(t.split(rows) for t in tensors), strict=True)
