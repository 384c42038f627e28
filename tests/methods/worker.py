"""One process of `test_rows_ddp.py`: trains every method in both scopes and leaves its weights after each step."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import oracles
import torch
from models import OrderedSAMTrainer, arguments, examples, tiny_classifier
from transformers import TrainerCallback

from hf_sam import SAMConfig

STEPS = 4
CONFIGS = {
    "sam": {"rho": 0.2},
    "asam": {"method": "asam", "rho": 0.5},
    "gsam": {"method": "gsam", "rho": 0.2, "alpha": 0.4, "rho_schedule": "constant"},
    "wsam": {"method": "wsam", "rho": 0.2, "gamma": 0.9},
    "friendly": {"method": "friendly", "rho": 0.2, "sigma": 0.8, "ema_decay": 0.6},
    "looksam": {"method": "looksam", "rho": 0.2, "alpha": 0.7, "interval": 3},
    "functional": {"method": "functional", "rho": 0.2},
    "second_order": {"rho": 0.2, "second_order": True},
    "norm-only": {"method": "norm-only", "rho": 0.5},
    "esam": {"method": "esam", "rho": 0.2},
    "random": {"method": "random", "rho": 0.2},
}


class Weights(TrainerCallback):
    def __init__(self):
        self.trajectory = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.trajectory.append(oracles.flatten(oracles.used_parameters(model)))


def train(folder: Path, config: SAMConfig, batch_size: int, resume: str | None = None, **kwargs) -> torch.Tensor:
    weights = Weights()
    trainer = OrderedSAMTrainer(
        model=tiny_classifier(),
        args=arguments(folder, per_device_train_batch_size=batch_size, max_steps=STEPS, **kwargs),
        train_dataset=examples(8),
        sam_config=config,
        callbacks=[weights],
    )
    trainer.train(resume_from_checkpoint=resume)
    return torch.stack(weights.trajectory)


def main(folder: Path) -> None:
    found, rank = {}, os.environ["RANK"]
    for name, fields in CONFIGS.items():
        for scope in ("device", "global"):
            found[name, scope] = train(folder / name, SAMConfig(**fields, scope=scope), batch_size=4)
    for name in ("friendly", "looksam"):
        config = SAMConfig(**CONFIGS[name], scope="device")
        train(folder / f"{name}_saved", config, 4, save_strategy="steps", save_steps=2)
        checkpoint = str(folder / f"{name}_saved" / "checkpoint-2")
        found[name, "resumed"] = train(folder / f"{name}_resumed", config, 4, resume=checkpoint)
    torch.save(found, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
