"""Lists of tensors in groups that are worked on together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

# Temporary copies are made of this much at a time, counted in float32.
BUCKET_BYTES = 64 * 2**20


def buckets(*lists: Sequence[Tensor]) -> Iterator[tuple[list[Tensor], ...]]:
    """The same groups of every list: of one device and type each, and at most `BUCKET_BYTES` of the first one."""
    groups: dict[tuple, list[int]] = {}
    sizes: dict[tuple, int] = {}

    def group(indices: list[int]) -> tuple[list[Tensor], ...]:
        return tuple([tensors[i] for i in indices] for tensors in lists)

    for i, tensor in enumerate(lists[0]):
        key = (tensor.device, *(tensors[i].dtype for tensors in lists))
        size = 4 * tensor.numel()
        if key in groups and sizes[key] + size > BUCKET_BYTES:
            yield group(groups.pop(key))
            sizes[key] = 0
        groups.setdefault(key, []).append(i)
        sizes[key] = sizes.get(key, 0) + size
    yield from map(group, groups.values())
