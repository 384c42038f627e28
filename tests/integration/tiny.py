"""Tiny models, data and runs that the integration and distributed tests share. Everything is built from a seed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from hf_sam import SAMConfig, SAMTrainer

VOCABULARY = 32
CLASSES = 3


# --- models ------------------------------------------------------------------------------------------------------


class Mlp(nn.Module):
    """Two layers, with what a test asks for in between: BatchNorm, dropout, a branch that only some examples use."""

    def __init__(self, *, batch_norm: bool = False, dropout: float = 0.0, branch: bool = False):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8) if batch_norm else nn.LayerNorm(8)
        self.dropout = nn.Dropout(dropout)
        self.branch = nn.Linear(8, 8) if branch else None
        self.last = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        hidden = self.dropout(torch.tanh(self.norm(self.first(x))))
        if self.branch is not None and x[0, 0] > 0:
            hidden = hidden + self.branch(hidden)
        logits = self.last(hidden)
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def mlp(dtype: torch.dtype = torch.float32, **options) -> Mlp:
    set_seed(0)
    return Mlp(**options).to(dtype)


def vit(dropout: float = 0.0) -> ViTForImageClassification:
    set_seed(0)
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=8,
            patch_size=4,
            num_labels=CLASSES,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
    )


def bert(dropout: float = 0.0) -> BertForSequenceClassification:
    set_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
            num_labels=CLASSES,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
    )


def llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Untied embeddings; its loss is normalised by `num_items_in_batch`."""
    set_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=32,
            max_position_embeddings=16,
            use_cache=False,
            pad_token_id=0,
        )
    ).to(dtype)


def gpt2(dropout: float = 0.0) -> GPT2LMHeadModel:
    """The output layer is tied to the input embedding."""
    set_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=16,
            use_cache=False,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def with_lora(model: PreTrainedModel, targets: list[str], dropout: float = 0.0):
    """A LoRA adapter on a frozen base; neither of its matrices starts at zero, so that both have gradients."""
    from peft import LoraConfig, get_peft_model

    set_seed(1)
    config = LoraConfig(r=2, target_modules=targets, lora_dropout=dropout, init_lora_weights=False)
    return get_peft_model(model, config)


# --- data --------------------------------------------------------------------------------------------------------


def vectors(n: int = 32, dtype: torch.dtype = torch.float32) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 6, generator=generator, dtype=torch.float64).to(dtype)
    return [{"x": row, "labels": int(i % CLASSES)} for i, row in enumerate(x)]


def images(n: int = 32) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(n, 3, 8, 8, generator=generator)
    return [{"pixel_values": image, "labels": int(i % CLASSES)} for i, image in enumerate(pixels)]


def sentences(n: int = 32) -> list[dict[str, Any]]:
    """Token sequences with a class label."""
    return [{"input_ids": text["input_ids"], "labels": i % CLASSES} for i, text in enumerate(texts(n))]


def texts(n: int = 32) -> list[dict[str, Any]]:
    """Causal language modelling; the number of labelled tokens differs from example to example."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (n, 8), generator=generator)
    labels = ids.clone()
    for i in range(n):
        labels[i, : i % 6] = -100
    return [{"input_ids": row, "labels": target} for row, target in zip(ids, labels, strict=True)]


class Stream(IterableDataset):
    """The same examples without a length."""

    def __init__(self, examples: list[dict[str, Any]]):
        self.examples = examples

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.examples)


# --- runs --------------------------------------------------------------------------------------------------------


def arguments(folder: Path | str, **overrides) -> TrainingArguments:
    """A short deterministic run on the CPU that keeps the order of the data and writes no checkpoints."""
    defaults = {
        "output_dir": str(folder),
        "use_cpu": True,
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 3,
    }
    for name in ("activation_checkpointing", "activation_checkpointing_kwargs"):
        if name in overrides and not hasattr(TrainingArguments, name):  # before transformers 5.23
            overrides[name.replace("activation", "gradient")] = overrides.pop(name)
    return TrainingArguments(**{**defaults, **overrides})


# Not on the trainers themselves, where what the second pass collects is taken back.
_PASSES: WeakKeyDictionary[Trainer, list[tuple[int, Tensor]]] = WeakKeyDictionary()


class Watched:
    """Mixed into a trainer: notes every forward pass of the training loop and the weights after every step.

    Attributes:
        passes (`list[tuple[int, Tensor]]`): Optimizer step, and all trainable parameters as one vector, per forward.
        trajectory (`list[Tensor]`): The same vector after every optimizer step.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.trajectory: list[Tensor] = []
        self.add_callback(_NoteWeights(self))

    @property
    def passes(self) -> list[tuple[int, Tensor]]:
        return _PASSES.setdefault(self, [])

    def compute_loss(self, model, inputs, *args, **kwargs):
        if self.model.training:
            self.passes.append((self.state.global_step, flat(self.model)))
        return super().compute_loss(model, inputs, *args, **kwargs)


class _NoteWeights(TrainerCallback):
    def __init__(self, trainer):
        self._trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        self._trainer.trajectory.append(flat(self._trainer.model))


class WatchedTrainer(Watched, Trainer):
    """The stock Trainer, watched."""


class WatchedSAMTrainer(Watched, SAMTrainer):
    """Ours, watched: `Watched.compute_loss` sees the passes of both kinds."""


def trainer_for(model: nn.Module, data, folder, sam: SAMConfig | None, *, extra: dict | None = None, **overrides):
    """A watched trainer, not yet run; `sam=None` is the stock one."""
    set_seed(2)
    kwargs = {"model": model, "args": arguments(folder, **overrides), "train_dataset": data, **(extra or {})}
    return WatchedTrainer(**kwargs) if sam is None else WatchedSAMTrainer(sam_config=sam, **kwargs)


def trained(model: nn.Module, data, folder, sam: SAMConfig | None, **options):
    """The same, run."""
    trainer = trainer_for(model, data, folder, sam, **options)
    trainer.train()
    return trainer


def flat(model: nn.Module) -> Tensor:
    """All trainable parameters as one new vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters and buffers."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Whether both hold the same names and bitwise the same values."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def logged(trainer, key: str) -> list[float]:
    """The values of `key` in the order in which they were logged."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def assert_same_run(ours, stock, *, passes: int = 2):
    """Both trainers took bitwise the same steps and logged the same, and ours ran `passes` times the passes."""
    assert len(ours.passes) == passes * len(stock.passes)
    assert torch.equal(torch.stack(ours.trajectory), torch.stack(stock.trajectory))
    assert same_bits(state(ours.model), state(stock.model))
    for key in ("loss", "grad_norm", "learning_rate", "epoch"):
        assert logged(ours, key) == logged(stock, key)
