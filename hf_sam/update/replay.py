"""Let the second pass start as the first one did: random states, and all else that a forward pass reads and writes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .contents import Contents, entries, is_looked_into, modules_in
from .random_states import RandomStates

# What `nn.Module` itself keeps in `__dict__`; tensors are found through `_buffers` and `_parameters`.
_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}
# A container with more entries than this counts as data, not state.
_MOST_ENTRIES = 10_000
# Tensors whose numbers can be copied and compared, unlike sharded and quantized ones.
_PLAIN = (Tensor, nn.Parameter)
# Number of optimizer steps in which passes are watched by value, at the start of a run and after modules have changed.
_WATCHED_STEPS = 2


@dataclass
class Snapshot:
    """A snapshot of `PassState`.

    Attributes:
        random_states (`RandomStates`, *optional*): None if random numbers are not replayed.
        namespaces (`list`): Dictionaries of modules, and their contents.
        tensors (`list`): Tensors that a pass may change in place, their versions, and copies of their numbers if taken.
        addresses (`list[int]`): Addresses of the tensors' memory.
        contents (`list[Contents]`): Contents of containers, arrays, generators and objects.
        own (`dict`): The owner's plain attributes.
        is_watched (`bool`): Whether everything that can be copied is, for comparison.
        is_whole (`bool`): Whether everything that the following pass has changed can be restored.
    """

    random_states: RandomStates | None
    namespaces: list[tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=list)
    tensors: list[tuple[Tensor, int, Tensor | None]] = field(default_factory=list)
    addresses: list[int] = field(default_factory=list)
    contents: list[Contents] = field(default_factory=list)
    own: dict[str, Any] = field(default_factory=dict)
    is_watched: bool = False
    is_whole: bool = True


class PassState:
    """Everything that a forward pass reads and writes apart from trained weights, found by watching clean passes.

    This covers:

    - buffers and parameters without gradient, changed in place or replaced;
    - modules that are replaced;
    - numbers, tensors, arrays, containers, generators and objects of custom classes that modules keep as plain attributes;
    - the same for modules and plain attributes of `owner`, the trainer.

    What a pass reassigns is restored by reference. What it changes in place must be copied before: for a few steps, passes
    are watched by value; afterwards only what has been seen to change is copied, and tensors' version counters show
    whether anything else changes.

    Args:
        roots (`Sequence[nn.Module]`): The model, and modules outside it.
        owner (`object`, *optional*): An object whose plain attributes are restored, too.
        ignored (`Iterable[str]`, *optional*): Attributes of `owner` that are not.
        watches_parameters (`bool`, *optional*, defaults to `True`): Watch parameters without gradient. This is impossible
            if the engine moves their memory.
        looked_into (`Sequence[Any]`, *optional*): More objects that a pass may change.
    """

    def __init__(
        self,
        roots: Sequence[nn.Module],
        owner: object | None = None,
        ignored: Iterable[str] = (),
        watches_parameters: bool = True,
        looked_into: Sequence[Any] = (),
    ):
        self._more = looked_into
        self._roots = list(roots)
        self._owner, self._ignored = owner, frozenset(ignored)
        self._watches_parameters = watches_parameters
        self._moving: set[int] = set()  # ids of what passes change in place
        self._signature: tuple | None = None
        self._step: int | None = None
        self._is_watching, self._steps_to_watch = False, 0
        # Of this step: copies of parameters that were left alone so far, so that several snapshots share one.
        self._unchanged: dict[int, tuple[int, Tensor]] = {}

    # --- what there is -----------------------------------------------------------------------------------------------

    def _scan(self) -> None:
        """List everything that may change; repeated when modules have been added, removed or changed their mode."""
        roots = [*self._roots, *modules_in(self._own_attributes().values())]
        self._modules = list({id(m): m for root in roots for m in root.modules()}.values())
        # torch's own layers keep no state in attributes, and walking them would cost most.
        custom = [m for m in self._modules if not type(m).__module__.startswith("torch.nn.modules")]
        self._namespaces = [vars(m) for m in custom] + [m._modules for m in custom if m._modules]
        self._namespaces += [m._buffers for m in self._modules if m._buffers]
        if self._watches_parameters:
            frozen = (
                m for m in self._modules if any(p is not None and not p.requires_grad for p in m._parameters.values())
            )
            self._namespaces += [m._parameters for m in frozen]
        self._always = {  # BatchNorm's kernels change its buffers without changing their versions
            id(b) for m in self._modules if isinstance(m, _NormBase) for b in m._buffers.values() if b is not None
        }
        found: dict[int, Tensor] = {}
        looked_into: dict[int, Any] = {}
        attributes = [{k: v for k, v in vars(m).items() if k not in _OF_EVERY_MODULE} for m in self._modules]
        for values in (*attributes, *(m._buffers for m in self._modules), self._own_attributes()):
            found.update((id(v), v) for v in values.values() if _is_state(v))
            looked_into.update((id(v), v) for v in values.values() if is_looked_into(v) and entries(v) <= _MOST_ENTRIES)
        looked_into.update((id(v), v) for v in self._more if is_looked_into(v))
        if self._watches_parameters:
            found.update((id(p), p) for m in self._modules for p in m._parameters.values() if _is_state(p))
        self._tensors, self._looked_into = list(found.values()), list(looked_into.values())

    def _state_of_modules(self) -> tuple[list[bool], list[int]]:
        return [m.training for m in self._modules], [id(c) for m in self._modules for c in m._modules.values()]

    def _own_attributes(self) -> dict[str, Any]:
        return {} if self._owner is None else {k: v for k, v in vars(self._owner).items() if k not in self._ignored}

    # --- putting aside ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def capture(self, random_states: RandomStates | None, step: int, budget: int | None = None) -> Snapshot:
        """Take a snapshot of the current state.

        Args:
            random_states (`RandomStates`, *optional*): Random states to keep with it.
            step (`int`): The optimizer step.
            budget (`int`, *optional*): Bytes of parameters without gradient that may be copied while passes are watched
                by value, the smallest first.
        """
        if self._signature is None:
            self._scan()
            self._signature, self._steps_to_watch = self._state_of_modules(), _WATCHED_STEPS
        if step != self._step:
            self._step, self._is_watching = step, self._steps_to_watch > 0
            self._unchanged.clear()
            self._steps_to_watch -= 1
        snapshot = Snapshot(random_states, own=self._own_attributes(), is_watched=self._is_watching)
        snapshot.namespaces = [(namespace, namespace.copy()) for namespace in self._namespaces]
        copied = self._moving | self._always
        if self._is_watching:
            copied = copied.union(self._affordable(budget))
            snapshot.addresses = [_address(t) for t in self._tensors]
        snapshot.tensors = [(t, t._version, self._copy(t) if id(t) in copied else None) for t in self._tensors]
        snapshot.contents = [
            Contents(value, is_deep=self._is_watching or id(value) in self._moving) for value in self._looked_into
        ]
        return snapshot

    def _copy(self, tensor: Tensor) -> Tensor:
        version, value = self._unchanged.get(id(tensor), (None, None))
        return value if version == tensor._version and id(tensor) not in self._moving else tensor.detach().clone()

    def look_again(self, snapshot: Snapshot, budget: int | None = None) -> None:
        """Between the trainer's `model.train()` and the forward: include modules that are new or have changed their mode."""
        if self._signature == self._state_of_modules():
            return
        self._signature = self._step = None
        now = self.capture(None, -1, budget)
        known = {id(namespace) for namespace, _ in snapshot.namespaces}
        snapshot.namespaces += [pair for pair in now.namespaces if id(pair[0]) not in known]
        snapshot.tensors, snapshot.contents = now.tensors, now.contents
        snapshot.is_watched, snapshot.addresses = now.is_watched, now.addresses

    def _affordable(self, budget: int | None) -> Iterator[int]:
        """The ids of buffers and attributes, and of parameters without gradient within the budget."""
        for tensor in sorted(self._tensors, key=Tensor.numel):
            if isinstance(tensor, nn.Parameter) and budget is not None:
                if tensor.nbytes > budget:
                    continue
                budget -= tensor.nbytes
            if type(tensor) in _PLAIN and tensor.device.type != "meta":
                yield id(tensor)

    @torch.no_grad()
    def learn(self, before: Snapshot) -> None:
        """After the clean pass that `before` was captured for: note what it has changed in place."""
        for i, (tensor, version, value) in enumerate(before.tensors):
            if id(tensor) in self._moving:
                continue
            has_moved = tensor._version != version or (before.is_watched and _address(tensor) != before.addresses[i])
            if has_moved or (before.is_watched and value is not None and not torch.equal(tensor, value)):
                self._moving.add(id(tensor))
                before.is_whole &= value is not None  # otherwise the previous value is lost
            elif before.is_watched and value is not None and isinstance(tensor, nn.Parameter):
                self._unchanged[id(tensor)] = version, value
        for contents in before.contents:
            if id(contents.value) not in self._moving and contents.has_changed():
                self._moving.add(id(contents.value))
                before.is_whole &= contents.is_deep
        changed = [(now, then) for now, then in before.namespaces if not _are_alike(now, then)]
        if any(len(now) != len(then) or _modules_differ(now, then) for now, then in changed):
            self._signature = None  # a new attribute or module: list again

    # --- putting back -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def restore(self, snapshot: Snapshot) -> None:
        """Restore everything to the state of the snapshot."""
        if snapshot.random_states is not None:
            snapshot.random_states.restore()
        for namespace, before in snapshot.namespaces:
            if not _are_alike(namespace, before):
                _put_back(namespace, before)
        if self._owner is not None:
            own = vars(self._owner)
            for name in [name for name in own if name not in snapshot.own and name not in self._ignored]:
                del own[name]
            own.update(snapshot.own)
        for tensor, _, value in snapshot.tensors:
            if value is None or tensor.requires_grad:  # unfrozen since, and perturbed
                continue
            if tensor.shape == value.shape:
                tensor.detach().copy_(value)
            else:
                tensor.data = value.clone()
        for contents in snapshot.contents:
            contents.restore()


def _put_back(namespace: dict[str, Any], before: dict[str, Any]) -> None:
    mode = namespace.get("training")  # set by the trainer
    for name in [name for name, value in namespace.items() if name not in before and _is_data(value)]:
        del namespace[name]  # except what is set up once, such as the mark of installed hooks
    namespace.update(before)
    if mode is not None:
        namespace["training"] = mode


def _are_alike(now: dict[str, Any], then: dict[str, Any]) -> bool:
    return len(now) == len(then) and all(map(is_, now.values(), then.values()))


def _modules_differ(now: dict[str, Any], then: dict[str, Any]) -> bool:
    return any(isinstance(value, nn.Module) and now.get(name) is not value for name, value in then.items())


def _is_data(value: Any) -> bool:
    return not isinstance(value, bool | nn.Module) and not callable(value)


def _is_state(value: Any) -> bool:
    """Whether a pass may change this tensor in place in a way that must be undone."""
    return isinstance(value, Tensor) and not value.requires_grad and not value.is_inference()


def _address(tensor: Tensor) -> int:
    return tensor.data_ptr() if type(tensor) in _PLAIN else 0
