"""Start the second pass from the same state as the first: random states and all else that a forward pass changes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .contents import (
    Contents,
    ShallowContents,
    address,
    is_checked_jointly,
    is_data,
    is_mutable,
    is_plain,
    modules_in,
)
from .namespaces import Namespaces, Values, are_identical
from .random_states import RandomStates

# The attributes of `nn.Module` itself; tensors are found through `_buffers` and `_parameters`.
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_version, _mode = attrgetter("_version"), attrgetter("training")
# Number of optimizer steps in which values are compared, at the start of a run and after modules have changed.
_WATCHED_STEPS = 2


@dataclass
class Snapshot:
    """A snapshot of `PassState`.

    Attributes:
        random_states (`RandomStates`, *optional*): None if random numbers are not replayed.
        namespaces (`list`): Dictionaries of modules, and their values.
        own (`tuple`): The same for the plain attributes of the owner.
        tensors (`list[Tensor]`): Tensors that a pass may change in place.
        versions (`list[int]`): The version counter of each.
        copies (`dict[int, Tensor]`): Copies of some of them, by position in `tensors`.
        addresses (`list[int | None]`): Memory addresses of the tensors; only if `is_watched`.
        contents (`list[Contents]`): Copied contents of containers, arrays, objects and generators.
        shallow (`ShallowContents`): Contents of the others, which are not copied.
        is_watched (`bool`): Whether everything that can be copied is copied, to detect changes by value.
        is_restorable (`bool`): Whether everything that the following pass changed can be restored.
    """

    random_states: RandomStates | None
    namespaces: list[tuple[Namespaces, Values]]
    own: tuple[Namespaces, Values]
    tensors: list[Tensor]
    versions: list[int]
    copies: dict[int, Tensor]
    addresses: list[int | None]
    contents: list[Contents]
    shallow: ShallowContents
    is_watched: bool
    is_restorable: bool = True


class PassState:
    """The state that a forward pass reads and writes, apart from trained weights, found by observing clean passes.

    This covers:

    - buffers and frozen parameters, changed in place or replaced;
    - replaced modules;
    - plain attributes of modules: numbers, tensors, arrays, containers, generators and objects of custom classes,
      including modules inside them;
    - the modules and plain attributes of `owner`, the trainer.

    Reassigned attributes are restored by reference. Values changed in place must have been copied beforehand:

    - during the first few steps everything is copied, and compared after the clean pass;
    - afterwards only values that were seen to change are copied, and version counters of tensors reveal other changes.

    Args:
        roots (`Sequence[nn.Module]`): The model, and modules outside it.
        owner (`object`, *optional*): An object whose plain attributes are restored, too.
        ignored (`Iterable[str]`, *optional*): Attributes of `owner` to leave alone.
        watches_parameters (`bool`, *optional*, defaults to `True`): Also restore frozen parameters. Must be False if
            the engine moves their memory.
        also_tracked (`Sequence[Any]`, *optional*): Further objects that a pass may change.
    """

    def __init__(
        self,
        roots: Sequence[nn.Module],
        owner: object | None = None,
        ignored: Iterable[str] = (),
        watches_parameters: bool = True,
        also_tracked: Sequence[Any] = (),
    ):
        self._also_tracked = also_tracked
        self._roots = list(roots)
        self._owner, self._ignored = owner, frozenset(ignored)
        self._watches_parameters = watches_parameters
        self._mutated: set[int] = set()  # ids of the values that passes change in place
        self._is_scanned = False
        self._step: int | None = None
        self._is_watching, self._steps_to_watch = False, 0
        # Copies of parameters that have not changed in this step, shared by its snapshots.
        self._unchanged: dict[int, tuple[int, Tensor]] = {}

    # --- finding the state -------------------------------------------------------------------------------------------

    def _scan(self) -> None:
        """List everything that may change; repeated when modules were added, removed or changed their mode."""
        self._modules = _all_modules([*self._roots, *modules_in(self._own_attributes().values())])
        self._inner = [m._modules for m in self._modules]
        self._modes, self._children = self._modes_and_children()
        # torch's own layers keep no state in plain attributes, unless a hook stores it there, and reading them would
        # take most of the time.
        custom = [m for m in self._modules if not type(m).__module__.startswith("torch.nn.modules") or _has_hooks(m)]
        self._attributes = list(map(vars, custom))
        self._members = [m._modules for m in custom if m._modules] + [m._buffers for m in self._modules if m._buffers]
        if self._watches_parameters:
            frozen = (
                m for m in self._modules if any(p is not None and not p.requires_grad for p in m._parameters.values())
            )
            self._members += [m._parameters for m in frozen]
        self._list_names()
        self._always_copied = {  # BatchNorm's kernels update buffers without incrementing their version counters
            id(b) for m in self._modules if isinstance(m, _NormBase) for b in m._buffers.values() if b is not None
        }
        found: dict[int, Tensor] = {}
        tracked: dict[int, Any] = {}
        attributes = [{k: v for k, v in vars(m).items() if k not in _OF_EVERY_MODULE} for m in self._modules]
        for values in (*attributes, *(m._buffers for m in self._modules), self._own_attributes()):
            found.update((id(v), v) for v in values.values() if _is_state(v))
            tracked.update((id(v), v) for v in values.values() if is_mutable(v) and not is_data(v))
        tracked.update((id(v), v) for v in self._also_tracked if is_mutable(v))
        parameters = [p for m in self._modules for p in m._parameters.values() if p is not None]
        if self._watches_parameters:
            found.update((id(p), p) for p in parameters if _is_state(p))
        # Restoring a view of a trained weight, such as its `.data`, would undo the perturbation.
        self._trained = {address(p) for p in parameters if p.requires_grad} - {None}
        self._tensors = [t for t in found.values() if address(t) not in self._trained]
        self._tracked = list(tracked.values())
        self._choose_copies()
        self._is_scanned, self._steps_to_watch = True, _WATCHED_STEPS

    def _list_names(self) -> None:
        """List the attribute names; repeated whenever they have changed."""
        owner = [] if self._owner is None else [vars(self._owner)]
        self._namespaces = [Namespaces(self._attributes, _OF_EVERY_MODULE), Namespaces(self._members)]
        self._own = Namespaces(owner, self._ignored)

    def _choose_copies(self) -> None:
        """Choose which values to copy from now on."""
        copied = self._mutated | self._always_copied
        self._copied = [i for i, t in enumerate(self._tensors) if id(t) in copied]
        self._shallow: ShallowContents | None = None

    def _modes_and_children(self) -> tuple[list[bool], list[nn.Module | None]]:
        return list(map(_mode, self._modules)), list(chain.from_iterable(map(dict.values, self._inner)))

    def _own_attributes(self) -> dict[str, Any]:
        return {} if self._owner is None else {k: v for k, v in vars(self._owner).items() if k not in self._ignored}

    # --- capture -----------------------------------------------------------------------------------------------------

    def capture(self, random_states: RandomStates | None, step: int, budget: int | None = None) -> Snapshot:
        """Take a snapshot of the current state.

        Args:
            random_states (`RandomStates`, *optional*): Random states to include.
            step (`int`): The optimizer step.
            budget (`int`, *optional*): Maximum bytes of frozen parameters to copy for comparison, smallest first.
        """
        if not self._is_scanned:
            self._scan()
        if step != self._step:
            self._step, self._is_watching = step, self._steps_to_watch > 0
            self._unchanged.clear()
            self._steps_to_watch -= 1
        namespaces, own = self._read()
        copied, tensors = self._copied, self._tensors
        if self._is_watching:
            affordable = {*self._affordable(budget), *(id(tensors[i]) for i in copied)}
            copied = [i for i, t in enumerate(tensors) if id(t) in affordable]
        contents, shallow = self._contents()
        return Snapshot(
            random_states,
            namespaces,
            own,
            tensors,
            versions=list(map(_version, tensors)),
            copies={i: self._copy(tensors[i]) for i in copied},
            addresses=list(map(address, tensors)) if self._is_watching else [],
            contents=contents,
            shallow=shallow,
            is_watched=self._is_watching,
        )

    def _read(self) -> tuple[list[tuple[Namespaces, Values]], tuple[Namespaces, Values]]:
        """Read all attributes."""
        listed = (*self._namespaces, self._own)
        values = [namespaces.read() for namespaces in listed]
        if None in values:
            self._list_names()
            return self._read()
        *of_modules, own = zip(listed, values, strict=True)
        return of_modules, own

    def _contents(self) -> tuple[list[Contents], ShallowContents]:
        """Snapshots of contents; shallow ones are reused while nothing has changed."""
        if self._is_watching:
            return [Contents(v, True, self._trained) for v in self._tracked], ShallowContents([])
        if self._shallow is None or not self._shallow.are_unchanged():
            quiet = [Contents(v, False, self._trained) for v in self._tracked if id(v) not in self._mutated]
            self._shallow = ShallowContents(
                [one for one in quiet if all(is_checked_jointly(inner.value) for inner in one.nested())]
            )
            known = {id(one.value) for one in self._shallow.contents}
            self._contents_to_copy = [v for v in self._tracked if id(v) not in known]
        copied = [Contents(v, id(v) in self._mutated, self._trained) for v in self._contents_to_copy]
        return copied, self._shallow

    def _copy(self, tensor: Tensor) -> Tensor:
        version, value = self._unchanged.get(id(tensor), (None, None))
        return value if version == tensor._version and id(tensor) not in self._mutated else tensor.detach().clone()

    def refresh_snapshot(self, snapshot: Snapshot, budget: int | None = None) -> None:
        """Add modules that are new or changed their mode; called between `model.train()` and the forward."""
        if self._is_scanned:
            modes, children = self._modes_and_children()
            if (
                modes == self._modes
                and len(children) == len(self._children)
                and are_identical(children, self._children)
            ):
                return
        self._is_scanned, self._step = False, None
        now = self.capture(None, -1, budget)
        known = {id(d) for namespaces, _ in snapshot.namespaces for d in namespaces.dictionaries}
        added = [namespaces.excluding(known) for namespaces, _ in now.namespaces]
        snapshot.namespaces += [(namespaces, namespaces.read()) for namespaces in added]
        snapshot.tensors, snapshot.versions, snapshot.copies = now.tensors, now.versions, now.copies
        snapshot.contents, snapshot.shallow = now.contents, now.shallow
        snapshot.is_watched, snapshot.addresses = now.is_watched, now.addresses

    def _affordable(self, budget: int | None) -> Iterator[int]:
        """Yield the ids of buffers and attributes, and of frozen parameters within the budget."""
        for tensor in sorted(self._tensors, key=Tensor.numel):
            if isinstance(tensor, nn.Parameter) and budget is not None:
                if tensor.nbytes > budget:
                    continue
                budget -= tensor.nbytes
            if is_plain(tensor) and tensor.device.type != "meta":
                yield id(tensor)

    def detect_changes(self, before: Snapshot) -> None:
        """Find out what the clean pass changed in place.

        Args:
            before (`Snapshot`): The snapshot taken before the pass.
        """
        known = len(self._mutated)
        if before.is_watched or list(map(_version, before.tensors)) != before.versions:
            self._detect_changed_tensors(before)
        shallow = [] if before.shallow.are_unchanged() else before.shallow.contents
        for contents in (*before.contents, *shallow):
            if id(contents.value) not in self._mutated and contents.has_changed():
                self._mutated.add(id(contents.value))
                before.is_restorable &= contents.is_deep
        if len(self._mutated) != known:
            self._choose_copies()
        for namespaces, values in before.namespaces:
            if not namespaces.match(values) and any(
                namespaces.included(now).keys() != then.keys() or _modules_differ(now, then)
                for now, then in namespaces.changed(values)
            ):
                self._is_scanned = False  # a new attribute or module: list again

    def _detect_changed_tensors(self, before: Snapshot) -> None:
        for i, (tensor, version) in enumerate(zip(before.tensors, before.versions, strict=True)):
            if id(tensor) in self._mutated:
                continue
            value = before.copies.get(i)
            has_moved = tensor._version != version or (before.is_watched and address(tensor) != before.addresses[i])
            if has_moved or (before.is_watched and value is not None and not torch.equal(tensor, value)):
                self._mutated.add(id(tensor))
                before.is_restorable &= value is not None  # otherwise the previous value is lost
            elif before.is_watched and value is not None and isinstance(tensor, nn.Parameter):
                self._unchanged[id(tensor)] = version, value

    # --- restore -----------------------------------------------------------------------------------------------------

    def restore(self, snapshot: Snapshot) -> None:
        """Restore the state of the snapshot."""
        if snapshot.random_states is not None:
            snapshot.random_states.restore()
        for namespaces, values in snapshot.namespaces:
            if not namespaces.match(values):
                for namespace, before in namespaces.changed(values):
                    _restore_names(namespaces, namespace, before)
        attributes, values = snapshot.own
        if not attributes.match(values):
            for own, before in attributes.changed(values):
                for name in attributes.included(own).keys() - before.keys():
                    del own[name]
                own.update(before)
        for i, value in snapshot.copies.items():
            tensor = snapshot.tensors[i]
            if tensor.requires_grad:  # unfrozen in the meantime: now a trained weight
                continue
            if tensor.shape == value.shape:
                tensor.detach().copy_(value)
            else:
                tensor.data = value.clone()
        for contents in snapshot.contents:
            contents.restore()
        if not snapshot.shallow.are_unchanged():
            for contents in snapshot.shallow.contents:
                contents.restore()


def _all_modules(roots: Iterable[nn.Module]) -> list[nn.Module]:
    """All modules below the roots, including those hidden in lists or objects, as frozen teachers often are."""
    found: dict[int, nn.Module] = {}
    waiting = list(roots)
    while waiting:
        new = [m for m in waiting.pop().modules() if id(m) not in found]
        found.update((id(m), m) for m in new)
        plain = (value for m in new for name, value in vars(m).items() if name not in _OF_EVERY_MODULE)
        waiting.extend(m for m in modules_in(plain) if id(m) not in found)
    return list(found.values())


def _has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, f"_{kind}_hooks") for kind in ("forward", "forward_pre", "backward", "backward_pre"))


def _restore_names(namespaces: Namespaces, now: dict[str, Any], before: dict[str, Any]) -> None:
    for name in [name for name, value in namespaces.included(now).items() if name not in before and _is_data(value)]:
        del now[name]  # flags and callables stay: they often mark a one-time setup, such as installed hooks
    now.update(before)


def _modules_differ(now: dict[str, Any], then: dict[str, Any]) -> bool:
    return any(isinstance(value, nn.Module) and now.get(name) is not value for name, value in then.items())


def _is_data(value: Any) -> bool:
    return not isinstance(value, bool | nn.Module) and not callable(value)


def _is_state(value: Any) -> bool:
    """Whether in-place changes of this tensor must be undone."""
    return isinstance(value, Tensor) and not value.requires_grad and not value.is_inference()
