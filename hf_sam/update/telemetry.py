"""The values that a step logs, collected on the device and read by the host only when the Trainer logs."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor

from .roles import GROUPS

# Maximum number of pending events; a device finishes them long before this number is reached again.
MAX_PENDING = 64


class Telemetry:
    """The means of scalars since the last log entry.

    Args:
        device (`torch.device`): The device on which tensors are summed.

    Attributes:
        has_recorded (`set[str]`): The names recorded in this run.
    """

    # All names, in the order in which ranks exchange them; `_intended_norm` is used by `Diagnosis` and not logged.
    NAMES = (
        "sam_rho",
        "sam_ascent_grad_norm",
        "sam_perturbation_norm",
        "sam_perturbed_loss",
        "sam_sharpness",
        "sam_cosine",
        "sam_second_order_cosine",
        *(f"sam_share/{group}" for group in GROUPS),
        "_intended_norm",
    )

    def __init__(self, device: torch.device):
        self._device = device
        self._sums: dict[str, Tensor | float] = {}
        self._counts: dict[str, int] = defaultdict(int)
        self._step: dict[str, Tensor] = {}
        self.has_recorded: set[str] = set()

    def record(self, **values: Tensor | float) -> None:
        """Add one observation of each named scalar; tensors stay on their device."""
        self.has_recorded.update(values)
        for name, value in values.items():
            if isinstance(value, Tensor):
                value = value.detach().to(torch.promote_types(value.dtype, torch.float32))
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] += 1

    def add(self, **values: Tensor | float) -> None:
        """Add to sums that run over the micro-batches of one optimizer step."""
        for name, value in values.items():
            self._step[name] = self._step[name] + value if name in self._step else value

    def close_step(self) -> dict[str, Tensor]:
        """Return the sums of the finished step and reset them."""
        sums, self._step = self._step, {}
        return sums

    def drain(self) -> Tensor:
        """Sums and counts of `NAMES` since the last call, float32 of shape `(2, n)`: the same shape on every rank."""
        table = torch.zeros(2, len(self.NAMES), device=self._device)
        for i, name in enumerate(self.NAMES):
            if name in self._sums:
                table[0, i], table[1, i] = self._sums[name], self._counts[name]
        self._sums.clear()
        self._counts.clear()
        return table

    @classmethod
    def means(cls, tables: Tensor) -> dict[str, float]:
        """The means of recorded values over all ranks' tables, shape `(2 * ranks, n)`; synchronises with the device."""
        sums, counts = tables.reshape(-1, 2, len(cls.NAMES)).sum(0).tolist()
        return {name: total / count for name, total, count in zip(cls.NAMES, sums, counts, strict=True) if count}


class Stopwatch:
    """Sum the time of enclosed blocks: by the host's clock for the CPU, otherwise by events without synchronisation.

    Args:
        device (`torch.device`): The device that does the work.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._seconds = 0.0
        self._pending: list[tuple[torch.Event, torch.Event]] = []

    def __enter__(self) -> Stopwatch:
        self._start = self._now()
        return self

    def __exit__(self, *_) -> None:
        if self._device.type == "cpu":
            self._seconds += self._now() - self._start
            return
        self._pending.append((self._start, self._now()))
        if len(self._pending) >= MAX_PENDING:  # read finished events; wait only if the device lags far behind
            running = (i for i, (_, end) in enumerate(self._pending) if not end.query())
            self._read(max(next(running, len(self._pending)), MAX_PENDING // 2))

    def reset(self) -> None:
        """Reset the sum."""
        self._seconds = 0.0
        self._pending.clear()

    def seconds(self) -> float:
        """The sum so far, in seconds; waits for the last event."""
        self._read(len(self._pending))
        return self._seconds

    def _read(self, count: int) -> None:
        for start, end in self._pending[:count]:
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1e3
        del self._pending[:count]

    def _now(self):
        if self._device.type == "cpu":
            return time.perf_counter()
        event = torch.Event(self._device.type, enable_timing=True)
        event.record()
        return event


class Cost:
    """Count the passes of a run, and time them relative to whole training steps.

    Args:
        device (`torch.device`): The device that does the work.
    """

    def __init__(self, device: torch.device):
        self.ascent_passes = self.full_passes = self._micro_batches = 0.0
        self._step_clock, self._pass_clock = Stopwatch(device), Stopwatch(device)
        self._timed_passes = self._timed_micro_batches = 0.0
        self.first_step: int | None = None
        self._is_warm = False

    @contextlib.contextmanager
    def micro_batch(self, step: int) -> Iterator[None]:
        """Enclose one `training_step`; the run's first optimizer step, with its one-time work, is not timed."""
        if self.first_step is None:
            self.first_step = step
        if step > self.first_step and not self._is_warm:
            self._is_warm, self._timed_passes, self._timed_micro_batches = True, 0.0, 0.0
            self._step_clock.reset()
            self._pass_clock.reset()
        with self._step_clock:
            yield
        self._micro_batches += 1
        self._timed_micro_batches += 1

    @contextlib.contextmanager
    def full_pass(self, fraction: float) -> Iterator[None]:
        """Enclose a forward and backward over `fraction` of a micro-batch for all trainable parameters."""
        with self._pass_clock:
            yield
        self.full_passes += fraction
        self._timed_passes += fraction

    def summary(self) -> dict[str, float]:
        """Passes per micro-batch, and the measured time of `training_step` relative to one full pass."""
        if not self._timed_passes:
            return {}
        one_pass = self._pass_clock.seconds() / self._timed_passes
        return {
            "sam_passes": (self.ascent_passes + self.full_passes) / self._micro_batches,
            "sam_cost": self._step_clock.seconds() / self._timed_micro_batches / one_pass,
        }
