"""A task that takes milliseconds: a linear classifier, and arguments that make it sleep, fail or die."""

from __future__ import annotations

import argparse
import os
import signal
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_sam.experiments.records import RECORD_NAME, recording


class Linear(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.classifier = torch.nn.Linear(4, 3)

    def forward(self, x=None, labels=None):
        logits = self.classifier(x)
        return SequenceClassifierOutput(loss=torch.nn.functional.cross_entropy(logits, labels), logits=logits)


def data(examples: int, seed: int) -> Dataset:
    x = torch.randn(examples, 4, generator=torch.Generator().manual_seed(seed))
    return Dataset.from_dict({"x": x.tolist(), "labels": x[:, :3].argmax(-1).tolist()})


def main(argv, callbacks=()):
    parser = argparse.ArgumentParser()
    for name in ("output_dir", "task", "condition", "arm", "budget", "resume_from_checkpoint", "save_strategy"):
        parser.add_argument(f"--{name}")
    for name in (
        "disable_tqdm",
        "report_to",
        "subset_seed",
        "noise_seed",
        "validation_size",
        "score_split",
        "save_total_limit",
    ):
        parser.add_argument(f"--{name}")
    for name in ("seed", "max_steps", "save_steps"):
        parser.add_argument(f"--{name}", type=int, default=2)
    for name in ("learning_rate", "sleep"):
        parser.add_argument(f"--{name}", type=float, default=0.01)
    parser.add_argument("--trouble", default="")
    args = parser.parse_args(argv)
    folder = Path(args.output_dir)
    with open(folder / "begun.txt", "a") as file:
        file.write(f"{os.getpid()}\n")
    if args.trouble == "early":
        raise ValueError("nothing to train on")
    torch.manual_seed(args.seed)
    splits = {"train": data(32, args.seed), "test": data(16, 99), "validation": data(8, 98)}
    training = TrainingArguments(
        output_dir=args.output_dir,
        seed=args.seed,
        max_steps=args.max_steps,
        learning_rate=args.learning_rate,
        save_strategy=args.save_strategy,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
    )
    trainer = Trainer(
        model=Linear(),
        args=training,
        train_dataset=splits["train"],
        eval_dataset=splits["test"],
        callbacks=list(callbacks),
    )
    names = {name: getattr(args, name) for name in ("task", "condition", "arm", "budget")}
    with recording(folder / RECORD_NAME, trainer, recipe=vars(args), **names) as record:
        time.sleep(args.sleep)
        if args.trouble == "late":
            raise RuntimeError("loss is nan")
        if args.trouble == "death":
            os.kill(os.getpid(), signal.SIGKILL)
        trainer.train()
        scored = splits[args.score_split or "test"]
        loss = trainer.evaluate(scored)["eval_loss"]
        record.metrics = {"accuracy": 1 / (1 + loss), "examples": len(scored)}
    trainer.save_model()
    with open(folder / "ended.txt", "a") as file:
        file.write(f"{os.getpid()}\n")
    return trainer
