"""Trainers that pause after a few optimizer steps, so that several can take turns.

`train()` prepares the run with the Trainer's own code (model, optimizer, scheduler, data loader, callbacks) and returns
before the first step; `take_steps` then runs the Trainer's own loop over the next batches. No part of a step is
reimplemented here, and the weights after n steps are bitwise those of an ordinary run.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from ..trainer import SAMTrainerMixin
from ..update.random_states import RandomStates
from .reference_loop import TwoPassLoop
from .variants import Variant


class SteppedMixin:
    """
    Mixin for a `Trainer` that runs step by step; see the module's docstring.

    Attributes:
        clock (`StepClock`): Times of the optimizer steps so far.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.clock = StepClock(self.args.device)
        self.add_callback(self.clock)

    def prepare(self) -> None:
        """Run everything before the first step."""
        self.train()
        self._batches = _without_end(self._loop["train_dataloader"])
        self._random_states = RandomStates([self.args.device])

    def take_steps(self, count: int) -> None:
        """Take the next `count` optimizer steps, with this trainer's own random states."""
        elsewhere = RandomStates([self.args.device])
        self._random_states.restore()
        window = self.args.gradient_accumulation_steps
        self._take(list(islice(self._batches, count * window)), window)
        self._random_states = RandomStates([self.args.device])
        elsewhere.restore()

    def close(self) -> None:
        """Run everything after the last step."""
        super()._finalize_training(*self._ending)

    def _take(self, batches: list[dict[str, Any]], window: int) -> None:
        self.control.should_training_stop = False
        loop = {
            **self._loop,
            "train_dataloader": batches,
            "steps_in_epoch": len(batches),
            "num_update_steps_per_epoch": len(batches) // window,
        }
        super()._run_epoch(**loop)

    # --- the two places where the Trainer's `train` is paused

    def _run_epoch(self, **loop: Any) -> None:
        self._loop = loop
        self.control.should_training_stop = True

    def _finalize_training(self, *ending: Any) -> None:
        self._ending = ending


class SteppedTrainer(SteppedMixin, Trainer):
    """The stock Trainer, step by step."""


class SteppedSAMTrainer(SteppedMixin, SAMTrainerMixin, Trainer):
    """`SAMTrainer`, step by step."""


class ReferenceLoopTrainer(SteppedTrainer):
    """
    A stock Trainer that prepares the run, while a hand-written loop takes the steps.

    Args:
        rho (`float`): Size of the perturbation.
        loop (`type`, *optional*, defaults to `TwoPassLoop`): The loop.
    """

    def __init__(self, *args, rho: float, loop: type[TwoPassLoop] = TwoPassLoop, **kwargs):
        super().__init__(*args, **kwargs)
        self._rho, self._loop_class = rho, loop

    def prepare(self) -> None:
        super().prepare()
        self._reference_loop = self._loop_class(
            self._loop["model"], self.optimizer, self.lr_scheduler, self.accelerator, self._rho, self.args.max_grad_norm
        )

    def _take(self, batches: list[dict[str, Any]], window: int) -> None:
        for first in range(0, len(batches), window):
            self.clock.start()
            self._reference_loop.step(batches[first : first + window])
            self.clock.stop()
            self.state.global_step += 1


def stepped_trainer(variant: Variant, **kwargs: Any) -> SteppedTrainer | SteppedSAMTrainer:
    """The trainer of a variant; `kwargs` are those of any Trainer."""
    if variant.loop is not None:
        return ReferenceLoopTrainer(rho=variant.sam.rho, loop=variant.loop, **kwargs)
    if variant.sam is None:
        return SteppedTrainer(**kwargs)
    return SteppedSAMTrainer(sam_config=variant.sam, **kwargs)


class StepClock(TrainerCallback):
    """
    Time whole optimizer steps, from a fetched batch to zeroed gradients.

    A step includes forward and backward passes, clipping, optimizer and scheduler, but not fetching the batch or
    logging.

    Args:
        device (`torch.device`): The device to synchronize with before and after each step, unless it is the CPU.

    Attributes:
        seconds (`list[float]`): Time of every step.
        watch (context manager, *optional*): Entered at the start and exited at the end of a step, instead of timing it.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self.seconds: list[float] = []
        self.watch: contextlib.AbstractContextManager | None = None

    def start(self) -> None:
        if self.watch is not None:
            self.watch.__enter__()
            return
        self.wait()
        self._began = time.perf_counter()

    def stop(self) -> None:
        if self.watch is not None:
            self.watch.__exit__(None, None, None)
            return
        self.wait()
        self.seconds.append(time.perf_counter() - self._began)

    def on_step_begin(self, args, state, control, **kwargs):
        self.start()

    def on_step_end(self, args, state, control, **kwargs):
        self.stop()

    def wait(self) -> None:
        """Wait for the pending work of the device."""
        if self._device.type != "cpu":
            torch.get_device_module(self._device).synchronize()


def _without_end(dataloader: Any) -> Iterator[dict[str, Any]]:
    while True:
        yield from dataloader
