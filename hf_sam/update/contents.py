"""What is inside of values that are changed in place: containers, arrays, generators, objects of users' own classes."""

from __future__ import annotations

import collections
import functools
import random
from collections.abc import Iterable, Iterator
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_CONTAINERS = (list, dict, set, collections.deque)
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
# Objects of these packages look after themselves; those of users' own classes are looked into.
_LIBRARIES = frozenset(
    [
        "torch",
        "transformers",
        "accelerate",
        "peft",
        "trl",
        "datasets",
        "tokenizers",
        "safetensors",
        "numpy",
        "pandas",
        "PIL",
        "hf_sam",
        "builtins",
        "collections",
        "enum",
        "functools",
        "logging",
        "pathlib",
        "threading",
    ]
)
_DEEPEST = 4
# Nothing is inside of these.
_ATOMS = frozenset([str, int, float, bool, type(None), bytes])


class Contents:
    """The contents of one value, and of what it holds, as they are now.

    Args:
        value (`Any`): Something that `is_looked_into`.
        is_deep (`bool`): Copy tensors and arrays inside, too, whose numbers may change in place.
    """

    def __init__(self, value: Any, is_deep: bool, depth: int = 0):
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
            if depth < _DEEPEST:
                inner = (
                    v for v in self._values if type(v) not in _ATOMS and (is_looked_into(v) or _is_plain_tensor(v))
                )
                self._inner = [Contents(v, is_deep, depth + 1) for v in inner]

    def has_changed(self) -> bool:
        """Whether anything inside is no longer what it was, as far as it can be told; never for generators."""
        value = self.value
        if not self._is_generator and not self._is_data:
            return not self._has_the_same_entries() or any(inner.has_changed() for inner in self._inner)
        if self._is_generator:
            return False
        if isinstance(value, Tensor):
            return value._version != self._version or (self._copy is not None and not torch.equal(value, self._copy))
        return self._copy is not None and not np.array_equal(value, self._copy)

    def restore(self) -> None:
        """Put everything back, in place: whoever holds the value sees it."""
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
            and all(map(is_, values, self._values))
            and (all(map(is_, keys, self._keys)) or keys == self._keys)
        )


def is_generator(value: Any) -> bool:
    """Whether random numbers come from it."""
    return isinstance(value, _GENERATORS)


def is_looked_into(value: Any) -> bool:
    """Whether a pass may change what is inside of this value, in a way that is ours to undo."""
    if isinstance(value, (*_CONTAINERS, *_GENERATORS, np.ndarray)):
        return True
    return (
        hasattr(value, "__dict__")
        and not isinstance(value, type | nn.Module | Tensor)
        and type(value).__module__.partition(".")[0] not in _LIBRARIES
    )


def entries(value: Any, depth: int = 0) -> int:
    """How many entries it has, those of containers and arrays within it, too."""
    if isinstance(value, np.ndarray):
        return value.size
    if is_generator(value):
        return 1
    values = _keys_and_values(value)[1]
    inner = [v for v in values if is_looked_into(v)] if depth < _DEEPEST and len(values) <= 10_000 else []
    return len(values) + sum(entries(v, depth + 1) for v in inner)


def modules_in(values: Iterable[Any], depth: int = 0) -> Iterator[nn.Module]:
    """The modules among values, and in containers among them."""
    for value in values:
        if isinstance(value, nn.Module):
            yield value
        elif isinstance(value, dict | list | tuple) and depth < _DEEPEST and len(value) <= 1000:
            yield from modules_in(value.values() if isinstance(value, dict) else value, depth + 1)


def named_modules_in(values: dict[str, Any]) -> dict[str, nn.Module]:
    """The modules among named values and in containers among them, by a name of their own."""
    found = {name: list(modules_in([value])) for name, value in values.items()}
    return {
        name if len(modules) == 1 else f"{name}.{i}": module
        for name, modules in found.items()
        for i, module in enumerate(modules)
    }


def parts_of(function: Any) -> list[Any]:
    """What a function computes with beside its arguments: its own object, bound arguments, and what it closes over."""
    if function is None:
        return []
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or () if _is_filled(cell)]
    inner = parts_of(function.func) if isinstance(function, functools.partial) else []
    bound = [*function.args, *function.keywords.values()] if isinstance(function, functools.partial) else []
    return [function, *cells, *bound, *inner, getattr(function, "__self__", None)]


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a name that is not bound yet
        return False


def _keys_and_values(value: Any) -> tuple[list[Any], list[Any]]:
    if isinstance(value, dict):
        return list(value), list(value.values())
    if isinstance(value, _CONTAINERS):
        return [], list(value)
    return list(vars(value)), list(vars(value).values())


def _refill(value: Any, keys: list[Any], values: list[Any]) -> None:
    container = value if isinstance(value, _CONTAINERS) else vars(value)
    container.clear()
    if isinstance(container, dict):
        dict.update(container, zip(keys, values, strict=True))  # a Counter's own would count
    elif isinstance(container, set):
        container.update(values)
    else:
        container.extend(values)


def _is_plain_tensor(value: Any) -> bool:
    return type(value) in (Tensor, nn.Parameter) and not value.requires_grad and not value.is_inference()


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
