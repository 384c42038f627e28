"""Lists of tensors with the arithmetic of one vector, so that methods read like formulas."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from operator import is_
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import Parameter

from .space import Layout, Space

Scalar = float | Tensor


class _Data:
    """The tensors of one or more Vectors with different factors, and their cached norms."""

    __slots__ = ("_layout", "norms", "parameters", "shared", "space", "tensors")

    def __init__(self, parameters: Sequence[Parameter], tensors: list[Tensor], space: Space, is_shared: bool):
        self.parameters, self.tensors, self.space = tuple(parameters), tensors, space
        self.shared = [is_shared]  # a cell that a Vector and its parts share
        self.norms: dict[float, Tensor] = {}
        self._layout: Layout | None = None

    @property
    def layout(self) -> Layout:
        """The layout of its parameters."""
        if self._layout is None:
            self._layout = self.space.layout(self.parameters)
        return self._layout

    def has_same_parameters(self, other: _Data) -> bool:
        """Whether both are over the same parameters in the same order."""
        return self.has_parameters(other.parameters)

    def has_parameters(self, parameters: Sequence[Parameter]) -> bool:
        """Whether it is over these parameters in this order."""
        mine = self.parameters
        return mine is parameters or (len(mine) == len(parameters) and all(map(is_, mine, parameters)))


class Vector:
    """One tensor per parameter (this process's shards), treated as one long vector.

    - Operands are numbers, 0-dim tensors and other Vectors; parameters missing in one of two Vectors count as zero.
    - `norm` and `dot` are global: over all processes, in float32 or better. Their results stay on the device.
    - Multiplication by a scalar is lazy, and the result shares memory with the original: an in-place operation (`-=`,
      `map_`) consumes both. Values of `Step.memory` are copied first.

    Args:
        parameters (`Sequence[Parameter]`): The parameters.
        tensors (`list[Tensor]`): One local shard per parameter.
        space (`Space`, *optional*): The space in which norms are computed.
        factor (`float` or `Tensor`, *optional*): A pending factor of all tensors.
        is_shared (`bool`, *optional*, defaults to `False`): The tensors are used elsewhere and must not be overwritten.
    """

    __slots__ = ("_data", "_factor")
    __array_priority__ = 1000  # so that a number or tensor on the left defers to this class

    def __init__(
        self,
        parameters: Sequence[Parameter],
        tensors: list[Tensor],
        space: Space | None = None,
        *,
        factor: Scalar | None = None,
        is_shared: bool = False,
    ):
        self._data = _Data(parameters, tensors, space or Space(), is_shared)
        self._factor = factor

    @classmethod
    def _of(cls, data: _Data, factor: Scalar | None) -> Vector:
        vector = cls.__new__(cls)
        vector._data, vector._factor = data, factor
        return vector

    @property
    def _lists(self) -> ModuleType:
        """The list operations for its tensors."""
        return self._data.space.lists

    def _new(self, tensors: Iterable[Tensor]) -> Vector:
        return Vector(self._data.parameters, list(tensors), self._data.space)

    # --- access ------------------------------------------------------------------------------------------------------

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """The parameters."""
        return self._data.parameters

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors before multiplication by `factor`; do not change them."""
        return self._data.tensors

    @property
    def layout(self) -> Layout:
        """The layout of the parameters."""
        return self._data.layout

    @property
    def factor(self) -> Scalar | None:
        """The pending factor of the tensors; None for 1."""
        return self._factor

    @property
    def is_shared(self) -> bool:
        """Whether the tensors are used elsewhere, so that in-place operations copy them first."""
        return self._data.shared[0]

    def shares_memory_with(self, other: Vector) -> bool:
        """Whether both are multiples of the same tensors."""
        return self._data is other._data

    def share(self) -> Vector:
        """Mark the tensors as shared, so that in-place operations copy them first; return self."""
        self._data.shared[0] = True
        return self

    def view(self) -> Vector:
        """A Vector of the same tensors; if they are shared, in-place operations on one do not affect the other."""
        return Vector._of(self._data, self._factor)

    def over(self, other: Vector | Iterable[Parameter]) -> Vector:
        """The restriction to the parameters of `other`, sharing memory."""
        if not isinstance(other, Vector):
            other = list(other)
        if self._data.has_parameters(other.parameters if isinstance(other, Vector) else other):
            return self
        wanted = set(other.parameters if isinstance(other, Vector) else other)
        if wanted.issuperset(self._data.parameters):
            return self
        kept = [(p, t) for p, t in zip(self._data.parameters, self._data.tensors, strict=True) if p in wanted]
        part = Vector([p for p, _ in kept], [t for _, t in kept], self._data.space, factor=self._factor)
        part._data.shared = self._data.shared
        return part

    def widened(self, other: Vector) -> Vector:
        """Add the parameters that only `other` has, as zeros; return self."""
        self._widen(other)
        return self

    def where(self, condition: Tensor) -> Vector:
        """Self if the 0-dim `condition` holds, else with a factor of 0; does not synchronise with an accelerator."""
        if condition.device.type == "cpu" and not self._data.space.in_buckets:
            return self if condition else Vector._of(self._data, 0.0)
        factor = torch.ones_like(condition, dtype=torch.float32) if self._factor is None else self._factor
        return Vector._of(self._data, torch.where(condition, factor, 0.0))

    def __len__(self) -> int:
        return len(self._data.tensors)

    def __repr__(self) -> str:
        return f"Vector of {sum(t.numel() for t in self._data.tensors):,} numbers in {len(self)} tensors"

    def size(self) -> int:
        """Number of elements over all processes; the first call synchronises with them."""
        layout = self._data.layout
        if layout.size is None:
            layout.size = layout.reductions.count(self._data.tensors)
        return layout.size

    # --- reductions --------------------------------------------------------------------------------------------------

    def norm(self, p: float = 2.0) -> Tensor:
        """`||v||_p`, 0-dim, for p in [1, inf]."""
        data = self._data
        if p not in data.norms:
            data.norms[p] = data.layout.reductions.norm(data.tensors, p, data.space.in_buckets)
        return data.norms[p] if self._factor is None else data.norms[p] * abs(self._factor)

    def dot(self, other: Vector) -> Tensor:
        """`<v, u>`, 0-dim."""
        mine, theirs = self._data, other._data
        if mine is theirs and mine.space.in_buckets:
            product = Vector._of(mine, None).norm() ** 2  # the norm may be cached
        else:
            product = self._dot_unscaled(mine, theirs)
        for factor in (self._factor, other._factor):
            if factor is not None:
                product = product * factor
        return product

    @staticmethod
    def _dot_unscaled(mine: _Data, theirs: _Data) -> Tensor:
        left, right, in_buckets = mine.tensors, theirs.tensors, mine.space.in_buckets
        if mine.has_same_parameters(theirs):
            return mine.layout.reductions.dot(left, right, in_buckets)
        there = dict(zip(theirs.parameters, right, strict=True))
        common = [(p, t, there[p]) for p, t in zip(mine.parameters, left, strict=True) if p in there]
        if not common:
            return left[0].new_zeros((), dtype=torch.promote_types(left[0].dtype, torch.float32))
        parameters, left, right = ([entry[i] for entry in common] for i in range(3))
        return mine.space.layout(parameters).reductions.dot(left, right, in_buckets)

    # --- arithmetic --------------------------------------------------------------------------------------------------

    def clone(self) -> Vector:
        """A copy in its own memory."""
        if self._factor is not None:
            return self._new(self._multiplied())
        copy = self._new(self._lists.copies(self._data.tensors))
        copy._data.norms.update(self._data.norms)
        return copy

    def __mul__(self, other: Scalar | Vector) -> Vector:
        if isinstance(other, Vector):
            product = self.clone()
            product *= other
            return product
        return Vector._of(self._data, other if self._factor is None else self._factor * other)

    __rmul__ = __mul__

    def __truediv__(self, other: Scalar | Vector) -> Vector:
        if isinstance(other, Vector):
            quotient = self.clone()
            quotient /= other
            return quotient
        return Vector._of(self._data, 1 / other if self._factor is None else self._factor / other)

    def __neg__(self) -> Vector:
        return self * -1.0

    def __add__(self, other: Scalar | Vector) -> Vector:
        total = self.clone()
        total += other
        return total

    __radd__ = __add__

    def __sub__(self, other: Scalar | Vector) -> Vector:
        return self + -other

    def __rsub__(self, other: Scalar | Vector) -> Vector:
        return -self + other

    def __imul__(self, other: Scalar | Vector) -> Vector:
        if not isinstance(other, Vector):
            self._factor = other if self._factor is None else self._factor * other
            return self
        other = self._unaliased(other)
        self._lists.in_pairs_(torch._foreach_mul_, self._owned(), self._aligned(other))
        return self if other._factor is None else self.__imul__(other._factor)

    def __itruediv__(self, other: Scalar | Vector) -> Vector:
        if not isinstance(other, Vector):
            tensors = self._owned()
            self._lists.divide_(tensors, other)
            return self
        other = self._unaliased(other)
        self._lists.in_pairs_(torch._foreach_div_, self._owned(), self._aligned(other))
        return self if other._factor is None else self.__imul__(1 / other._factor)

    def __iadd__(self, other: Scalar | Vector) -> Vector:
        if not isinstance(other, Vector):
            tensors = self._owned()
            self._lists.add_number_(tensors, other)
            return self
        other = self._unaliased(other)
        self._widen(other)
        mine, theirs = self._owned(), other._data.tensors
        if not self._data.has_same_parameters(other._data):
            position = {p: i for i, p in enumerate(self._data.parameters)}
            mine = [mine[position[p]] for p in other._data.parameters]
        self._lists.add_(mine, theirs, other._factor)
        return self

    def __isub__(self, other: Scalar | Vector) -> Vector:
        return self.__iadd__(-other)

    # --- elementwise -------------------------------------------------------------------------------------------------

    def map(self, function: Callable[[Tensor], Tensor]) -> Vector:
        """Apply `function`, which returns a new tensor of the same shape, to each tensor."""
        return self._new(map(function, self._multiplied_out()))

    def map_(self, function: Callable[[Tensor], Tensor]) -> Vector:
        """Apply `function`, which changes a tensor in place, to each tensor."""
        for tensor in self._owned():
            function(tensor)
        return self

    def map_lists(self, function: Callable[[list[Tensor]], Sequence[Tensor]]) -> Vector:
        """As `map`, with a function of a list of tensors of one device and dtype: on an accelerator, one bucket."""
        return self._new(self._lists.map_lists(function, self._multiplied_out()))

    def map_lists_(self, function: Callable[[list[Tensor]], object]) -> Vector:
        """As `map_lists`, with a function that works in place."""
        self._lists.map_lists_(function, self._owned())
        return self

    def abs(self) -> Vector:
        """Elementwise absolute value."""
        return self._new(self._lists.each(torch._foreach_abs, self._multiplied_out()))

    def sqrt(self) -> Vector:
        """Elementwise square root."""
        return self._new(self._lists.each(torch._foreach_sqrt, self._multiplied_out()))

    def sign(self) -> Vector:
        """Elementwise sign: -1, 0 or 1."""
        return self._new(self._lists.each(torch._foreach_sign, self._multiplied_out()))

    # --- memory ------------------------------------------------------------------------------------------------------

    def _multiplied_out(self) -> list[Tensor]:
        """The tensors times the factor; do not change them."""
        return self._data.tensors if self._factor is None else self._multiplied()

    def _multiplied(self) -> list[Tensor]:
        return self._lists.multiplied(self._data.tensors, self._factor)

    def _owned(self) -> list[Tensor]:
        """The tensors times the factor, in memory that may be overwritten."""
        if self.is_shared:
            self._data, self._factor = self.clone()._data, None
        elif self._factor is not None:
            self._lists.multiply_(self._data.tensors, self._factor)
            self._factor = None
        self._data.norms.clear()
        return self._data.tensors

    def numbers(self) -> list[Tensor]:
        """The tensors multiplied by `factor`; do not change them."""
        return self._multiplied_out()

    def materialise(self) -> list[Tensor]:
        """The tensors times the factor, in the memory of this Vector unless that is shared."""
        return self._data.tensors if self._factor is None and not self.is_shared else self._owned()

    def _unaliased(self, other: Vector) -> Vector:
        """`other`, or a copy if it shares tensors to which this Vector's factor will be applied."""
        if self.is_shared or self._factor is None:  # its tensors are not changed before `other` is read
            return other
        mine = {id(t) for t in self._data.tensors}
        return other if mine.isdisjoint(map(id, other._data.tensors)) else other.clone()

    def _aligned(self, other: Vector) -> list[Tensor]:
        """The tensors of `other` for this Vector's parameters, zeros for missing ones."""
        if self._data.has_same_parameters(other._data):
            return other._data.tensors
        there = dict(zip(other._data.parameters, other._data.tensors, strict=True))
        mine = zip(self._data.parameters, self._data.tensors, strict=True)
        return [there[p] if p in there else torch.zeros_like(t) for p, t in mine]

    def _widen(self, other: Vector) -> None:
        """Add the parameters that only `other` has, as zeros."""
        if self._data.has_same_parameters(other._data):
            return
        known = set(self._data.parameters)
        extra = [
            (p, torch.zeros_like(t))
            for p, t in zip(other._data.parameters, other._data.tensors, strict=True)
            if p not in known
        ]
        if not extra:
            return
        pairs = [*zip(self._data.parameters, self._owned(), strict=True), *extra]
        position = self._data.space.position
        pairs.sort(key=lambda pair: position.get(pair[0], math.inf))
        self._data = _Data([p for p, _ in pairs], [t for _, t in pairs], self._data.space, is_shared=False)
