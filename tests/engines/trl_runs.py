"""TRL's SFTTrainer with the mixin on two processes: named runs, each returning what a test compares."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from engines.sharded_runs import Result, Trajectory, loaded
from integration import tiny
from integration.test_other_trainers import Tokens, common
from trl import SFTConfig, SFTTrainer

from hf_sam import SAMConfig, SAMTrainerMixin


class SAMSFTTrainer(SAMTrainerMixin, SFTTrainer):
    pass


def sft(layout: str | None, rho: float | None, folder: Path) -> Result:
    """On sequences of different lengths; `rho=None` is TRL's own trainer, `layout=None` shards nothing."""
    tiny.set_seed(2)
    rows = [{"input_ids": row["input_ids"].tolist()[: 4 + i % 5]} for i, row in enumerate(tiny.texts())]
    options = common(
        folder,
        max_length=16,
        optim="sgd",
        learning_rate=0.5,
        train_sampling_strategy="sequential",
        per_device_train_batch_size=4 // int(os.environ.get("WORLD_SIZE", 1)),
        gradient_checkpointing=False,
    )
    kwargs = {
        "model": loaded(folder, layout, torch.float32),
        "args": SFTConfig(**options),
        "train_dataset": Dataset.from_list(rows),
        "processing_class": Tokens(),
    }
    trainer = (
        SFTTrainer(**kwargs) if rho is None else SAMSFTTrainer(**kwargs, sam_config=SAMConfig(rho=rho, scope="global"))
    )
    trajectory = Trajectory(trainer)
    trainer.add_callback(trajectory)
    trainer.train()
    return {"trajectory": torch.stack(trajectory.points), "log": trainer.state.log_history}


def two_processes() -> dict[str, Callable[[Path], Result]]:
    table: dict[str, Callable[[Path], Result]] = {}
    for name, layout in (("ddp", None), ("fsdp", "fsdp")):
        for rho in (None, 1e-30, 0.1):
            table[f"sft {name} {rho}"] = functools.partial(sft, layout, rho)
    return table
