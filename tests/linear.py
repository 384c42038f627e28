"""A Trainer small enough for every test of the harness: a linear classifier on random features."""

from __future__ import annotations

import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput


class Linear(torch.nn.Module):
    def __init__(self, features=4, classes=3):
        super().__init__()
        self.classifier = torch.nn.Linear(features, classes)

    def forward(self, x=None, labels=None):
        logits = self.classifier(x)
        loss = torch.nn.functional.cross_entropy(logits, labels) if labels is not None else None
        return SequenceClassifierOutput(loss=loss, logits=logits)


def linear_data(examples=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, 4, generator=generator)
    return Dataset.from_dict({"x": x.tolist(), "labels": (x[:, :3].argmax(-1)).tolist()})


def trainer_in(output_dir, seed=0, **arguments):
    torch.manual_seed(seed)
    arguments = {
        "max_steps": 4,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        **arguments,
    }
    args = TrainingArguments(output_dir=str(output_dir), seed=seed, disable_tqdm=True, **arguments)
    return Trainer(model=Linear(), args=args, train_dataset=linear_data(), eval_dataset=linear_data(16, seed=1))
