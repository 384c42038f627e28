"""Recognise how Accelerate or transformers has set up the model, and choose the engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from accelerate.utils import DistributedType

from .base import Engine
from .sharded import FullyShardedEngine, ShardedEngine, fsdp_modules
from .zero import Zero3Engine, ZeroEngine

if TYPE_CHECKING:
    from transformers import Trainer

REPLICATED = (
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_NPU,
    DistributedType.MULTI_MLU,
    DistributedType.MULTI_SDAA,
    DistributedType.MULTI_MUSA,
    DistributedType.MULTI_XPU,
    DistributedType.MULTI_HPU,
)


def kind_of(trainer: Trainer) -> str:
    """The engine's name in the support table; `"unknown"` if it is not listed."""
    accelerator = trainer.accelerator
    if getattr(trainer, "is_distributed_loading_by_transformers", False):
        return "FSDP2" if fsdp_modules(trainer.model) else "tensor parallel"
    if accelerator.distributed_type in REPLICATED:
        return "one process" if accelerator.num_processes == 1 else "DDP"
    if accelerator.distributed_type == DistributedType.FSDP:
        return "FSDP2" if accelerator.is_fsdp2 else "FSDP1"
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return "ZeRO-3" if accelerator.state.deepspeed_plugin.zero_stage == 3 else "ZeRO-0, 1, 2"
    return "unknown"


def engine_for(trainer: Trainer) -> Engine:
    """The engine that the trainer's model runs on."""
    engines: dict[str, type[Engine]] = {
        "tensor parallel": ShardedEngine,
        "FSDP2": FullyShardedEngine,
        "ZeRO-0, 1, 2": ZeroEngine,
        "ZeRO-3": Zero3Engine,
    }
    return engines.get(kind_of(trainer), Engine)(trainer)
