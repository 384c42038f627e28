"""The space of Vectors: facts about their parameters that are computed once rather than in every step."""

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
# The number of lists of parameters whose constant facts a Space keeps.
_MAX_LAYOUTS = 16


class Space:
    """The space of Vectors: how norms are computed over all processes, and how tensors are processed.

    Args:
        reductions (`Callable[[Sequence[Parameter]], Reductions]`, *optional*): Returns reductions over parts of these parameters.
        order (`Sequence[Parameter]`, *optional*): The order of parameters in sums of Vectors over different ones.
        in_buckets (`bool`, *optional*, defaults to `False`): Work on whole lists, so that the number of operations does
            not grow with the number of tensors, which suits an accelerator; otherwise tensor by tensor if that keeps
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
        """Facts about a list of parameters, computed once: their memory layout, and reductions over them."""
        key = tuple(map(id, parameters))
        if key in self._layouts:
            self._layouts.move_to_end(key)
        else:
            self._layouts[key] = Layout(tuple(parameters), self.reductions(parameters))
            if len(self._layouts) > _MAX_LAYOUTS:
                self._layouts.popitem(last=False)
        return self._layouts[key]

    def changed(self, order: Sequence[Parameter]) -> None:
        """React to a change of the trained parameters."""
        self.position.update({p: i for i, p in enumerate(order)})
        self._layouts.clear()


class Layout:
    """The memory layout of a list of parameters, and reductions over it.

    Args:
        parameters (`tuple[Parameter, ...]`): The list.
        reductions (`Reductions`): Reductions over one tensor for each parameter.

    Attributes:
        size (`int`, *optional*): How many numbers they have over all processes, once computed.
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
        """This process's part of each parameter, sharing its memory."""
        self._refresh()
        return self._weights

    @property
    def alias_groups(self) -> list[int]:
        """For each parameter, how many earlier ones it shares memory with; those with equal numbers do not overlap."""
        self._refresh()
        if not self._alias_groups:
            self._alias_groups = alias_groups(self._weights)
        return self._alias_groups

    def groups(self, tensors: list[Tensor]) -> list[list[int]]:
        """Buckets of the weights and of one further tensor for each of them, without weights that share memory."""
        dtypes = {*map(_dtype, tensors)}
        key = dtypes.pop() if len(dtypes) == 1 else tuple(map(_dtype, tensors))
        weights, apart = self.weights, self.alias_groups
        if key not in self._groups:
            most = buckets.bucket_bytes(weights)
            self._groups[key] = buckets.grouped(weights, tensors, max_bytes=most, apart=apart)
        return self._groups[key]

    def _refresh(self) -> None:
        """Update the layout if weights have moved in memory."""
        weights = self.parameters if self._are_whole else [local(p) for p in self.parameters]
        addresses = list(map(Tensor.data_ptr, weights))
        if not self._weights or addresses != self._addresses:
            self._addresses, self._alias_groups, self._groups = addresses, [], {}
            self._weights = [local(p) for p in self.parameters] if self._are_whole else weights


def alias_groups(tensors: Sequence[Tensor]) -> list[int]:
    """A number for each tensor that differs from those of tensors sharing memory with it; 0 if none does."""
    found = [0] * len(tensors)
    spans = sorted((t.data_ptr(), t.data_ptr() + _extent(t), i) for i, t in enumerate(tensors) if t.numel())
    open_until: list[tuple[int, int]] = []  # ends of the spans that reach beyond the current start, and their numbers
    for start, end, i in spans:
        open_until = [(until, number) for until, number in open_until if until > start]
        taken = {number for _, number in open_until}
        found[i] = next(n for n in range(len(taken) + 1) if n not in taken)
        open_until.append((end, found[i]))
    return found


def _extent(tensor: Tensor) -> int:
    """The span of bytes from the first to the last number."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (sum((size - 1) * stride for size, stride in steps) + 1) * tensor.element_size()
