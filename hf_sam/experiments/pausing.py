"""A run that stops at a step of its full schedule, leaving a checkpoint from which another one goes on."""

from __future__ import annotations

from transformers import TrainerCallback


class LengthFound(BaseException):
    """Ends a run that began only to learn its length; no `Exception`, since nothing has failed."""

    def __init__(self, steps: int):
        super().__init__(steps)
        self.steps = steps


class PauseAt(TrainerCallback):
    """
    Saves a checkpoint after optimizer step `step` and ends training there, as if it had been interrupted.

    Args:
        step (`int`): Counted from the beginning of the whole run; at 0 no step is taken, and `LengthFound` is raised.
    """

    def __init__(self, step: int):
        self.step = step

    def on_train_begin(self, args, state, control, **kwargs):
        if self.step == 0:
            raise LengthFound(state.max_steps)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= self.step:
            control.should_save = control.should_training_stop = True
