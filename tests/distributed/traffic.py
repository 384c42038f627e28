"""What ranks send each other in one optimizer step, counted where torch hands collectives to their backend."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Trainer, TrainerCallback

# What the tests of every engine count, and the documentation says: gathered and reduced in one optimizer step of two
# micro-batches on two ranks, in units of the bytes of all parameters. None is the stock Trainer.
COUNTED: dict[str, dict[str | None, tuple[float, float]]] = {
    "DDP": {None: (0.0, 1.0), "micro": (0.0, 1.0), "device": (0.0, 1.0), "global": (0.0, 2.0)},
    "FSDP2": {None: (3.8, 1.0), "global": (7.6, 2.0)},
    "ZeRO-0": {None: (0.0, 1.0), "micro": (0.0, 1.0), "device": (0.0, 1.0), "global": (0.0, 2.0)},
    "ZeRO-1": {None: (1.0, 1.0), "micro": (1.0, 1.0), "device": (1.0, 1.0), "global": (1.0, 2.0)},
    "ZeRO-2": {None: (1.0, 2.0), "micro": (1.0, 2.0), "device": (1.0, 2.0), "global": (1.0, 3.0)},
    "ZeRO-3": {None: (2.0, 2.0), "global": (4.0, 4.0)},
}


class Traffic(TorchDispatchMode):
    """Adds up, for each kind of collective, the bytes that all ranks together gather, scatter or reduce."""

    def __init__(self):
        super().__init__()
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            name = function._schema.name.removeprefix("c10d::").strip("_").removesuffix("_base")
            whole = args[1] if "scatter" in name else args[0]  # (result, given, ...), or what is changed in place
            size = sum(t.numel() * t.element_size() for t in tree_leaves(whole) if isinstance(t, Tensor))
            self.bytes[name] = self.bytes.get(name, 0) + size
        return function(*args, **(kwargs or {}))


class _AtEachStep(TrainerCallback):
    def __init__(self, traffic: Traffic):
        self._traffic = traffic
        self.totals: list[dict[str, int]] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.totals.append(dict(self._traffic.bytes))


def bytes_of_a_step(trainer: Trainer) -> dict[str, int]:
    """Train; bytes by kind of collective in the last step, when all that happens once has happened."""
    with Traffic() as traffic:
        steps = _AtEachStep(traffic)
        trainer.add_callback(steps)
        trainer.train()
    before, after = steps.totals[-2:]
    return {kind: after[kind] - before.get(kind, 0) for kind in after if after[kind] > before.get(kind, 0)}


def in_units_of_the_parameters(run: dict[str, Any]) -> tuple[float, float]:
    """What a run's `bytes` gathered and reduced, as multiples of its `parameters`."""
    gathered = sum(size for kind, size in run["bytes"].items() if "gather" in kind)
    reduced = sum(size for kind, size in run["bytes"].items() if "reduce" in kind)
    return round(gathered / run["parameters"], 1), round(reduced / run["parameters"], 1)
