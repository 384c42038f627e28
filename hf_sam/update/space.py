"""The space of Vectors: properties of their parameters that are computed once and reused in every step."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from . import buckets, per_tensor
from .parameters import is_whole, local
from .reductions import Reductions

_dtype = attrgetter("dtype")
# Maximum number of cached layouts.
_MAX_LAYOUTS = 16


class Space:
    """The space of Vectors: reductions over all processes, and operations on lists of tensors.

    Args:
        reductions (`Callable[[Sequence[Parameter]], Reductions]`, *optional*): Returns the reductions over a list of
            parameters.
        order (`Sequence[Parameter]`, *optional*): The order of parameters in sums of Vectors over different
            parameters.
        in_buckets (`bool`, *optional*, defaults to `False`): Work on whole lists, so that the number of kernel launches
            does not grow with the number of tensors (for accelerators); otherwise tensor by tensor where that keeps
            them in the CPU's cache.
    """

    def __init__(
        self,
        reductions: Callable[[Sequence[Parameter]], Reductions] = lambda parameters: Reductions(),
        order: Sequence[Parameter] = (),
        in_buckets: bool = False,
    ):
        self.reductions = reductions
        self.position = {p: i for i, p in enumerate(order)}
        self.in_buckets = in_buckets
        self.lists = buckets if in_buckets else per_tensor
        self._layouts: OrderedDict[tuple[int, ...], Layout] = OrderedDict()

    def layout(self, parameters: Sequence[Parameter]) -> Layout:
        """The memory layout of a list of parameters and the reductions over it, cached."""
        key = tuple(map(id, parameters))
        if key in self._layouts:
            self._layouts.move_to_end(key)
        else:
            self._layouts[key] = Layout(tuple(parameters), self.reductions(parameters))
            if len(self._layouts) > _MAX_LAYOUTS:
                self._layouts.popitem(last=False)
        return self._layouts[key]

    def changed(self, order: Sequence[Parameter]) -> None:
        """Update the order after the trained parameters have changed, and clear the cache."""
        self.position.update({p: i for i, p in enumerate(order)})
        self._layouts.clear()


class Layout:
    """The memory layout of a list of parameters, and the reductions over it.

    Args:
        parameters (`tuple[Parameter, ...]`): The list.
        reductions (`Reductions`): Reductions over one tensor per parameter.

    Attributes:
        size (`int`, *optional*): Number of elements over all processes, once computed.
    """

    def __init__(self, parameters: tuple[Parameter, ...], reductions: Reductions):
        self.parameters, self.reductions = parameters, reductions
        self.size: int | None = None
        self._are_whole = all(map(is_whole, parameters))
        self._weights: list[Tensor] = []
        self._addresses: list[int] = []
        self._alias_groups: list[int] = []
        self._groups: dict[Any, list[list[int]]] = {}

    @property
    def weights(self) -> list[Tensor]:
        """This process's shard of each parameter, sharing its memory."""
        self._refresh()
        return self._weights

    @property
    def alias_groups(self) -> list[int]:
        """A label per parameter such that parameters with equal labels do not share memory."""
        self._refresh()
        if not self._alias_groups:
            self._alias_groups = alias_groups(self._weights)
        return self._alias_groups

    def groups(self, tensors: list[Tensor]) -> list[list[int]]:
        """Buckets of the weights and one further tensor per weight, none of which holds weights that share memory."""
        dtypes = {*map(_dtype, tensors)}
        key = dtypes.pop() if len(dtypes) == 1 else tuple(map(_dtype, tensors))
        weights, apart = self.weights, self.alias_groups
        if key not in self._groups:
            most = buckets.bucket_bytes(weights)
            self._groups[key] = buckets.grouped(weights, tensors, max_bytes=most, apart=apart)
        return self._groups[key]

    def _refresh(self) -> None:
        """Recompute the layout if weights have moved in memory."""
        weights = self.parameters if self._are_whole else [local(p) for p in self.parameters]
        addresses = list(map(Tensor.data_ptr, weights))
        if not self._weights or addresses != self._addresses:
            self._addresses, self._alias_groups, self._groups = addresses, [], {}
            self._weights = [local(p) for p in self.parameters] if self._are_whole else weights


def alias_groups(tensors: Sequence[Tensor]) -> list[int]:
    """A label per tensor, different for tensors that share memory; 0 for tensors that share none."""
    found = [0] * len(tensors)
    spans = sorted((t.data_ptr(), t.data_ptr() + _extent(t), i) for i, t in enumerate(tensors) if t.numel())
    open_until: list[tuple[int, int]] = []  # ends of spans that reach beyond the current start, and their labels
    for start, end, i in spans:
        open_until = [(until, label) for until, label in open_until if until > start]
        taken = {label for _, label in open_until}
        found[i] = next(n for n in range(len(taken) + 1) if n not in taken)
        open_until.append((end, found[i]))
    return found


def _extent(tensor: Tensor) -> int:
    """Bytes from the first to the last element."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (sum((size - 1) * stride for size, stride in steps) + 1) * tensor.element_size()
