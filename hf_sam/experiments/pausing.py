"""Pausing: a run stops at a step of its full schedule and leaves a checkpoint from which another run resumes."""

from __future__ import annotations

from transformers import TrainerCallback


class BeforeFirstStep(BaseException):
    """Ends training before its first step, with the length of the run known. Not an `Exception`: nothing has failed."""


class PauseAt(TrainerCallback):
    """
    Save a checkpoint after optimizer step `step` and end training there, as if it had been interrupted.

    Args:
        step (`int`): Counted from the start of the whole run; at 0, `BeforeFirstStep` is raised instead.
    """

    def __init__(self, step: int):
        self.step = step

    def on_train_begin(self, args, state, control, **kwargs):
        if self.step == 0:
            raise BeforeFirstStep

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= self.step:
            control.should_save = control.should_training_stop = True
