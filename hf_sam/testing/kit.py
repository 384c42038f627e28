"""A tiny network, its data, and an observed run of the Trainer for the conformance suite."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from ..config import SAMConfig
from ..methods.base import Needs
from ..trainer import SAMTrainer
from ..update.step import RETRY_KEY

CLASSES = 3


class Network(nn.Module):
    """Two linear layers with normalisation and dropout in between, and one unused parameter.

    Attributes:
        factor (`Callable[[], float]`): Returns a factor of the loss; called in every forward pass.
    """

    factor: Callable[[], float] = staticmethod(lambda: 1.0)

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.first = nn.Linear(5, 4)
        self.norm = nn.LayerNorm(4)
        self.dropout = nn.Dropout(dropout)
        self.second = nn.Linear(4, CLASSES)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.second(self.dropout(torch.tanh(self.norm(self.first(x)))))
        return {"loss": F.cross_entropy(logits, labels) * self.factor(), "logits": logits}


def network(needs: Needs, dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The network; a PEFT model with LoRA layers for methods that need one."""
    set_seed(0)
    model = Network(dropout).to(dtype)
    if needs & Needs.ATTACHMENT:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=2, target_modules=["first", "second"], init_lora_weights=False)
        model = get_peft_model(model, lora).to(dtype)
    return model


def examples(count: int, dtype: torch.dtype = torch.float64) -> list[dict[str, Tensor]]:
    """Labelled random vectors from a fixed seed."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 5, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return [{"x": x[i], "labels": labels[i]} for i in range(count)]


def flat(model: nn.Module) -> Tensor:
    """All parameters as one new vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@dataclass
class Run(TrainerCallback):
    """Observations of one run.

    Attributes:
        initial (`Tensor`): The weights before the run.
        trajectory (`list[Tensor]`): The weights after each optimizer step.
        memories (`list[dict[str, Tensor]]`): The method's state after each step.
        passes (`list[tuple[int, str, int]]`): Step, `"forward"` or `"backward"`, and number of examples of every pass
            through the normalisation layer.
    """

    at_pass: Callable[[Run, str], None] | None = None
    at_step: Callable[[int], None] | None = None
    initial: Tensor | None = None
    trajectory: list[Tensor] = field(default_factory=list)
    memories: list[dict[str, Tensor]] = field(default_factory=list)
    passes: list[tuple[int, str, int]] = field(default_factory=list)
    trainer: Trainer | None = None

    @property
    def step(self) -> int:
        """The current step, from 0."""
        return self.trainer.state.global_step

    def watch(self, module: nn.Module) -> None:
        """Record every forward and backward pass through a module."""

        def note(direction: str, count: int) -> None:
            self.passes.append((self.step, direction, count))
            if self.at_pass is not None:
                self.at_pass(self, direction)

        def forward(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            note("forward", len(output))
            if output.requires_grad:
                output.register_hook(lambda gradient: note("backward", len(gradient)))

        module.register_forward_hook(forward)

    def on_step_begin(self, args, state, control, **kwargs):
        if self.at_step is not None:
            self.at_step(state.global_step)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.trajectory.append(flat(model))
        update = getattr(self.trainer, "_sam", None)
        state = {} if update is None else update.state_dict()
        self.memories.append({name: value.clone() for name, value in state.items() if name != RETRY_KEY})


def arguments(folder: Path, needs: Needs, **options) -> TrainingArguments:
    """Arguments of a short run on the CPU, with examples in order and without checkpoints."""
    has_state = bool(needs & Needs.OPTIMIZER_STATE)
    defaults = {
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01 if has_state else 0.1,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch" if has_state else "sgd",
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    return TrainingArguments(str(folder), **{**defaults, **options})


def prepared(
    config: SAMConfig,
    folder: Path,
    *,
    stock: bool = False,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float64,
    scaled: bool = False,
    at_pass: Callable[[Run, str], None] | None = None,
    at_step: Callable[[int], None] | None = None,
    factor: Callable[[Run], float] | None = None,
    **options,
) -> Run:
    """An observed trainer, not yet run.

    Args:
        config (`SAMConfig`): The method.
        folder (`Path`): Folder for checkpoints.
        stock (`bool`): Use the stock Trainer instead.
        dropout (`float`): Dropout of the network.
        dtype (`torch.dtype`): The dtype of weights and data.
        scaled (`bool`): Scale the loss as `fp16=True` does on a GPU.
        at_pass (`Callable`): Called in every forward and backward pass.
        at_step (`Callable`): Called before every step.
        factor (`Callable`): Returns the factor of the loss.
        options: Further `TrainingArguments`.
    """
    needs = config.parts.needs
    model = network(needs, dropout, dtype)
    seen = Run(at_pass, at_step, flat(model))
    inner = next(module for module in model.modules() if isinstance(module, Network))
    seen.watch(inner.norm)
    if factor is not None:
        inner.factor = lambda: factor(seen)
    common = {
        "model": model,
        "args": arguments(folder, needs, **options),
        "train_dataset": examples(64, dtype),
        "callbacks": [seen],
    }
    seen.trainer = Trainer(**common) if stock else SAMTrainer(sam_config=config, **common)
    seen.trainer.remove_callback(PrinterCallback)
    if scaled:
        accelerator = seen.trainer.accelerator
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
        accelerator.unscale_gradients = lambda: accelerator.scaler.unscale_(seen.trainer.optimizer.optimizer)
    return seen


def run(config: SAMConfig, folder: Path, *, resume: Path | None = None, **options) -> Run:
    """Train with a trainer of `prepared` and return the observations; `resume` is a checkpoint to resume from."""
    seen = prepared(config, folder, **options)
    seen.trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return seen


@contextlib.contextmanager
def frozen_garbage() -> Iterator[None]:
    """Exclude existing objects from garbage collection, which the Trainer runs at the start of training."""
    import gc

    is_ours = gc.get_freeze_count() == 0
    gc.collect()
    if is_ours:
        gc.freeze()
    try:
        yield
    finally:
        if is_ours:
            gc.unfreeze()
