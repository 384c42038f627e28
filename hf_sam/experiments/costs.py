"""The cost of a run across interruptions: each checkpoint stores the cost of the steps before it."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from ..update.schedule import Schedule

COSTS_NAME = "costs.json"  # in each checkpoint


class CostKeeper(TrainerCallback):
    """
    Count seconds, passes and losses between interruptions, and store them in every checkpoint for a resumed run.

    Steps of a killed run after its last checkpoint are repeated, and counted once.

    Args:
        trainer (`transformers.Trainer`): The trainer of the run, before training.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.earlier: list[dict[str, Any]] = []
        self.begin: int | None = None  # None until training begins
        self._started = 0.0
        self._loss_sum, self._loss_steps, self._last_logged = 0.0, 0, 0

    @property
    def is_whole(self) -> bool:
        """Whether the cost of all steps since the first is known."""
        return not self.begin or (bool(self.earlier) and self.earlier[0]["begin"] == 0)

    def segments(self) -> list[dict[str, Any]]:
        """The earlier segments, and the present one so far."""
        if self.begin is None:
            return []
        step = self.trainer.state.global_step
        present = {
            "begin": self.begin,
            "end": step,
            "seconds": time.monotonic() - self._started,
            "passes": planned_passes(self.trainer, self.begin, step),
            "loss_sum": self._loss_sum,
            "loss_steps": self._loss_steps,
        }
        return [*self.earlier, present]

    # --- called by the Trainer ---------------------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, **kwargs):
        self.begin = self._last_logged = state.global_step
        self._started = time.monotonic()
        self._loss_sum, self._loss_steps = 0.0, 0
        self.earlier = read_segments(checkpoint_of(args, self.begin)) if self.begin else []

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_save and args.logging_strategy != IntervalStrategy.NO:
            control.should_log = True  # otherwise a resumed run would lose the losses since the last entry

    on_epoch_end = on_step_end

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}):
            steps = state.global_step - self._last_logged
            self._loss_sum += logs["loss"] * steps
            self._loss_steps += steps
            self._last_logged = state.global_step

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            (folder / COSTS_NAME).write_text(json.dumps(self.segments()), encoding="utf-8")

    def on_train_end(self, args, state, control, **kwargs):
        """Make the last log entry cover the whole run, if the earlier segments are known."""
        entry = next((entry for entry in reversed(state.log_history) if "train_runtime" in entry), None)
        if entry is not None and self.begin and self.is_whole:
            entry |= self.whole(entry)

    # -----------------------------------------------------------------------------------------------------------------

    def whole(self, metrics: dict[str, float]) -> dict[str, float]:
        """The metrics of the Trainer's last call of `train`, extended to the whole run."""
        runtime, begin, steps = metrics["train_runtime"], self.begin or 0, self.trainer.state.global_step
        seconds = runtime + sum(entry["seconds"] for entry in self.earlier)
        # before transformers 5.4, the Trainer divided the losses of this call by the steps of the whole run
        divisor = steps - begin if hasattr(self.trainer, "_initial_global_step") else steps
        counted = sum(entry["loss_steps"] for entry in self.earlier) + steps - begin
        losses = sum(entry["loss_sum"] for entry in self.earlier) + metrics.get("train_loss", 0.0) * divisor
        found = {"train_runtime": round(seconds, 4), "train_loss": losses / max(counted, 1)}
        if seconds > 0:
            batch = self.trainer.args.train_batch_size * self.trainer.args.gradient_accumulation_steps
            samples = steps * batch * self.trainer.args.world_size
            found["train_samples_per_second"] = round(samples / seconds, 3)
            found["train_steps_per_second"] = round(steps / seconds, 3)
        return {name: value for name, value in found.items() if name in metrics}


def planned_passes(trainer: Any, begin: int, end: int) -> float:
    """Number of gradient evaluations of the whole effective batch in steps `begin` to `end - 1`."""
    config = getattr(trainer, "sam_config", None)
    if config is None or config.rho == 0 or begin >= end:
        return float(end - begin)
    max_steps = max(trainer.state.max_steps, end)
    schedule = Schedule.resolve(config, max_steps, trainer.args.get_warmup_steps(max_steps))
    return float(sum(map(schedule.passes, range(begin, end))))


def checkpoint_of(args: Any, step: int) -> Path:
    """The checkpoint from which a run resumes at `step`: the one in the arguments, else the one in `output_dir`."""
    named = re.search(r"checkpoint-(\d+)/*$", str(args.resume_from_checkpoint))
    if named and int(named[1]) == step:
        return Path(args.resume_from_checkpoint)
    return Path(args.output_dir) / f"checkpoint-{step}"


def read_segments(checkpoint: Path) -> list[dict[str, Any]]:
    """The cost of the steps before a checkpoint; empty if it is not stored."""
    try:
        found = json.loads((checkpoint / COSTS_NAME).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return []
    return found if isinstance(found, list) and found and found[0].get("begin") == 0 else []
