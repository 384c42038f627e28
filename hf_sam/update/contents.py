"""Snapshots of mutable values: containers, arrays, random generators, closures and objects of custom classes."""

from __future__ import annotations

import collections
import functools
import random
import sys
from collections.abc import Iterable, Iterator, Sequence, Set
from itertools import chain
from operator import attrgetter
from types import CellType, FunctionType, MemberDescriptorType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer

from .namespaces import are_identical

_CONTAINERS = (list, dict, set, collections.deque)
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
# Objects of these packages are not inspected, only those of other (custom) classes. In the standard library, they are
# queues, threads and files, which other threads use at the same time; the exceptions hold a user's data.
_LIBRARIES = (sys.stdlib_module_names - {"argparse", "collections", "types"}) | {
    "PIL",
    "accelerate",
    "datasets",
    "hf_sam",
    "mlflow",
    "numpy",
    "pandas",
    "peft",
    "safetensors",
    "tensorboardX",
    "tokenizers",
    "torch",
    "tqdm",
    "transformers",
    "trl",
    "wandb",
}
_MAX_DEPTH = 4
# A container with more entries than this counts as data, not state.
_MAX_ENTRIES = 10_000
_version = attrgetter("_version")
# Immutable types.
_ATOMS = frozenset([str, int, float, bool, type(None), bytes])


class Contents:
    """A recursive snapshot of the contents of a value.

    Args:
        value (`Any`): A value for which `is_mutable` holds.
        is_deep (`bool`): Also copy the tensors and arrays inside, which may change in place.
        left_alone (`Set[int]`, *optional*): Addresses of tensors that are not part of the snapshot.
    """

    def __init__(self, value: Any, is_deep: bool, left_alone: Set[int] = frozenset(), depth: int = 0):
        self.value, self.is_deep = value, is_deep
        self._is_generator = is_generator(value)
        self._is_data = not self._is_generator and isinstance(value, Tensor | np.ndarray)
        self._copy: Any = None
        self._keys: list[Any] = []
        self._values: list[Any] = []
        self._inner: list[Contents] = []
        if self._is_generator:
            self._copy = _state_of(value)
        elif isinstance(value, Tensor):
            self._version = value._version
            self._copy = value.detach().clone() if is_deep else None
        elif isinstance(value, np.ndarray):
            self._copy = value.copy() if is_deep else None
        else:
            self._keys, self._values = _keys_and_values(value)
            if depth < _MAX_DEPTH:
                inner = (v for v in self._values if _may_change(v) and address(v) not in left_alone and not is_data(v))
                self._inner = [Contents(v, is_deep, left_alone, depth + 1) for v in inner]

    def has_changed(self) -> bool:
        """Whether the contents have changed, as far as this can be checked; always False for generators."""
        value = self.value
        if not self._is_generator and not self._is_data:
            return not self._has_the_same_entries() or any(inner.has_changed() for inner in self._inner)
        if self._is_generator:
            return False
        if isinstance(value, Tensor):
            return value._version != self._version or (self._copy is not None and not torch.equal(value, self._copy))
        return self._copy is not None and not np.array_equal(value, self._copy)

    def restore(self) -> None:
        """Restore the contents in place, so that every reference to the value sees them."""
        value = self.value
        if self._is_generator:
            _set_state(value, self._copy)
        elif not self._is_data:
            if not self._has_the_same_entries():
                _refill(value, self._keys, self._values)
            for inner in self._inner:
                inner.restore()
        elif self._copy is not None:
            if isinstance(value, Tensor):
                value.detach().copy_(self._copy)
            else:
                value[...] = self._copy

    def _has_the_same_entries(self) -> bool:
        keys, values = _keys_and_values(self.value)
        return (
            len(values) == len(self._values)
            and are_identical(values, self._values)
            and (are_identical(keys, self._keys) or keys == self._keys)
        )

    def nested(self) -> Iterator[Contents]:
        """Yield this snapshot and all nested ones."""
        yield self
        for inner in self._inner:
            yield from inner.nested()


class ShallowContents:
    """Shallow snapshots with a fast joint check for changes, whose loops run in C.

    Args:
        contents (`Sequence[Contents]`): Snapshots that are not deep, of values for which `is_checked_jointly` holds.
    """

    def __init__(self, contents: Sequence[Contents]):
        self.contents = contents
        values = [inner.value for one in contents for inner in one.nested()]
        self._tensors = [v for v in values if isinstance(v, Tensor)]
        self._objects = [v for v in values if not isinstance(v, (*_CONTAINERS, tuple, Tensor, np.ndarray))]
        self._attributes = list(map(vars, self._objects))
        self._containers = [v for v in values if isinstance(v, (*_CONTAINERS, tuple))] + self._attributes
        self._dicts = [v for v in self._containers if isinstance(v, dict)]
        self._captured = self._lengths_and_versions(), self._entries()

    def are_unchanged(self) -> bool:
        """Whether containers and objects hold the same entries, and tensors have the same version counters."""
        lengths_and_versions, entries = self._captured
        return (
            self._lengths_and_versions() == lengths_and_versions
            and are_identical(map(vars, self._objects), self._attributes)
            and are_identical(self._entries(), entries)
        )

    def _lengths_and_versions(self) -> list[int]:
        return [*map(len, self._containers), *map(_version, self._tensors)]

    def _entries(self) -> list[Any]:
        return [*chain.from_iterable(self._containers), *chain.from_iterable(map(dict.values, self._dicts))]


def is_generator(value: Any) -> bool:
    """Whether a value is a random number generator."""
    return isinstance(value, _GENERATORS)


def is_checked_jointly(value: Any) -> bool:
    """Whether `ShallowContents` notices changes of this value."""
    return not is_generator(value) and not isinstance(value, CellType) and not _slots(type(value))


def is_mutable(value: Any) -> bool:
    """Whether changes of the contents of this value must be undone: containers, arrays, generators, custom objects."""
    if isinstance(value, (*_CONTAINERS, *_GENERATORS, np.ndarray, CellType)):
        return True
    if isinstance(value, tuple):
        return len(value) <= _MAX_ENTRIES and any(map(_may_change, value))
    return _is_custom_object(value)


def _is_custom_object(value: Any) -> bool:
    return (
        (hasattr(value, "__dict__") or bool(_slots(type(value))))
        and not isinstance(value, type | nn.Module | Tensor | Trainer)
        and type(value).__module__.partition(".")[0] not in _LIBRARIES
    )


def _may_change(value: Any) -> bool:
    return type(value) not in _ATOMS and (is_mutable(value) or _is_plain_tensor(value))


@functools.cache
def _slots(kind: type) -> tuple[str, ...]:
    """The names in `__slots__` of a class and its bases."""
    classes = [vars(base) for base in kind.__mro__ if "__slots__" in vars(base)]
    return tuple(name for names in classes for name, d in names.items() if isinstance(d, MemberDescriptorType))


def is_data(value: Any) -> bool:
    """Whether the value has so many entries that it is not state; never for an object, whose attributes are checked."""
    return not _is_custom_object(value) and not isinstance(value, Tensor) and entries(value) > _MAX_ENTRIES


def entries(value: Any, depth: int = 0) -> int:
    """The number of entries, including those of nested containers and arrays; above the maximum, not all are counted."""
    if isinstance(value, np.ndarray):
        return value.size
    if is_generator(value):
        return 1
    values = _keys_and_values(value)[1]
    count = len(values)
    for inner in values if depth < _MAX_DEPTH else ():
        if count > _MAX_ENTRIES:
            break
        if type(inner) not in _ATOMS and is_mutable(inner):
            count += entries(inner, depth + 1)
    return count


def modules_in(values: Iterable[Any], depth: int = 0, seen: dict[int, int] | None = None) -> Iterator[nn.Module]:
    """Yield the modules among the values and inside containers and custom objects among them.

    Args:
        seen (`dict[int, int]`, *optional*): The depth at which values, by their ids, have been found: many objects refer
            to each other.
    """
    seen = {} if seen is None else seen
    for value in values:
        if isinstance(value, nn.Module):
            yield value
        elif depth < seen.get(id(value), _MAX_DEPTH) and _may_hold_modules(value):
            seen[id(value)] = depth
            yield from modules_in(_keys_and_values(value)[1], depth + 1, seen)


def _may_hold_modules(value: Any) -> bool:
    return len(value) <= 1000 if isinstance(value, (*_CONTAINERS, tuple)) else _is_custom_object(value)


def named_modules_in(values: dict[str, Any]) -> dict[str, nn.Module]:
    """The modules among named values and inside containers and custom objects among them, under unique names."""
    found = {name: list(modules_in([value])) for name, value in values.items()}
    return {
        name if len(modules) == 1 else f"{name}.{i}": module
        for name, modules in found.items()
        for i, module in enumerate(modules)
    }


def parts_of(function: Any) -> list[Any]:
    """The objects that a callable uses besides its arguments: itself, its `self`, bound and closed-over values."""
    if function is None:
        return []
    cells = [cell for cell in getattr(function, "__closure__", None) or () if _is_filled(cell)]
    closed_over = [*cells, *(cell.cell_contents for cell in cells)]  # a cell changes when a variable is nonlocal
    own = [vars(function)] if isinstance(function, FunctionType) else []
    inner = parts_of(function.func) if isinstance(function, functools.partial) else []
    bound = [*function.args, *function.keywords.values()] if isinstance(function, functools.partial) else []
    return [function, *own, *closed_over, *bound, *inner, getattr(function, "__self__", None)]


def _is_filled(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:  # a variable that is not bound yet
        return False
    return True


def _keys_and_values(value: Any) -> tuple[list[Any], list[Any]]:
    if isinstance(value, dict):
        return list(value), list(value.values())
    if isinstance(value, (*_CONTAINERS, tuple)):
        return [], list(value)
    if isinstance(value, CellType):
        return [], [value.cell_contents]
    attributes = getattr(value, "__dict__", {})
    if slots := _slots(type(value)):
        attributes = attributes | {name: getattr(value, name) for name in slots if hasattr(value, name)}
    return list(attributes), list(attributes.values())


def _refill(value: Any, keys: list[Any], values: list[Any]) -> None:
    if isinstance(value, CellType):
        (value.cell_contents,) = values
    elif isinstance(value, _CONTAINERS):
        _refill_container(value, keys, values)
    else:
        _refill_object(value, dict(zip(keys, values, strict=True)))


def _refill_container(container: Any, keys: list[Any], values: list[Any]) -> None:
    container.clear()
    if isinstance(container, dict):
        # Counter.update would add counts, and dict.update would leave an OrderedDict without its order.
        kind = collections.OrderedDict if isinstance(container, collections.OrderedDict) else dict
        kind.update(container, zip(keys, values, strict=True))
    elif isinstance(container, set):
        container.update(values)
    else:
        container.extend(values)


def _refill_object(value: Any, attributes: dict[str, Any]) -> None:
    slots = _slots(type(value))
    for name in slots:
        if name in attributes:
            object.__setattr__(value, name, attributes[name])
        elif hasattr(value, name):
            object.__delattr__(value, name)
    if hasattr(value, "__dict__"):
        vars(value).clear()
        vars(value).update((name, entry) for name, entry in attributes.items() if name not in slots)


def is_strided(tensor: Tensor) -> bool:
    """Whether the tensor is neither sparse nor nested, so that its values can be compared."""
    return tensor.layout is torch.strided and not tensor.is_nested


def is_plain(tensor: Tensor) -> bool:
    """Whether the tensor's values can be copied and compared, unlike sharded, quantized, sparse and nested ones."""
    return type(tensor) in (Tensor, nn.Parameter) and is_strided(tensor)


def address(value: Any) -> int | None:
    """Where the memory of a plain tensor begins; None for other values."""
    return value.data_ptr() if isinstance(value, Tensor) and is_plain(value) else None


def _is_plain_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) and is_plain(value) and not value.requires_grad and not value.is_inference()


def _state_of(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)
