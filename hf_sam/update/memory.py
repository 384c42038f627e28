"""The state of a method: Vectors and scalars that persist between steps."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from .parameters import local
from .vector import Space, Vector


class Memory(MutableMapping[str, Vector]):
    """Vectors and scalars under declared names.

    If a step may be skipped after its gradients overflowed (fp16), new values are committed only if it was not.

    Args:
        names (`Sequence[str]`): The declared names.
        owner (`str`): The label of the method, for messages.
        scalars (`Sequence[str]`, *optional*): Names of 0-dim tensors.
        defers_commit (`bool`, *optional*, defaults to `False`): Keep new values pending until `commit`.
    """

    def __init__(self, names: Sequence[str], owner: str, defers_commit: bool = False, scalars: Sequence[str] = ()):
        self.names, self._owner, self._defers_commit, self._scalars = (
            (*names, *scalars),
            owner,
            defers_commit,
            frozenset(scalars),
        )
        self._kept: dict[str, Vector] = {}
        self._pending: dict[str, Vector] = {}

    def __getitem__(self, name: str) -> Vector:
        self._check(name)
        value = self._pending[name] if name in self._pending else self._kept[name]
        return value if name in self._scalars else value.view()

    def __setitem__(self, name: str, vector: Vector) -> None:
        self._check(name)
        store = self._pending if self._defers_commit else self._kept
        if name in self._scalars:
            store[name] = torch.as_tensor(vector).detach()
            return
        if not isinstance(vector, Vector):
            raise ValueError(f"step.memory[{name!r}] of {self._owner} must be a Vector, not {type(vector).__name__}.")
        # Weights, optimizer states, the gradient of the step and other values in memory are shared, and change later.
        kept = vector.clone() if vector.is_shared else vector
        store[name] = kept.share().view()

    def __delitem__(self, name: str) -> None:
        self._check(name)
        self._pending.pop(name, None)
        self._kept.pop(name, None)

    def __contains__(self, name: object) -> bool:
        return name in self._pending or name in self._kept

    def __iter__(self) -> Iterator[str]:
        return iter({**self._kept, **self._pending})

    def __len__(self) -> int:
        return len({**self._kept, **self._pending})

    def _check(self, name: str) -> None:
        if name not in self.names:
            raise ValueError(
                f"{self._owner} uses step.memory[{name!r}] without declaring it: write memory = "
                f"{(*self.names, name)!r} in the class so that checkpoints keep it."
            )

    @property
    def is_complete(self) -> bool:
        """Whether every declared name has a value."""
        return all(name in self for name in self.names)

    def commit(self, was_skipped: bool) -> None:
        """Keep the values written in the previous step, or drop them if it was skipped."""
        if not was_skipped:
            self._kept.update(self._pending)
        self._pending.clear()

    def state_dict(self, names: dict[Parameter, str]) -> dict[str, Tensor]:
        """One tensor per name and parameter, under `name/parameter`, and one per scalar, under `name/`.

        No two of them share memory.
        """
        scalars = {f"{name}/": self[name].clone() for name in self if name in self._scalars}
        return scalars | {
            f"{name}/{names[p]}": tensor
            for name, vector in self.items()
            if name not in self._scalars
            for p, tensor in zip(vector.parameters, vector.numbers(), strict=True)
            if p in names
        }

    def load_state_dict(self, state: dict[str, Tensor], parameters: dict[str, Parameter], space: Space) -> None:
        """Load a `state_dict`. Keys without a name belong to the first declared name.

        Raises:
            ValueError: A tensor does not have the shape of this process's shard of its parameter.
        """
        found: dict[str, dict[Parameter, Tensor]] = {}
        for key, tensor in state.items():
            name, _, parameter = key.rpartition("/")
            if not parameter:
                self[name] = tensor
            name = name or self.names[0]
            if parameter not in parameters:
                continue
            here = local(parameters[parameter]).shape
            if tensor.shape != here:
                raise ValueError(
                    f"The checkpoint holds a shard of {parameter} of shape {list(tensor.shape)}, but this process has one of shape "
                    f"{list(here)}. Resume a sharded run with the same number of processes and the same sharding."
                )
            found.setdefault(name, {})[parameters[parameter]] = tensor
        for name, tensors in found.items():
            # In the order of the model, so that norms are summed in the same order as before.
            ordered = sorted(tensors, key=lambda p: space.position[p])
            self[name] = Vector(ordered, [tensors[p] for p in ordered], space)
        self.commit(was_skipped=False)
