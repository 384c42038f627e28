"""Where Vectors live, and what is known of their parameters beside numbers: found once rather than in every step."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import Tensor
from torch.nn import Parameter

from . import buckets, singly
from .parameters import is_whole, local
from .reductions import Reductions

# Of so many lists of parameters a Space knows what does not change from step to step.
_MOST_KNOWN = 16


class Space:
    """Where Vectors live: how norms are taken over all processes, and how tensors are best worked on.

    Args:
        reductions (`Callable[[Sequence[Parameter]], Reductions]`, *optional*): Reductions over parts of these parameters.
        order (`Sequence[Parameter]`, *optional*): In which sums of Vectors over different parameters are sorted.
        in_buckets (`bool`, *optional*, defaults to `False`): Work on whole lists, so that the number of operations does
            not grow with the number of tensors, as an accelerator wants it; otherwise tensor by tensor where that
            keeps them in the CPU's cache.
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
        self.lists = buckets if in_buckets else singly
        self._layouts: OrderedDict[tuple[int, ...], Layout] = OrderedDict()

    def layout(self, parameters: Sequence[Parameter]) -> Layout:
        """What is known of a list of parameters, found once: how they lie in memory, and reductions over them."""
        key = tuple(map(id, parameters))
        if key in self._layouts:
            self._layouts.move_to_end(key)
        else:
            self._layouts[key] = Layout(tuple(parameters), self.reductions(parameters))
            if len(self._layouts) > _MOST_KNOWN:
                self._layouts.popitem(last=False)
        return self._layouts[key]

    def changed(self, order: Sequence[Parameter]) -> None:
        """Other parameters train than before."""
        self.position.update({p: i for i, p in enumerate(order)})
        self._layouts.clear()


class Layout:
    """How a list of parameters lies in memory, and how sums over it are taken.

    Args:
        parameters (`tuple[Parameter, ...]`): The list.
        reductions (`Reductions`): Over one tensor for each of them.

    Attributes:
        size (`int`, *optional*): How many numbers they have over all processes, where that has been asked.
    """

    def __init__(self, parameters: tuple[Parameter, ...], reductions: Reductions):
        self.parameters, self.reductions = parameters, reductions
        self.size: int | None = None
        self._are_whole = all(map(is_whole, parameters))
        self._weights: list[Tensor] = []
        self._addresses: list[int] = []
        self._turns: list[int] = []

    @property
    def weights(self) -> list[Tensor]:
        """This process's part of each parameter, sharing its memory."""
        self._look()
        return self._weights

    @property
    def turns(self) -> list[int]:
        """For each parameter how many earlier ones it shares memory with: none of two with one number do."""
        self._look()
        if not self._turns:
            self._turns = turns(self._weights)
        return self._turns

    def _look(self) -> None:
        """Notice weights that lie elsewhere than they did."""
        weights = self.parameters if self._are_whole else [local(p) for p in self.parameters]
        addresses = list(map(Tensor.data_ptr, weights))
        if not self._weights or addresses != self._addresses:
            self._addresses, self._turns = addresses, []
            self._weights = [local(p) for p in self.parameters] if self._are_whole else weights


def turns(tensors: Sequence[Tensor]) -> list[int]:
    """For each tensor a number that no other one has that shares memory with it; 0 where none does."""
    found = [0] * len(tensors)
    spans = sorted((t.data_ptr(), t.data_ptr() + _extent(t), i) for i, t in enumerate(tensors) if t.numel())
    open_until: list[tuple[int, int]] = []  # the ends of spans that reach beyond the present start, and their numbers
    for start, end, i in spans:
        open_until = [(until, number) for until, number in open_until if until > start]
        taken = {number for _, number in open_until}
        found[i] = next(n for n in range(len(taken) + 1) if n not in taken)
        open_until.append((end, found[i]))
    return found


def _extent(tensor: Tensor) -> int:
    """Bytes from the first to the last number."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (sum((size - 1) * stride for size, stride in steps) + 1) * tensor.element_size()
