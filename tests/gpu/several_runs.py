"""What two processes with a GPU each do: the runs of the CPU's tests, on NCCL."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from engines import deepspeed_runs, sharded_runs

Runs = dict[str, Callable[[Path], dict[str, Any]]]
ON_GPUS = {"use_cpu": False}
CHOICES = ("sam", "p=inf", "asam")
SAM = {"rho": 0.1, "scope": "global"}


def two_gpus() -> Runs:
    runs: Runs = {}
    for choice in CHOICES:
        runs[f"ddp {choice}"] = partial(sharded_runs.chosen, None, choice, 2, **ON_GPUS)
        runs[f"fsdp {choice}"] = partial(sharded_runs.chosen, "fsdp", choice, 2, **ON_GPUS)
    runs["plugin"] = partial(sharded_runs.plugin, SAM, False, **ON_GPUS)
    runs["plugin stock"] = partial(sharded_runs.plugin, None, False, **ON_GPUS)
    runs["plugin vanishing"] = partial(sharded_runs.plugin, {"rho": 1e-30}, False, **ON_GPUS)
    runs["plugin failing"] = partial(sharded_runs.failing, None, **ON_GPUS)  # the last one: no run comes after it
    return sharded_runs.possible(runs)


def two_gpus_under_deepspeed() -> Runs:
    runs: Runs = {}
    for stage in (2, 3):
        for choice in CHOICES:
            runs[f"{choice} at stage {stage}"] = partial(deepspeed_runs.chosen, choice, stage, **ON_GPUS)
    return runs
