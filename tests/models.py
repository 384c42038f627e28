"""Small models and data for the tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

from hf_sam import SAMConfig, SAMTrainer


class TinyClassifier(nn.Module):
    """Two layers with a normalisation between, and one parameter that no loss ever reaches."""

    def __init__(self, features: int = 5, hidden: int = 4, classes: int = 3, dropout: float = 0.0):
        super().__init__()
        self.first = nn.Linear(features, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.dropout = nn.Dropout(dropout)
        self.second = nn.Linear(hidden, classes)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.second(self.dropout(torch.tanh(self.norm(self.first(x)))))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def tiny_classifier(dtype: torch.dtype = torch.float64, **kwargs) -> TinyClassifier:
    torch.manual_seed(0)
    return TinyClassifier(**kwargs).to(dtype)


def examples(count: int, dtype: torch.dtype = torch.float64) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 5, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(3, (count,), generator=generator)
    return [{"x": x[i], "labels": labels[i]} for i in range(count)]


def stack(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


class InOrder:
    """Visit the training examples in their order, so that a test knows every batch."""

    def _get_train_sampler(self, dataset=None):
        return SequentialSampler(self.train_dataset)


class OrderedSAMTrainer(InOrder, SAMTrainer):
    pass


class OrderedTrainer(InOrder, Trainer):
    pass


def arguments(folder, **kwargs) -> TrainingArguments:
    defaults = {
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "dataloader_num_workers": 0,
    }
    return TrainingArguments(str(folder), **{**defaults, **kwargs})


def train(
    folder, sam_config: SAMConfig | None, model: nn.Module | None = None, data=None, trainer_kwargs=None, **kwargs
):
    """Train with SAM, or with the stock Trainer where `sam_config` is None; returns the trainer."""
    model = tiny_classifier() if model is None else model
    data = examples(8) if data is None else data
    args = arguments(folder, **kwargs)
    common = {"model": model, "args": args, "train_dataset": data, **(trainer_kwargs or {})}
    trainer = OrderedTrainer(**common) if sam_config is None else OrderedSAMTrainer(**common, sam_config=sam_config)
    trainer.train()
    return trainer


def weights(trainer) -> list[Tensor]:
    return [p.detach().clone() for p in trainer.model.parameters()]
