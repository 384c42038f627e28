"""What a step does, counted and not claimed: forward and backward calls, bytes between processes, memory at the peak."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import find_batch_size
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer

from ..methods import FORWARD_SHARE


class PassCounter:
    """
    Counts the examples that go forward and backward through a trainer's model.

        with PassCounter(trainer) as count:
            trainer.take_steps(1)
        count.forward  # examples

    A forward call is one of the whole model, seen by a hook on it; a backward call is one of `accelerator.backward`,
    over the examples of the forward call before it.
    """

    def __init__(self, trainer: Trainer):
        self._trainer = trainer
        self.forward = self.backward = 0
        self._last = 0

    @property
    def passes(self) -> float:
        """Examples in passes of both, a forward one counting as a third."""
        return FORWARD_SHARE * self.forward + (1 - FORWARD_SHARE) * self.backward

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


class ByteCounter(TorchDispatchMode):
    """
    Counts the bytes that this process hands to collectives, whoever calls them: DDP's reducer, FSDP, or the update.

    An all-reduce of n bytes counts n, whatever the algorithm sends for it.
    """

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace in ("c10d", "_c10d_functional", "c10d_functional"):
            self.bytes += sum(tensor.nbytes for tensor in _tensors(args[0]))
        return function(*args, **(kwargs or {}))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _tensors(entry)


@contextmanager
def peak_memory(trainer: Trainer) -> Iterator[Callable[[], int | None]]:
    """
    Measures the peak of the memory that torch has handed out while the block runs.

    On an accelerator it is the allocator's own `max_memory_allocated`. On the CPU, whose allocator keeps no maximum, it
    is what the model, the optimizer and the method hold before the block, plus the highest sum of all allocations and
    frees that the profiler sees in the block; memory that libraries allocate by themselves is not seen.

    Yields:
        `Callable[[], int | None]`: To be called after the block; bytes, or None where the device cannot tell.
    """
    device = trainer.args.device
    if device.type != "cpu":
        module = torch.get_device_module(device)
        if hasattr(module, "reset_peak_memory_stats"):
            module.reset_peak_memory_stats()
        yield lambda: module.max_memory_allocated() if hasattr(module, "max_memory_allocated") else None
        return
    resident = sum({storage.data_ptr(): storage.nbytes() for storage in _storages(trainer)}.values())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        yield lambda: resident + highest
    highest = _highest_sum(profiler)


def _storages(trainer: Trainer) -> Iterator[torch.UntypedStorage]:
    """Of all that stays from step to step."""
    yield from (tensor.untyped_storage() for tensor in (*trainer.model.parameters(), *trainer.model.buffers()))
    kept: list[Iterable] = [state.values() for state in trainer.optimizer.state.values()]
    if getattr(trainer, "_sam", None) is not None:
        kept.append(trainer._sam.state.values())
    yield from (value.untyped_storage() for values in kept for value in values if isinstance(value, Tensor))


def _highest_sum(profiler: profile) -> int:
    events: list[tuple[int, int]] = []
    pending = list(profiler.profiler.kineto_results.experimental_event_tree())
    while pending:
        event = pending.pop()
        pending.extend(event.children)
        if event.tag.name == "Allocation":
            events.append((event.start_time_ns, event.extra_fields.alloc_size))
    total = highest = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        total += size
        highest = max(highest, total)
    return highest
