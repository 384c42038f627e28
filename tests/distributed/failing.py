"""One rank fails in the second pass of a step while the others are about to wait for it."""

from __future__ import annotations

import time
from pathlib import Path

from hf_sam import SAMTrainer

MESSAGE = "this rank fails on purpose"


class FailingTrainer(SAMTrainer):
    """The last rank fails in the second pass of the second step, and leaves the time at which it did."""

    passes = 0

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        type(self).passes += 1  # on the trainer it would count clean passes only
        if type(self).passes == 4 and self.accelerator.is_last_process:
            Path(self.args.output_dir, "failed").write_text(str(time.time()))
            raise RuntimeError(MESSAGE)
        return loss


def fail(trainer: FailingTrainer) -> None:
    """Train on one micro-batch a step until the processes end; no run comes after this one."""
    Path(trainer.args.output_dir).mkdir(exist_ok=True)
    trainer.train()
