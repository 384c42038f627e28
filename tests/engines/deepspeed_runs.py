"""What the processes of the DeepSpeed tests do, on DeepSpeed's CPU accelerator: named runs, each returning what a test
compares. Without processes the same runs are made by the plain Trainer, where batches are twice as large.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from distributed.failing import FailingTrainer, fail
from distributed.traffic import bytes_of_a_step
from integration import tiny
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from hf_sam import SAMConfig, SAMTrainer

Result = dict[str, Any]
STAGES = (0, 1, 2, 3)
RHO = {"rho": 0.1}
CHOICES: dict[str, dict[str, Any]] = {
    "sam": RHO,
    "asam": {"method": "asam", "rho": 0.5},
    "p=inf": {"p": "inf", "rho": 0.01},
    "two ascent steps": {"ascent_steps": 2, **RHO},
    "friendly": {"method": "friendly", **RHO},
    "esam": {"method": "esam", "gamma": 1.0, **RHO},
    "norm-only": {"method": "norm-only", **RHO},
    "functional": {"method": "functional", **RHO},
    "random": {"method": "random", **RHO},
    "periodic": {"method": "periodic", "interval": 2, **RHO},
}


def weights(model: nn.Module) -> Tensor:
    """All trainable parameters as one vector, gathered from every rank, on the CPU."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    gathered = contextlib.nullcontext()
    if hasattr(parameters[0], "ds_id"):
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(parameters)
    with gathered:
        return torch.cat([p.detach().flatten().clone() for p in parameters]).cpu()


class Trajectory(TrainerCallback):
    """The weights after every optimizer step."""

    def __init__(self, trainer: Trainer):
        self._trainer = trainer
        self.points: list[Tensor] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.points.append(weights(self._trainer.model))


def trainer_for(
    stage: int, folder: Path, sam: SAMConfig | None, *, zero=None, config=None, lora=False, ours=SAMTrainer, **args
) -> Trainer:
    """A trainer, not yet run; `sam=None` is the stock one. One step is eight texts."""
    tiny.set_seed(2)
    options: dict[str, Any] = {
        "optim": "sgd",
        "max_grad_norm": 0.1,
        "learning_rate": 0.5,
        "max_steps": 4,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 4,
        **args,
    }
    if "RANK" in os.environ:
        options["per_device_train_batch_size"] = 2
        options["deepspeed"] = {
            "zero_optimization": {"stage": stage, **(zero or {})},
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": "auto"},
            **(config or {}),
        }
    arguments = tiny.arguments(folder, **options)
    model = tiny.with_lora(tiny.llama(), ["q_proj", "v_proj"]) if lora else tiny.llama()
    kwargs = {"model": model, "args": arguments, "train_dataset": tiny.texts()}
    return Trainer(**kwargs) if sam is None else ours(**kwargs, sam_config=sam)


def train(stage: int, folder: Path, sam: SAMConfig | None, *, resume: str | None = None, **options) -> Result:
    trainer = trainer_for(stage, folder, sam, **options)
    trajectory = Trajectory(trainer)
    trainer.add_callback(trajectory)
    trainer.train(resume_from_checkpoint=resume)
    return {
        "trajectory": torch.stack(trajectory.points).float(),
        "log": trainer.state.log_history,
        "scope": None if sam is None else trainer._sam and trainer._sam.scope,
    }


def chosen(choice: str, stage: int, folder: Path, **args) -> Result:
    # A threshold of 0 lets ZeRO-3 gather every parameter anew; at its default these small ones stay gathered.
    zero = {"stage3_param_persistence_threshold": 0} if choice == "sam" and stage == 3 else {}
    return train(stage, folder, SAMConfig(**CHOICES[choice], scope="global"), zero=zero, **args)


def stages_and_choices() -> list[tuple[int, str]]:
    """All that are supported."""
    refused = {(3, "functional"), (3, "random")}
    return [pair for pair in itertools.product(STAGES, CHOICES) if pair not in refused]


def vanishing(stage: int, scope: str | None, folder: Path, **args) -> Result:
    sam = None if scope is None else SAMConfig(rho=1e-30, scope=scope)
    return train(stage, folder, sam, optim="adamw_torch", learning_rate=1e-2, **args)


def resumed(stage: int, folder: Path) -> Result:
    """Six steps at once, and the second half again from the checkpoint between."""
    options: dict[str, Any] = {"optim": "adamw_torch", "learning_rate": 1e-2, "max_steps": 6}
    options |= {"save_strategy": "steps", "save_steps": 3}
    sam = SAMConfig(method="friendly", rho=0.1)
    first = train(stage, folder, sam, **options)
    second = train(stage, folder, sam, resume=str(folder / "checkpoint-3"), **options)
    return {**first, "second_half": second["trajectory"]}


def refused(folder: Path, sam: dict, **options) -> Result:
    """The message, where the run is refused."""
    try:
        train(2, folder, SAMConfig(**sam), **options)
    except ValueError as error:
        return {"message": str(error)}
    return {"message": None}


def along_the_gradient_of_one_rank(folder: Path) -> Result:
    return train(1, folder, SAMConfig(rho=0.1, scope="device"))


def hardest_hit(stage: int, folder: Path) -> Result:
    """Half of each micro-batch; in one process the same micro-batches come one after another."""
    accumulation = 2 if "RANK" in os.environ else 4
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulation}
    return train(stage, folder, SAMConfig(method="esam", **RHO, scope="global"), **sizes)


def adapters(folder: Path) -> Result:
    return train(2, folder, SAMConfig(**RHO, scope="global"), lora=True)


def communication(stage: int, scope: str | None, folder: Path) -> Result:
    """Two micro-batches a step; `bytes` by kind of collective, `parameters` those of the model."""
    sam = None if scope is None else SAMConfig(**RHO, scope=scope)
    # At its default threshold these small parameters would stay gathered.
    zero = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    trainer = trainer_for(stage, folder, sam, zero=zero, max_steps=3, logging_strategy="no")
    moved = bytes_of_a_step(trainer)
    whole = weights(trainer.model)
    return {"bytes": moved, "parameters": whole.nbytes, "trajectory": whole[None]}


def failing(stage: int, folder: Path) -> None:
    sam = SAMConfig(**RHO)
    fail(trainer_for(stage, folder, sam, ours=FailingTrainer, gradient_accumulation_steps=1))


def failing_at_stage_3() -> dict[str, Callable[[Path], None]]:
    return {"failing at stage 3": functools.partial(failing, 3)}


def every_stage() -> dict[str, Callable[[Path], Result]]:
    table: dict[str, Callable[[Path], Result]] = {}
    for stage, choice in stages_and_choices():
        table[f"{choice} at stage {stage}"] = functools.partial(chosen, choice, stage)
    for stage in STAGES:
        for scope in (None, "global") if stage == 3 else (None, "micro", "device", "global"):
            table[f"vanishing {scope} at stage {stage}"] = functools.partial(vanishing, stage, scope)
            table[f"communication {scope} at stage {stage}"] = functools.partial(communication, stage, scope)
    for scope in (None, "global"):
        table[f"vanishing bf16 {scope}"] = functools.partial(vanishing, 2, scope, bf16=True)
    table["resumed at stage 2"] = functools.partial(resumed, 2)
    table["resumed at stage 3"] = functools.partial(resumed, 3)
    for stage in STAGES:
        table[f"hardest hit at stage {stage}"] = functools.partial(hardest_hit, stage)
    table["lora"] = adapters
    table["device"] = along_the_gradient_of_one_rank
    offload = {"zero": {"offload_optimizer": {"device": "cpu"}}}
    table["refused offload"] = functools.partial(refused, sam={}, **offload)
    table["refused fp16"] = functools.partial(refused, sam={}, config={"fp16": {"enabled": True}, "bf16": {}})
    table["refused gsam"] = functools.partial(refused, sam={"method": "gsam"})
    table["failing at stage 2"] = functools.partial(failing, 2)  # the last one: no run comes after it
    return table
