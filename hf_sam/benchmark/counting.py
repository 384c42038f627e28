"""Count what a step actually does: forward and backward passes, bytes between processes, peak memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from accelerate.utils import find_batch_size
from torch import Tensor
from torch.autograd.profiler import profile, record_function
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer

from ..methods.base import FORWARD_SHARE


class PassCounter:
    """
    Count the examples in forward and backward passes through a trainer's model.

        with PassCounter(trainer) as count:
            trainer.take_steps(1)
        count.forward  # examples

    A hook counts calls of the whole model as forward passes. Calls of `accelerator.backward` count as backward passes,
    over the examples of the preceding forward pass.
    """

    def __init__(self, trainer: Trainer):
        self._trainer = trainer
        self.forward = self.backward = 0
        self._last = 0

    def totals(self) -> np.ndarray:
        """Examples so far: forward, backward, and whole passes, of which a forward pass counts as a third."""
        passes = FORWARD_SHARE * self.forward + (1 - FORWARD_SHARE) * self.backward
        return np.array([self.forward, self.backward, passes])

    def __enter__(self) -> PassCounter:
        self._hook = self._trainer.model.register_forward_pre_hook(self._see_forward, with_kwargs=True)
        self._backward = self._trainer.accelerator.backward
        self._trainer.accelerator.backward = self._see_backward
        return self

    def __exit__(self, *_) -> None:
        self._hook.remove()
        del self._trainer.accelerator.backward

    def _see_forward(self, model: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._last = find_batch_size(kwargs or args)
        self.forward += self._last

    def _see_backward(self, loss: Tensor, **kwargs) -> None:
        self.backward += self._last
        self._backward(loss, **kwargs)


class PassClock(PassCounter):
    """
    Also time the passes, from the call of the model to the end of `accelerator.backward`.

    The host waits for the device at both ends, so their work no longer overlaps. The time of a step outside its passes
    is therefore overestimated, never underestimated.

    Args:
        trainer (`SteppedMixin`): The trainer.

    Attributes:
        seconds (`float`): Time of all passes so far.
    """

    def __init__(self, trainer: Any):
        super().__init__(trainer)
        self._wait, self.seconds = trainer.clock.wait, 0.0

    def _see_forward(self, *args) -> None:
        super()._see_forward(*args)
        self._wait()
        self._began = time.perf_counter()

    def _see_backward(self, loss: Tensor, **kwargs) -> None:
        super()._see_backward(loss, **kwargs)
        self._wait()
        self.seconds += time.perf_counter() - self._began


class ByteCounter(TorchDispatchMode):
    """
    Count the bytes of the collectives in which this process participates, called by DDP's reducer, FSDP, or the update.

    Each collective counts by its largest buffer (the input of an all-reduce or reduce-scatter, the output of an
    all-gather), whatever its algorithm actually sends.
    """

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its own dispatch comes first, and its calls arrive here again
        result = function(*args, **(kwargs or {}))
        if function.namespace in ("c10d", "_c10d_functional") and "wait" not in function.name():
            self.bytes += max(sum(tensor.nbytes for tensor in _tensors(value)) for value in (*args, result))
        return result


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _tensors(entry)


class PeakMemory:
    """
    Measure the peak memory allocated by torch between `from_here` and the end of the block.

        with PeakMemory() as memory:
            trainer = build()  # inside the block, so that frees match counted allocations
            memory.from_here(trainer.args.device)
            trainer.take_steps(1)
        memory.bytes()

    On an accelerator, this is the allocator's `max_memory_allocated`. The CPU allocator keeps no maximum, so there it
    is the highest running sum of allocations and frees seen by torch's profiler; memory that libraries allocate
    themselves is not counted.
    """

    _MARK = "hf_sam.benchmark: from here"

    def __enter__(self) -> PeakMemory:
        gc.collect()  # otherwise memory of an earlier trainer could be freed, and counted, in this block
        self._profiler = profile(profile_memory=True)
        self._profiler.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._profiler.__exit__(*error)

    def from_here(self, device: torch.device) -> None:
        """Start measuring; earlier peaks are ignored."""
        self._module = None if device.type == "cpu" else torch.get_device_module(device)
        if hasattr(self._module, "reset_peak_memory_stats"):
            self._module.reset_peak_memory_stats()
        with record_function(self._MARK):
            pass

    def bytes(self) -> int | None:
        """The peak in bytes, or None if the device cannot measure it; call it after the block."""
        if self._module is not None:
            return self._module.max_memory_allocated() if hasattr(self._module, "max_memory_allocated") else None
        allocations: list[tuple[int, int]] = []
        pending, since = list(self._profiler.kineto_results.experimental_event_tree()), 0
        while pending:
            event = pending.pop()
            pending.extend(event.children)
            if event.tag.name == "Allocation":
                allocations.append((event.start_time_ns, event.extra_fields.alloc_size))
            elif event.name == self._MARK:
                since = event.start_time_ns
        total = highest = 0
        for moment, size in sorted(allocations, key=lambda allocation: allocation[0]):
            total += size
            if moment >= since:
                highest = max(highest, total)
        return highest
