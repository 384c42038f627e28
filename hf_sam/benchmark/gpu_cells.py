"""The models, batch sizes and precisions in which `hf_sam.benchmark.on_gpu` measures every variant."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

MANY = 10  # variants in memory at the same time, as many as are measured by default


def vit(tiny: bool, hidden: int, heads: int, patch: int) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    size = {
        "hidden_size": hidden,
        "num_hidden_layers": 12,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
    }
    if tiny:
        size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    side = 2 * patch if tiny else 224
    model = ViTForImageClassification(ViTConfig(**size, image_size=side, patch_size=patch, num_labels=10))
    return model, {"pixel_values": torch.randn(3, side, side), "labels": torch.tensor(1)}


def bert(tiny: bool) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    size = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 1536}
    if tiny:
        size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertForSequenceClassification(BertConfig(**size, vocab_size=64 if tiny else 30522, num_labels=10))
    ids = torch.randint(1, 64, (8 if tiny else 128,))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor(1)}


def llama(tiny: bool, lora: bool) -> tuple[Any, dict[str, Tensor]]:
    """A Llama of 0.5 billion parameters with tied embeddings."""
    size = {"hidden_size": 1024, "num_hidden_layers": 30, "num_attention_heads": 16, "num_key_value_heads": 8}
    size |= {"intermediate_size": 4096, "vocab_size": 32000}
    if tiny:
        size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
        size |= {"intermediate_size": 16, "vocab_size": 64}
    model = LlamaForCausalLM(LlamaConfig(**size, tie_word_embeddings=True, use_cache=False))
    if lora:
        from peft import LoraConfig, get_peft_model

        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        model = get_peft_model(model, LoraConfig(r=8, target_modules=targets, init_lora_weights=False))
    ids = torch.randint(1, 64, (8 if tiny else 512,))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


@dataclass(frozen=True)
class Model:
    """
    A model to measure.

    Args:
        build (`Callable`): Returns the model and one example; the argument says whether the model should be tiny.
        batches (`tuple[int, int]`): A batch size that leaves a large GPU partly idle, and one that fills it.
        home (`str`): The precision in which the model is usually trained; its cells come first.
        at_once (`int`): Number of variants in memory at the same time.
    """

    build: Callable[[bool], tuple[Any, dict[str, Tensor]]]
    batches: tuple[int, int]
    home: str
    at_once: int = MANY


AUTOCAST, TF32, PURE, COMPILED = "bf16 autocast", "fp32 with TF32", "pure bf16", "bf16 autocast, compiled"
PRECISIONS = (AUTOCAST, TF32, PURE, COMPILED)
MODELS: dict[str, Model] = {
    "ViT-S/14": Model(lambda tiny: vit(tiny, 384, 6, 14), (8, 128), AUTOCAST),
    "ViT-B/16": Model(lambda tiny: vit(tiny, 768, 12, 16), (8, 128), AUTOCAST),
    "MiniLM": Model(bert, (8, 256), TF32),
    "Llama 0.5B, LoRA": Model(lambda tiny: llama(tiny, True), (1, 16), PURE, 5),
    "Llama 0.5B": Model(lambda tiny: llama(tiny, False), (1, 16), AUTOCAST, 4),
}


@dataclass(frozen=True)
class Cell:
    """One setting; `fills` says whether the batch is meant to fill the GPU."""

    model: str
    precision: str
    batch_size: int
    fills: bool

    def __str__(self) -> str:
        return f"{self.model}, {self.precision}, batch {self.batch_size}"


def cells(tiny: bool) -> list[Cell]:
    """All cells: first every model in its home precision, then the first model in the others, then the rest."""
    found = []
    for (name, model), precision, fills in itertools.product(MODELS.items(), PRECISIONS, (True, False)):
        batch_size = 2 + fills if tiny else model.batches[fills]
        rank = 0 if precision == model.home else 1 if name == next(iter(MODELS)) else 2
        found.append((rank, Cell(name, precision, batch_size, fills)))
    return [cell for _, cell in sorted(found, key=lambda entry: entry[0])]
