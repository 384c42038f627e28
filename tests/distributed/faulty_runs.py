"""Runs on two processes: states that are missing, gradients that lie in DDP's buckets, parameters of several types."""

from __future__ import annotations

import contextlib
import functools
import itertools
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from in_place import weights_changed_in_place
from integration import tiny
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_sam import SAMConfig

Run = Callable[[Path], dict[str, Any]]
# A rank that waits for one that does something else fails after this many seconds instead of half an hour.
PATIENCE = {"ddp_timeout": 30}
# And one that still waits ends after this many.
SECONDS = 60
STATEFUL = {
    "looksam": {"method": "looksam", "rho": 0.3, "interval": 4},
    "carried": {"method": "carried", "rho": 0.3, "interval": 4},
    "previous": {"method": "previous", "rho": 0.3},
    "friendly": {"method": "friendly", "rho": 0.3},
}


def scopes_of(sam: dict[str, Any]) -> tuple[str | None, ...]:
    return (None,) if sam["method"] == "previous" else ("device", "global")


def result(trainer, **more) -> dict[str, Any]:
    return {"trajectory": torch.stack(trainer.trajectory), "log": trainer.state.log_history, **more}


# --- checkpoints without a state -----------------------------------------------------------------------------------


def rank() -> int:
    return dist.get_rank()


def lose(checkpoint: Path, what: str) -> Path:
    """Take a part of the checkpoint away; returns the folder that this rank resumes from."""
    files = sorted(checkpoint.glob("sam_state_*.safetensors"))
    assert len(files) == 2
    dist.barrier()
    if what == "each rank its own folder, one without a state":
        own = checkpoint.with_name(f"of-rank-{rank()}") / checkpoint.name
        shutil.copytree(checkpoint, own)
        if rank() == 1:
            for file in own.glob("sam_state_*"):
                file.unlink()
        dist.barrier()
        return own
    if rank() == 0:
        if what == "a stock checkpoint":
            for file in (*files, checkpoint / "sam_config.json"):
                file.unlink()
        elif what == "all states":
            for file in files:
                file.unlink()
        else:
            files[int(what[-1])].unlink()
    dist.barrier()
    return checkpoint


def resumed(sam: dict[str, Any], what: str, folder: Path) -> dict[str, Any]:
    """Two of eight steps, then the rest from the damaged checkpoint: in the middle of an interval."""
    options = {
        "max_steps": 8,
        "save_strategy": "steps",
        "save_steps": 2,
        "gradient_accumulation_steps": 2,
        "optim": "sgd",
        "learning_rate": 0.05,
        **PATIENCE,
    }
    model, data = functools.partial(tiny.mlp, torch.float64), tiny.vectors(64, torch.float64)
    signal.alarm(SECONDS)  # ranks that wait for different things do not always find out
    tiny.trained(model(), data, folder, SAMConfig(**sam), **options)
    start = lose(folder / "checkpoint-2", what)
    again = tiny.trainer_for(model(), data, folder / "again", SAMConfig(**sam), **options)
    again.train(resume_from_checkpoint=str(start))
    signal.alarm(0)
    return result(again, passes=[step for step, _ in again.passes])


MISSING = {
    "every rank": ("a stock checkpoint", "all states"),
    "rank 0": ("the state of rank 0",),
    "rank 1": ("the state of rank 1",),
}


def resumed_runs(missing: str) -> dict[str, Run]:
    table: dict[str, Run] = {}
    for what, (name, sam) in itertools.product(MISSING[missing], STATEFUL.items()):
        for scope in scopes_of(sam):
            fields = {**sam, **({"scope": scope} if scope else {})}
            table[f"{name} {scope} {what}"] = functools.partial(resumed, fields, what)
    return table


# One table for each: a rank that fails ends the job.
missing_everywhere = functools.partial(resumed_runs, "every rank")
missing_at_rank_0 = functools.partial(resumed_runs, "rank 0")
missing_at_rank_1 = functools.partial(resumed_runs, "rank 1")


def resumed_apart_run(name: str, scope: str | None) -> dict[str, Run]:
    sam = {**STATEFUL[name], **({"scope": scope} if scope else {})}
    what = "each rank its own folder, one without a state"
    return {"apart": functools.partial(resumed, sam, what)}


looksam_device = functools.partial(resumed_apart_run, "looksam", "device")
carried_device = functools.partial(resumed_apart_run, "carried", "device")
carried_global = functools.partial(resumed_apart_run, "carried", "global")
previous = functools.partial(resumed_apart_run, "previous", None)
friendly_device = functools.partial(resumed_apart_run, "friendly", "device")


# --- gradients in DDP's buckets ------------------------------------------------------------------------------------

COMBINING = {
    "sam": {"rho": 0.3},
    "asam": {"method": "asam", "rho": 0.3},
    "gsam": {"method": "gsam", "rho": 0.3},
    "wsam": {"method": "wsam", "rho": 0.3},
    "looksam": {"method": "looksam", "rho": 0.3, "interval": 2},
    "friendly": {"method": "friendly", "rho": 0.3},
    "previous": {"method": "previous", "rho": 0.3},
    "ascent_steps": {"rho": 0.3, "ascent_steps": 2},
    "p=1.5": {"rho": 0.3, "p": 1.5},
}


class OneBigLayer(nn.Module):
    """Its first weight fills a bucket; the others are together in another."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 128, bias=False)
        self.last = nn.Linear(128, tiny.CLASSES)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.last(torch.tanh(self.first(x)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class OneLayer(nn.Module):
    """A single parameter: it fills the only bucket."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, tiny.CLASSES, bias=False)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.first(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


MODELS = {"one big layer": OneBigLayer, "one layer": OneLayer}
VIEWS = {
    "no views": {},
    "views": {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.001},
}
# Whether parameters may point to other memory, as they do on a CPU, or are changed where they lie, as on a GPU.
MOVES = {"swapped": contextlib.nullcontext, "in place": weights_changed_in_place}


def in_buckets(
    model: str, sam: dict[str, Any], view: str, finds_unused: bool, moves: str, folder: Path
) -> dict[str, Any]:
    """Buckets of a kilobyte. `still`: the weights after each step at a learning rate of zero, which are those restored."""
    found = {}
    for learning_rate in (0.05, 0.0):
        tiny.set_seed(0)
        trainer = tiny.trainer_for(
            MODELS[model]().double(),
            tiny.vectors(64, torch.float64),
            folder,
            SAMConfig(**sam),
            max_steps=4,
            gradient_accumulation_steps=2,
            optim="sgd",
            learning_rate=learning_rate,
            ddp_find_unused_parameters=finds_unused,
            **PATIENCE,
        )
        for name, value in VIEWS[view].items():
            setattr(trainer.accelerator.ddp_handler, name, value)
        before = tiny.flat(trainer.model)
        with MOVES[moves]():
            trainer.train()
        found[learning_rate] = result(trainer, before=before)
    return {**found[0.05], "still": found[0.0]["trajectory"], "before": found[0.0]["before"]}


def bucket_groups() -> dict[str, tuple]:
    """What is run with views and without: the arguments of `in_buckets` but for the view."""
    groups: dict[str, tuple] = {}
    for model, (name, sam), moves in itertools.product(MODELS, COMBINING.items(), MOVES):
        scopes = (None,) if name == "previous" else ("global", "device") if name in ("sam", "wsam") else ("global",)
        for scope in scopes:
            fields = {**sam, **({"scope": scope} if scope else {})}
            groups[f"{model} {name} {scope} {moves}"] = (model, fields, False, moves)
    groups["one big layer sam global finds unused"] = (
        "one big layer",
        {"rho": 0.3, "scope": "global"},
        True,
        "in place",
    )
    return groups


def bucket_runs() -> dict[str, Run]:
    table: dict[str, Run] = {}
    for (group, (model, sam, finds_unused, moves)), view in itertools.product(bucket_groups().items(), VIEWS):
        table[f"{group} {view}"] = functools.partial(in_buckets, model, sam, view, finds_unused, moves)
    return table


# --- several types -------------------------------------------------------------------------------------------------

ORDERS = list(itertools.permutations((torch.float32, torch.bfloat16, torch.float64)))


class SeveralTypes(nn.Module):
    """Layers of several types, each computing in its own."""

    def __init__(self, types: tuple[torch.dtype, ...]):
        super().__init__()
        widths = [6, 8, 8, tiny.CLASSES]
        self.layers = nn.ModuleList(
            nn.Linear(*ends).to(dtype) for ends, dtype in zip(itertools.pairwise(widths), types, strict=True)
        )

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        for layer in self.layers:
            x = layer(torch.tanh(x).to(layer.weight.dtype))
        return {"loss": nn.functional.cross_entropy(x.float(), labels), "logits": x}


class Collectives(TorchDispatchMode):
    """Notes type and size of whatever this rank reduces, in order."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d" and "reduce" in function._schema.name:
            self.seen += [(str(t.dtype), t.numel()) for t in tree_leaves(args[0]) if isinstance(t, Tensor)]
        return function(*args, **(kwargs or {}))


def noted(trainer) -> dict[str, Any]:
    """Train; `collectives` are those that did not come out of a backward pass of DDP's."""
    with Collectives() as collectives:
        trainer.train()
    return result(trainer, collectives=collectives.seen)


def several_types(sam: dict[str, Any], order: tuple[torch.dtype, ...], folder: Path) -> dict[str, Any]:
    tiny.set_seed(0)
    options = {"max_steps": 4, "optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.05, **PATIENCE}
    return noted(tiny.trainer_for(SeveralTypes(order), tiny.vectors(64), folder, SAMConfig(**sam), **options))


class Medium(nn.Module):
    """Many tensors of 4 MB."""

    def __init__(self, layers: int = 24, width: int = 1024):
        super().__init__()
        self.first = nn.Linear(6, width, bias=False)
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))
        self.last = nn.Linear(width, tiny.CLASSES, bias=False)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.first(x)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        logits = self.last(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def large(folder: Path) -> dict[str, Any]:
    tiny.set_seed(0)
    sam = SAMConfig(method="wsam", rho=0.3, scope="device")
    options = {"max_steps": 2, "optim": "sgd", "per_device_train_batch_size": 1, **PATIENCE}
    trainer = tiny.trainer_for(Medium(), tiny.vectors(8), folder, sam, **options)
    found = noted(trainer)
    checks = found.pop("trajectory")
    return {"collectives": found["collectives"], "sum": checks.double().sum(), "parameters": checks.shape[1]}


def type_runs() -> dict[str, Run]:
    table: dict[str, Run] = {}
    for name, order in itertools.product(("gsam", "wsam", "looksam"), ORDERS):
        sam = {**COMBINING[name], "scope": "device"}
        table[f"{name} {' '.join(str(t) for t in order)}"] = functools.partial(several_types, sam, order)
    return table


def large_run() -> dict[str, Run]:
    return {"large": large}
