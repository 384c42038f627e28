"""Arguments and trainers for one process on one device, the CPU or the first GPU."""

from __future__ import annotations

from pathlib import Path

import torch
from integration import tiny
from transformers import Trainer, TrainingArguments

from hf_sam import SAMConfig


def arguments(device: torch.device, folder: Path, **overrides) -> TrainingArguments:
    """`tiny.arguments` on `device`; of several GPUs one is used."""
    args = tiny.arguments(folder, use_cpu=device.type == "cpu", **overrides)
    assert args.device.type == device.type
    args._n_gpu = min(args.n_gpu, 1)
    return args


def trained(
    device: torch.device, folder: Path, sam: SAMConfig | None, *, model=None, data=None, **overrides
) -> Trainer:
    """A watched run, of an `Mlp` unless another model is given; `sam=None` is the stock Trainer's."""
    tiny.set_seed(2)
    kwargs = {
        "model": tiny.mlp() if model is None else model,
        "args": arguments(device, folder, **overrides),
        "train_dataset": tiny.vectors() if data is None else data,
    }
    trainer = tiny.WatchedTrainer(**kwargs) if sam is None else tiny.WatchedSAMTrainer(**kwargs, sam_config=sam)
    trainer.train()
    assert next(trainer.model.parameters()).device.type == device.type
    return trainer


def course(trainer) -> torch.Tensor:
    """The weights after every step, on the CPU."""
    return torch.stack(trainer.trajectory).cpu()
