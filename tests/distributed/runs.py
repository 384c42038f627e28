"""What the processes of the distributed tests do: named runs, each returning what a test compares."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from distributed.failing import FailingTrainer, fail
from distributed.traffic import bytes_of_a_step
from integration import tiny

from hf_sam import SAMConfig

SCOPES = ("micro", "device", "global")
AXES = ("lora", "checkpointing", "bf16", "accumulation")
# The full product of the four axes, and the fewest settings in which every two axes show all pairs of values.
EVERY_SETTING = tuple(itertools.product((0, 1), repeat=len(AXES)))
PAIRWISE = ((0, 0, 0, 0), (0, 1, 1, 1), (1, 0, 1, 1), (1, 1, 0, 1), (1, 1, 1, 0))

Result = dict[str, Any]
Run = Callable[[Path], Result]


def result(trainer, **more) -> Result:
    """What every run hands back."""
    return {
        "trajectory": torch.stack(trainer.trajectory),
        "passes": [weights for _, weights in trainer.passes],
        "state": tiny.state(trainer.accelerator.unwrap_model(trainer.model)),
        "log": trainer.state.log_history,
        **more,
    }


def run(model, data, folder: Path, sam: SAMConfig | None, *, ddp: dict | None = None, **args) -> Result:
    """Train under DDP; `ddp` overrides Accelerate's own arguments for the wrapper."""
    trainer = tiny.trainer_for(model, data, folder, sam, **args)
    for name, value in (ddp or {}).items():
        setattr(trainer.accelerator.ddp_handler, name, value)
    trainer.train()
    return result(trainer)


# --- one wrapped model after another -------------------------------------------------------------------------------


def matrix(setting: tuple[int, ...], scope: str | None, folder: Path) -> Result:
    """A ViT with dropout; a vanishing rho, or the stock Trainer where `scope` is None."""
    lora, checkpointing, bf16, accumulation = setting
    model = tiny.vit(dropout=0.1)
    if lora:
        model = tiny.with_lora(model, ["q_proj", "v_proj"], dropout=0.1)
    sam = None if scope is None else SAMConfig(rho=1e-30, scope=scope)
    return run(
        model,
        tiny.images(),
        folder,
        sam,
        max_steps=2,
        bf16=bool(bf16),
        gradient_accumulation_steps=1 + accumulation,
        activation_checkpointing=bool(checkpointing),
    )


def same_examples(scope: str, batch: int, accumulation: int, folder: Path) -> Result:
    """Float64 SGD with clipping on eight examples a step, however they are divided."""
    return run(
        tiny.mlp(torch.float64),
        tiny.vectors(dtype=torch.float64),
        folder,
        SAMConfig(rho=0.1, scope=scope),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        optim="sgd",
        max_grad_norm=0.1,
        max_steps=4,
    )


def same_tokens(batch: int, accumulation: int, folder: Path) -> Result:
    """The same for a causal language model, whose loss is normalised by the labelled tokens of the whole batch."""
    return run(
        tiny.llama(torch.float64),
        tiny.texts(),
        folder,
        SAMConfig(rho=0.1, scope="global"),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        optim="sgd",
        max_steps=4,
    )


def branch(scope: str, perturb, folder: Path) -> Result:
    """A layer takes part on one rank and not on the other, in turns."""
    return run(
        tiny.mlp(torch.float64, branch=True),
        tiny.vectors(dtype=torch.float64),
        folder,
        SAMConfig(rho=0.1, scope=scope, perturb=perturb),
        optim="sgd",
        max_steps=4,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
    )


def batch_norm(scope: str | None, folder: Path) -> Result:
    sam = None if scope is None else SAMConfig(rho=1e-30, scope=scope)
    data = tiny.vectors()
    return run(tiny.mlp(batch_norm=True), data, folder, sam, gradient_accumulation_steps=2)


# Other ways to wrap the model, none of which may change a run: arguments of Accelerate's DDP wrapper, and the Trainer's.
WRAPPINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {}),
    "gradient as bucket view": ({"gradient_as_bucket_view": True}, {}),
    "no search for unused parameters": ({}, {"ddp_find_unused_parameters": False}),
    "sync each batch": ({}, {"accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}}}),
    "compiled": ({}, {"torch_compile": True, "torch_compile_backend": "eager"}),
}


def wrapped(scope: str, wrapping: str, folder: Path) -> Result:
    """A large rho, two micro-batches a step, and the model wrapped otherwise."""
    ddp, options = copy.deepcopy(WRAPPINGS[wrapping])  # the Trainer writes into its arguments
    sam = SAMConfig(rho=0.5, scope=scope)
    return run(tiny.mlp(), tiny.vectors(), folder, sam, ddp=ddp, gradient_accumulation_steps=2, **options)


def communication(scope: str | None, folder: Path) -> Result:
    """Two micro-batches a step; `bytes` by kind of collective, `parameters` those of the model."""
    sam = None if scope is None else SAMConfig(rho=0.1, scope=scope)
    options = {"gradient_accumulation_steps": 2, "logging_strategy": "no"}
    trainer = tiny.trainer_for(tiny.llama(), tiny.texts(), folder, sam, **options)
    moved = bytes_of_a_step(trainer)
    return result(trainer, bytes=moved, parameters=trainer.trajectory[0].nbytes)


def short_window(scope: str | None, folder: Path) -> Result:
    """Ten examples: three micro-batches a rank and epoch, in windows of two and one."""
    sam = None if scope is None else SAMConfig(rho=1e-30, scope=scope)
    return run(
        tiny.mlp(dropout=0.2),
        tiny.vectors(10),
        folder,
        sam,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=4,
    )


def stream(scope: str | None, folder: Path) -> Result:
    """An iterable that ends in the middle of a window."""
    sam = None if scope is None else SAMConfig(rho=1e-30, scope=scope)
    data = tiny.Stream(tiny.vectors(20))
    return run(
        tiny.mlp(dropout=0.2),
        data,
        folder,
        sam,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=4,
    )


def resumed(scope: str, folder: Path) -> Result:
    """Six steps at once, and as two halves: `trajectory` is of the first, `second_half` of the other."""
    options = {
        "max_steps": 6,
        "gradient_accumulation_steps": 2,
        "train_sampling_strategy": "random",
        "save_strategy": "steps",
        "save_steps": 3,
    }
    sam = SAMConfig(rho=0.1, scope=scope)
    whole = tiny.trained(tiny.bert(dropout=0.2), tiny.sentences(), folder, sam, **options)
    # Before transformers 5.18 the stock Trainer cannot load an optimizer to the "cpu:0" that Accelerate calls the device.
    again = tiny.trainer_for(tiny.bert(dropout=0.2), tiny.sentences(), folder, sam, **options)
    again.args._setup_devices = torch.device("cpu")
    again.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    return result(whole, second_half=torch.stack(again.trajectory))


def failing(folder: Path) -> None:
    sam = SAMConfig(scope="device")
    fail(FailingTrainer(tiny.mlp(), tiny.arguments(folder), train_dataset=tiny.vectors(), sam_config=sam))


def runs(settings: tuple[tuple[int, ...], ...]) -> dict[str, Run]:
    """All runs by name; `settings` are those of the matrix."""
    table: dict[str, Run] = {}
    for setting, scope in itertools.product(settings, (None, *SCOPES)):
        table[f"matrix {setting} {scope}"] = functools.partial(matrix, setting, scope)
    for scope in (None, *SCOPES):
        table[f"batch norm {scope}"] = functools.partial(batch_norm, scope)
        table[f"communication {scope}"] = functools.partial(communication, scope)
        table[f"short window {scope}"] = functools.partial(short_window, scope)
        table[f"stream {scope}"] = functools.partial(stream, scope)
    for scope, wrapping in itertools.product(SCOPES, WRAPPINGS):
        table[f"wrapped {scope} {wrapping}"] = functools.partial(wrapped, scope, wrapping)
    for scope in SCOPES:
        table[f"branch {scope}"] = functools.partial(branch, scope, "all")
        table[f"resumed {scope}"] = functools.partial(resumed, scope)
        table[f"examples {scope} 4x1"] = functools.partial(same_examples, scope, 4, 1)
        table[f"examples {scope} 2x2"] = functools.partial(same_examples, scope, 2, 2)
    table["tokens 4x1"] = functools.partial(same_tokens, 4, 1)
    table["tokens 1x4"] = functools.partial(same_tokens, 1, 4)
    table["only the branch"] = functools.partial(branch, "device", ["branch.*"])
    table["failing"] = failing  # the last one: no run comes after it
    return table


def pairwise() -> dict[str, Run]:
    return runs(PAIRWISE)


def every_setting() -> dict[str, Run]:
    return runs(EVERY_SETTING)
