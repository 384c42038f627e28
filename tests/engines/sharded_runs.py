"""What the processes of the tests of sharded engines do: named runs, each returning what a test compares.

Every run can be made in one process too, where nothing is sharded and batches are as many times larger.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from distributed.failing import FailingTrainer, fail
from distributed.traffic import bytes_of_a_step
from integration import tiny
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback
from transformers.distributed import DistributedConfig

from hf_sam import SAMConfig, SAMTrainer
from hf_sam.update import buckets, step

Result = dict[str, Any]
RHO = {"rho": 0.1}
# Every method, and every choice that changes what is reduced over the shards.
CHOICES: dict[str, dict[str, Any]] = {
    "sam": RHO,
    "p=1": {"p": 1, **RHO},
    "p=3": {"p": 3, **RHO},
    "p=inf": {"p": "inf", "rho": 0.01},
    "asam": {"method": "asam", "rho": 0.5},
    "gsam": {"method": "gsam", **RHO},
    "wsam": {"method": "wsam", **RHO},
    "looksam": {"method": "looksam", "interval": 2, **RHO},
    "friendly": {"method": "friendly", **RHO},
    "esam": {"method": "esam", "gamma": 1.0, **RHO},
    "norm-only": {"method": "norm-only", **RHO},
    "two ascent steps": {"ascent_steps": 2, **RHO},
    "weight decay": {"weight_decay_in_ascent": True, **RHO},
}
IN_EVERY_SUITE = ("sam", "p=inf", "asam", "gsam")
IN_WHOLE_LISTS = ("sam", "p=1", "p=3", "asam", "gsam", "looksam", "two ascent steps")
# Arguments of the Trainer for Accelerate's FSDP2 plugin.
PLUGIN: dict[str, Any] = {
    "fsdp": True,
    "fsdp_config": {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        "cpu_ram_efficient_loading": False,
    },
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "fsdp": {"fsdp_size": 2},
    "hsdp": {"fsdp_size": 2, "dp_replicate_size": 2},
    "tp": {"tp_size": 2, "tp_plan": "auto"},
    "fsdp and tp": {"fsdp_size": 2, "tp_size": 2, "tp_plan": "auto"},
}
# Whether the Trainer takes models that are sharded as they are loaded: from transformers 5.19 on.
SHARDS_AT_LOAD = hasattr(DistributedConfig, "dp_size")
OF_ACCELERATE = ("plugin", "communication", "ddp")  # first words of runs that need no such model


def is_distributed() -> bool:
    return "RANK" in os.environ


def whole(p: Tensor) -> Tensor:
    return p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach()


def weights(model: nn.Module) -> Tensor:
    """All trainable parameters as one vector, gathered from every rank, on the CPU."""
    return torch.cat([whole(p).flatten().clone() for p in model.parameters() if p.requires_grad]).cpu()


class Trajectory(TrainerCallback):
    """The weights after every optimizer step."""

    def __init__(self, trainer: Trainer):
        self._trainer = trainer
        self.points: list[Tensor] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.points.append(weights(self._trainer.model))


def train(model: nn.Module, folder: Path, sam: SAMConfig | None, *, resume: str | None = None, batches=2, **args):
    """Train on texts, one step being eight of them; `batches` is how many ranks see different ones."""
    trainer = trainer_for(model, folder, sam, batches=batches, **args)
    trajectory = Trajectory(trainer)
    trainer.add_callback(trajectory)
    trainer.train(resume_from_checkpoint=resume)
    return {
        "trajectory": torch.stack(trajectory.points),
        "log": trainer.state.log_history,
        "scope": None if sam is None else trainer._sam and trainer._sam.scope,
    }


def trainer_for(
    model: nn.Module, folder: Path, sam: SAMConfig | None, *, batches=2, fsdp=False, ours=SAMTrainer, **args
) -> Trainer:
    """A trainer, not yet run; `sam=None` is the stock one."""
    tiny.set_seed(2)
    batches = batches if is_distributed() else 1
    options = {
        "optim": "sgd",
        "max_grad_norm": 0.1,
        "learning_rate": 0.5,
        "max_steps": 4,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 4 // batches,
        **args,
    }
    if fsdp and is_distributed():
        options |= copy.deepcopy(PLUGIN)
    arguments = tiny.arguments(folder, **options)
    if arguments.use_cpu and is_distributed() and (fsdp or getattr(model, "tp_size", None)):
        as_if_on_accelerators(arguments)
    kwargs = {"model": model, "args": arguments, "train_dataset": tiny.texts()}
    return Trainer(**kwargs) if sam is None else ours(**kwargs, sam_config=sam)


def as_if_on_accelerators(arguments) -> None:
    """Accelerate allows FSDP and tensor parallelism only where it sees accelerators; all it then does, CPUs can do."""
    assert arguments.device.type == "cpu"
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def loaded(folder: Path, layout: str | None, dtype: torch.dtype = torch.float64, **config) -> nn.Module:
    """A Llama, sharded as it is loaded; whole on every rank where `layout` is None."""
    path = folder / "model"
    settings = LlamaConfig(**{**tiny.llama().config.to_dict(), "num_key_value_heads": 2, **config})
    tiny.set_seed(0)
    model = LlamaForCausalLM(settings).to(dtype)
    with PartialState(cpu=not torch.cuda.is_available()).main_process_first():
        model.save_pretrained(path)  # which only the main process does
    sharding = {"distributed_config": DistributedConfig(**LAYOUTS[layout])} if is_distributed() and layout else {}
    return LlamaForCausalLM.from_pretrained(path, dtype=dtype, **sharding)


def chosen(layout: str | None, choice: str, batches: int, folder: Path, **args) -> Result:
    """Float64 SGD with clipping and two micro-batches a step."""
    sam = SAMConfig(**CHOICES[choice], scope="global")
    return train(loaded(folder, layout), folder, sam, batches=batches, weight_decay=0.1, **args)


class Messages(logging.Handler):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.kept: list[str] = []

    def emit(self, record):
        self.kept.append(record.getMessage())


def in_bfloat16(rho: float, stochastic: bool, folder: Path) -> Result:
    """bfloat16 shards; `messages` is what the run has warned of."""
    messages, logger = Messages(), logging.getLogger("hf_sam.update.diagnosis")
    logger.addHandler(messages)
    sam = SAMConfig(rho=rho, stochastic_rounding=stochastic, scope="global")
    result = train(loaded(folder, "fsdp", torch.bfloat16), folder, sam)
    logger.removeHandler(messages)
    return {**result, "messages": messages.kept}


def hardest_hit(layout: str, folder: Path) -> Result:
    """Half of each micro-batch; in one process the same micro-batches come one after another."""
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2 if is_distributed() else 4}
    return train(loaded(folder, layout), folder, SAMConfig(method="esam", **RHO, scope="global"), **sizes)


def along_momentum(layout: str, folder: Path) -> Result:
    """Evaluates between steps, which leaves gathered weights behind that the next perturbation must reach."""
    trainer = trainer_for(
        loaded(folder, layout),
        folder,
        SAMConfig(method="msam", rho=1.0),
        optim="adamw_torch",
        learning_rate=1e-3,
    )
    trajectory = Trajectory(trainer)
    trainer.add_callback(trajectory)
    trainer.add_callback(EvaluateEachStep(trainer))
    trainer.train()
    return {"trajectory": torch.stack(trajectory.points), "log": trainer.state.log_history}


class EvaluateEachStep(TrainerCallback):
    def __init__(self, trainer: Trainer):
        self._trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        self._trainer.evaluate(tiny.texts(4))


def tied(layout: str, folder: Path) -> Result:
    return train(loaded(folder, layout, tie_word_embeddings=True), folder, SAMConfig(**RHO, scope="global"))


def adapters(folder: Path) -> Result:
    """LoRA on a model sharded at load: the adapters are whole on every rank."""
    model = tiny.with_lora(loaded(folder, "fsdp"), ["q_proj", "v_proj"])
    return train(model, folder, SAMConfig(**RHO, scope="global"))


def vanishing(layout: str, sam: bool, folder: Path, **args) -> Result:
    """Float32 AdamW with attention dropout."""
    model = loaded(folder, layout, torch.float32, attention_dropout=0.1)
    args = {"optim": "adamw_torch", "learning_rate": 1e-2, **args}
    return train(model, folder, SAMConfig(rho=1e-30) if sam else None, **args)


def interrupted(layout: str, folder: Path) -> Result:
    """The second pass of the last micro-batch raises; `before` and `after` are each rank's own parts."""

    class Failing(SAMTrainer):
        calls = 0

        def compute_loss(self, *args, **kwargs):
            type(self).calls += 1
            if type(self).calls == 4:
                raise KeyboardInterrupt
            return super().compute_loss(*args, **kwargs)

    model = loaded(folder, layout)
    args = tiny.arguments(folder, gradient_accumulation_steps=2, per_device_train_batch_size=2, optim="sgd")
    trainer = Failing(model=model, args=args, train_dataset=tiny.texts(), sam_config=SAMConfig(**RHO, scope="global"))
    before = weights(model)
    with contextlib.suppress(KeyboardInterrupt):
        trainer.train()
    return {"before": before, "after": weights(model), "trajectory": weights(model)[None]}


def plugin(sam: dict | None, lora: bool, folder: Path, *, resume: bool = False, **args) -> Result:
    """Accelerate's FSDP2 plugin."""
    model = tiny.llama(torch.float32)
    if lora:
        model = tiny.with_lora(model, ["q_proj", "v_proj"])
    config = None if sam is None else SAMConfig(**sam)
    return train(model, folder, config, fsdp=True, **args)


class OverflowOnOneRank:
    """Scales the loss of pass `overflows_at`, counted from 0, out of the range of float32 on the last rank."""

    overflows_at = -1
    passes = 0

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        type(self).passes += 1  # on the trainer it would count clean passes only
        overflows = type(self).passes - 1 == self.overflows_at and os.environ["RANK"] == "1"
        return loss * 1e38 if overflows else loss


class OverflowingSAMTrainer(OverflowOnOneRank, SAMTrainer):
    pass


def scaled(folder: Path, *, at: int, fsdp: bool, scale: float = 2.0**20) -> Result:
    """Loss scaling as fp16=True sets it up on a GPU; step 1 of 4 begins with pass 4."""
    tiny.set_seed(2)
    args = tiny.arguments(
        folder,
        max_steps=4,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        **(copy.deepcopy(PLUGIN) if fsdp else {}),
    )
    if fsdp:
        as_if_on_accelerators(args)
    config = SAMConfig(rho=0.3, scope="global")
    trainer = OverflowingSAMTrainer(model=tiny.llama(), args=args, train_dataset=tiny.texts(), sam_config=config)
    trainer.overflows_at = at
    accelerator = trainer.accelerator
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
    accelerator.unscale_gradients = lambda: accelerator.scaler.unscale_(trainer.optimizer.optimizer)
    trajectory = Trajectory(trainer)
    trainer.add_callback(trajectory)
    trainer.train()
    return {
        "trajectory": torch.stack(trajectory.points),
        "log": trainer.state.log_history,
        "scale": accelerator.scaler.get_scale(),
    }


def plugin_resumed(sam: dict, folder: Path) -> Result:
    """Six steps at once, and the second half again from the checkpoint between."""
    options = {"optim": "adamw_torch", "learning_rate": 1e-2, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    first = plugin(sam, False, folder, **options)
    checkpoint = str(folder / "checkpoint-3")
    second = train(tiny.llama(), folder, SAMConfig(**sam), fsdp=True, resume=checkpoint, **options)
    return {**first, "second_half": second["trajectory"]}


def communication(sam: dict | None, folder: Path) -> Result:
    """Accelerate's plugin, two micro-batches a step; `bytes` by kind of collective, `parameters` those of the model."""
    model = tiny.llama()
    parameters = sum(p.nbytes for p in model.parameters())
    config = None if sam is None else SAMConfig(**sam)
    trainer = trainer_for(model, folder, config, fsdp=True, max_steps=3, logging_strategy="no")
    return {"bytes": bytes_of_a_step(trainer), "parameters": parameters, "trajectory": weights(model)[None]}


def failing(layout: str | None, folder: Path, **args) -> None:
    """Loaded sharded, or by Accelerate's plugin where `layout` is None."""
    model = tiny.llama() if layout is None else loaded(folder, layout)
    options = {"fsdp": layout is None, "ours": FailingTrainer, "gradient_accumulation_steps": 1, **args}
    fail(trainer_for(model, folder, SAMConfig(**RHO), **options))


def two_processes() -> dict[str, Callable[[Path], Result]]:
    """FSDP2 of both kinds and tensor parallelism, one launch."""
    table: dict[str, Callable[[Path], Result]] = {}
    for choice in IN_EVERY_SUITE:
        table[f"fsdp {choice}"] = functools.partial(chosen, "fsdp", choice, 2)
    table["fsdp lora"] = adapters
    for sam in (False, True):
        table[f"vanishing {sam}"] = functools.partial(vanishing, "fsdp", sam)
    table["interrupted"] = functools.partial(interrupted, "fsdp")
    table["tp asam"] = functools.partial(chosen, "tp", "asam", 1)
    for rho, stochastic in ((1e-5, False), (1e-3, True), (0.5, True)):
        table[f"bfloat16 {rho} {stochastic}"] = functools.partial(in_bfloat16, rho, stochastic)
    # From here on Accelerate takes every model for one of its plugin's.
    table["plugin stock"] = functools.partial(plugin, None, False)
    table["plugin vanishing"] = functools.partial(plugin, {"rho": 1e-30}, False)
    table["plugin sam"] = functools.partial(plugin, {"rho": 0.1, "scope": "auto"}, False)
    table["plugin resumed friendly"] = functools.partial(plugin_resumed, {"rho": 0.1, "method": "friendly"})
    for name, sam in (("None", None), ("global", {**RHO, "scope": "global"})):
        table[f"communication {name}"] = functools.partial(communication, sam)
    table["plugin failing"] = functools.partial(failing, None)  # the last one: no run comes after it
    return possible(table)


def possible(table: dict[str, Callable[[Path], Any]]) -> dict[str, Callable[[Path], Any]]:
    """The runs that this version of transformers can make."""
    return {name: run for name, run in table.items() if SHARDS_AT_LOAD or name.startswith(OF_ACCELERATE)}


def on_whole_lists() -> dict[str, Callable[[Path], Result]]:
    """The path that an accelerator takes, in buckets of a few tensors."""
    step.IN_BUCKETS, buckets.BUCKET_BYTES = True, 4096
    table: dict[str, Callable[[Path], Result]] = {}
    for choice in IN_WHOLE_LISTS:
        table[f"fsdp {choice}"] = functools.partial(chosen, "fsdp", choice, 2)
    table["tp gsam"] = functools.partial(chosen, "tp", "gsam", 1)
    for sam in (False, True):
        table[f"vanishing {sam}"] = functools.partial(vanishing, "fsdp", sam)
    table["interrupted"] = functools.partial(interrupted, "fsdp")
    return table


def two_processes_at_length() -> dict[str, Callable[[Path], Result]]:
    """Every choice."""
    table: dict[str, Callable[[Path], Result]] = {}
    for choice in CHOICES:
        table[f"fsdp {choice}"] = functools.partial(chosen, "fsdp", choice, 2)
        table[f"tp {choice}"] = functools.partial(chosen, "tp", choice, 1)
    table["fsdp msam"] = functools.partial(along_momentum, "fsdp")
    table["fsdp hardest hit"] = functools.partial(hardest_hit, "fsdp")
    table["fsdp tied"] = functools.partial(tied, "fsdp")
    for sam in (False, True):
        table[f"vanishing bf16 {sam}"] = functools.partial(vanishing, "fsdp", sam, bf16=True)
        table[f"vanishing checkpointing {sam}"] = functools.partial(
            vanishing, "fsdp", sam, activation_checkpointing=True
        )
    for fsdp in (False, True):
        name = "fsdp" if fsdp else "ddp"
        table[f"scaled {name}"] = functools.partial(scaled, at=-1, fsdp=fsdp)
        table[f"not scaled {name}"] = functools.partial(scaled, at=-1, fsdp=fsdp, scale=1.0)
        table[f"overflow in the clean pass {name}"] = functools.partial(scaled, at=4, fsdp=fsdp)
        table[f"overflow in the perturbed pass {name}"] = functools.partial(scaled, at=7, fsdp=fsdp)
    table["plugin lora"] = functools.partial(plugin, {"rho": 0.1, "scope": "global"}, True)
    table["plugin resumed sam"] = functools.partial(plugin_resumed, {"rho": 0.1})
    return table


def loaded_failing() -> dict[str, Callable[[Path], None]]:
    return {"fsdp failing": functools.partial(failing, "fsdp")}


def four_processes() -> dict[str, Callable[[Path], Result]]:
    """Meshes of two dimensions."""
    table: dict[str, Callable[[Path], Result]] = {}
    for choice in ("sam", "p=1", "p=inf", "asam", "gsam"):
        table[f"hsdp {choice}"] = functools.partial(chosen, "hsdp", choice, 4)
        table[f"fsdp and tp {choice}"] = functools.partial(chosen, "fsdp and tp", choice, 2)
    return table
