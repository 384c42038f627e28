"""The second pass starts as the first one did: random states, and whatever else a forward pass reads and writes."""

from __future__ import annotations

import collections
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

# What `nn.Module` itself keeps in `__dict__`; its tensors are looked at through `_buffers` and `_parameters`.
_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}
_CONTAINERS = (list, dict, set, collections.deque)
# Tensors whose numbers can be copied and compared, unlike sharded and quantized ones.
_PLAIN = (Tensor, nn.Parameter, nn.Buffer)
# A container with more entries than this is data, not state.
_MOST_ENTRIES = 10_000
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
        "types",
    ]
)


class RandomStates:
    """The state of every global generator that a forward pass may draw from: torch's on each device, numpy's, python's."""

    def __init__(self, devices: Iterable[torch.device]):
        self._torch = torch.get_rng_state()
        self._accelerators = [
            (device, torch.get_device_module(device).get_rng_state(device))
            for device in devices
            if device.type != "cpu"
        ]
        self._numpy = np.random.get_state()  # SpecAugment masks of speech models are drawn from numpy
        self._python = random.getstate()

    def restore(self) -> None:
        """Set every generator to the state captured."""
        torch.set_rng_state(self._torch)
        for device, state in self._accelerators:
            torch.get_device_module(device).set_rng_state(state, device)
        np.random.set_state(self._numpy)
        random.setstate(self._python)


@dataclass
class Snapshot:
    """What `PassState` looked like at one moment.

    Attributes:
        random_states (`RandomStates`, *optional*): None where random numbers are not to be replayed.
        is_whole (`bool`): Whether all that the pass after it has changed can be put back.
    """

    random_states: RandomStates | None
    namespaces: list[dict[str, Any]] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    addresses: list[int] = field(default_factory=list)
    values: dict[int, Tensor] = field(default_factory=dict)
    watched: dict[int, Tensor] | None = None
    contents: list[tuple[Any, Any]] = field(default_factory=list)
    generators: list[tuple[Any, Any]] = field(default_factory=list)
    is_whole: bool = True


class PassState:
    """All that a forward pass reads and writes beside trained weights, found by watching clean passes.

    Covered are buffers and parameters without gradient (changed in place, or replaced), numbers, tensors and containers
    that modules keep as plain attributes, generators that they own, and the same of modules and of plain attributes that
    hang on `owner`, the trainer. What a pass assigns anew is put back by reference. What it changes in place has to be
    copied before: the first pass, and the first after modules changed their mode, is watched by value; afterwards only
    what has been seen to change is copied, and tensors' version counters tell whether anything new does.

    Args:
        roots (`Sequence[nn.Module]`): The model, and modules beside it.
        owner (`object`, *optional*): Whose plain attributes count, too.
        ignored (`Iterable[str]`, *optional*): Attributes of `owner` that do not.
        watches_parameters (`bool`, *optional*, defaults to `True`): Parameters without gradient count. They cannot where
            the engine moves their memory around.
    """

    def __init__(
        self,
        roots: Sequence[nn.Module],
        owner: object | None = None,
        ignored: Iterable[str] = (),
        watches_parameters: bool = True,
    ):
        self._roots = list(roots)
        self._owner, self._ignored = owner, frozenset(ignored)
        self._watches_parameters = watches_parameters
        self._moving: set[int] = set()  # of `_tensors`, those that passes change in place
        self._mode: list[bool] | None = None
        self._tensors: list[Tensor] = []

    # --- what there is -----------------------------------------------------------------------------------------------

    def _scan(self) -> None:
        """List everything that may change; again whenever an attribute has appeared or modules changed their mode."""
        modules = list({id(m): m for root in self._roots for m in root.modules()}.values())
        self._modules = modules
        # Layers of torch's own keep no state in attributes; walking them would cost most.
        self._namespaces = [vars(m) for m in modules if not type(m).__module__.startswith("torch.nn.modules")]
        self._namespaces += [m._buffers for m in modules if m._buffers]
        self._norms = [m for m in modules if isinstance(m, _NormBase) and m.running_mean is not None]
        found: dict[int, Tensor] = {}
        self._containers: list[Any] = []
        self._generators: list[Any] = []
        for module in modules:
            tensors = [*module._buffers.values()]
            if self._watches_parameters:
                tensors += module._parameters.values()
            attributes = {k: v for k, v in vars(module).items() if k not in _OF_EVERY_MODULE}
            self._look_into(attributes.values())
            tensors += [v for v in attributes.values() if isinstance(v, Tensor)]
            found.update((id(t), t) for t in tensors if _is_state(t))
        if self._owner is not None:
            attributes = {k: v for k, v in vars(self._owner).items() if k not in self._ignored}
            attributes = {k: v for k, v in attributes.items() if not isinstance(v, nn.Module)}
            found.update((id(v), v) for v in attributes.values() if _is_state(v))
            self._look_into(attributes.values())
        moving = {id(self._tensors[i]) for i in self._moving}
        self._tensors = list(found.values())
        self._moving = {i for i, t in enumerate(self._tensors) if id(t) in moving}
        self._position = {id(t): i for i, t in enumerate(self._tensors)}

    def _look_into(self, values: Iterable[Any]) -> None:
        for value in values:
            if isinstance(value, _CONTAINERS):
                if _entries(value) <= _MOST_ENTRIES:
                    self._containers.append(value)
            elif isinstance(value, torch.Generator | np.random.Generator | np.random.RandomState | random.Random):
                self._generators.append(value)
            elif _is_of_a_user(value) and _entries(vars(value)) <= _MOST_ENTRIES:
                self._containers.append(vars(value))

    # --- putting aside ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def capture(self, random_states: RandomStates | None, budget: int | None = None) -> Snapshot:
        """What the next pass starts from.

        Args:
            random_states (`RandomStates`, *optional*): Kept with it.
            budget (`int`, *optional*): Bytes of parameters without gradient that may be copied in a pass that is
                watched by value, the smallest first.
        """
        is_watched = self._mode is None or self._mode != [m.training for m in self._modules]
        if is_watched:
            self._scan()
            self._mode = [m.training for m in self._modules]
        snapshot = Snapshot(random_states)
        snapshot.namespaces = [namespace.copy() for namespace in self._namespaces]
        if self._owner is not None:
            snapshot.namespaces.append(self._own_attributes())
        snapshot.versions = [t._version for t in self._tensors]
        kept = self._moving | {  # whose kernels change them without a change of version
            self._position[id(b)]
            for m in self._norms
            if m.training
            for b in m._buffers.values()
            if id(b) in self._position
        }
        snapshot.values = {i: self._tensors[i].detach().clone() for i in kept}
        if is_watched:
            snapshot.addresses = [_address(t) for t in self._tensors]
            snapshot.watched = {i: self._tensors[i].detach().clone() for i in self._affordable(budget) if i not in kept}
        snapshot.contents = [(c, _contents(c)) for c in self._containers]
        snapshot.generators = [(g, _generator_state(g)) for g in self._generators]
        return snapshot

    def _affordable(self, budget: int | None) -> Iterator[int]:
        """Buffers and attributes, and parameters without gradient as far as the budget goes."""
        for i, tensor in sorted(enumerate(self._tensors), key=lambda entry: entry[1].numel()):
            if isinstance(tensor, nn.Parameter) and budget is not None:
                budget -= tensor.nbytes
                if budget < 0:
                    return
            if type(tensor) in _PLAIN and tensor.device.type != "meta":
                yield i

    def _own_attributes(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self._owner).items() if k not in self._ignored}

    @torch.no_grad()
    def learn(self, before: Snapshot) -> None:
        """After the clean pass that `before` was captured for: note what it has changed in place."""
        for i, tensor in enumerate(self._tensors):
            if i in before.values:
                continue
            has_moved = tensor._version != before.versions[i] or (
                before.watched is not None and _address(tensor) != before.addresses[i]
            )
            if before.watched is not None and i in before.watched:
                if has_moved or not torch.equal(tensor, before.watched[i]):
                    self._moving.add(i)
                    before.values[i] = before.watched[i]
            elif has_moved:
                self._moving.add(i)
                before.is_whole = False  # what it was is lost
        before.watched = None
        if any(len(now) != len(then) for now, then in zip(self._namespaces, before.namespaces, strict=False)):
            self._mode = None  # an attribute has appeared: look again

    # --- putting back -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def restore(self, snapshot: Snapshot) -> None:
        """Make everything what it was when the snapshot was captured."""
        if snapshot.random_states is not None:
            snapshot.random_states.restore()
        for namespace, before in zip(self._namespaces, snapshot.namespaces, strict=False):
            if len(namespace) != len(before) or not all(map(is_, namespace.values(), before.values())):
                _put_back(namespace, before)
        if self._owner is not None:
            own, before = vars(self._owner), snapshot.namespaces[-1]
            for name in [name for name in own if name not in before and name not in self._ignored]:
                del own[name]
            own.update(before)
        for i, value in snapshot.values.items():
            tensor = self._tensors[i]
            if tensor.shape == value.shape:
                tensor.detach().copy_(value)
            else:
                tensor.data = value.clone()
        for container, contents in snapshot.contents:
            _refill(container, contents)
        for generator, state in snapshot.generators:
            _set_generator_state(generator, state)


def _put_back(namespace: dict[str, Any], before: dict[str, Any]) -> None:
    mode = namespace.get("training")  # is the trainer's to set
    for name in [name for name in namespace if name not in before]:
        del namespace[name]
    namespace.update(before)
    if mode is not None:
        namespace["training"] = mode


def _is_state(value: Any) -> bool:
    """Whether a pass may change this tensor in place in a way that is ours to undo."""
    return isinstance(value, Tensor) and not value.requires_grad and not value.is_inference()


def _address(tensor: Tensor) -> int:
    return tensor.data_ptr() if type(tensor) in _PLAIN else 0


# --- containers -------------------------------------------------------------------------------------------------------


def _entries(container: Any, depth: int = 0) -> int:
    values = container.values() if isinstance(container, dict) else container
    inner = [v for v in values if isinstance(v, _CONTAINERS)] if depth < 4 and len(container) <= _MOST_ENTRIES else []
    return len(container) + sum(_entries(v, depth + 1) for v in inner)


def _contents(container: Any) -> Any:
    """The entries of a container, those of containers within it, too."""
    if isinstance(container, dict):
        return [
            (key, value, _contents(value) if isinstance(value, _CONTAINERS) else None)
            for key, value in container.items()
        ]
    return [(None, value, _contents(value) if isinstance(value, _CONTAINERS) else None) for value in container]


def _refill(container: Any, contents: Any) -> None:
    """The inverse of `_contents`, in place: whoever holds the container sees it."""
    for _, value, inner in contents:
        if inner is not None:
            _refill(value, inner)
    if isinstance(container, dict):
        if len(container) == len(contents) and all(
            key in container and container[key] is value for key, value, _ in contents
        ):
            return
        container.clear()
        container.update((key, value) for key, value, _ in contents)
    elif isinstance(container, set):
        container.clear()
        container.update(value for _, value, _ in contents)
    elif len(container) != len(contents) or any(a is not b for a, (_, b, _) in zip(container, contents, strict=True)):
        container.clear()
        container.extend(value for _, value, _ in contents)


def _is_of_a_user(value: Any) -> bool:
    kind = type(value)
    return (
        hasattr(value, "__dict__")
        and not isinstance(value, type | nn.Module | Tensor)
        and not callable(value)
        and kind.__module__.partition(".")[0] not in _LIBRARIES
    )


def _generator_state(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def _set_generator_state(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)
