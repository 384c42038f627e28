"""Engines for tensor parallelism and FSDP2, whose parameters are `DTensor`s."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from ..config import SAMConfig
from ..update.reductions import Reductions, ShardedReductions
from .base import Engine

if TYPE_CHECKING:
    from transformers import Trainer


class ShardedEngine(Engine):
    """Tensor parallelism: some parameters are `DTensor`s, and every rank of the mesh sees the same examples."""

    parameters_are_views = True

    def __init__(self, trainer: Trainer):
        super().__init__(trainer)
        self._shares: dict[Parameter, Tensor] = {}

    def scope(self, config: SAMConfig) -> str:
        return "global" if config.scope == "auto" and config.m is None else super().scope(config)

    def reductions(self, parameters: Sequence[Parameter]) -> Reductions:
        for p in parameters:
            if p not in self._shares:  # cached, because copying a number to the device synchronises with it
                self._shares[p] = torch.tensor(1 / replicas(p), dtype=torch.float64).to(p.device, torch.float32)
        return ShardedReductions([self._shares[p] for p in parameters])

    @contextlib.contextmanager
    def without_sync(self, model: nn.Module) -> Iterator[None]:
        # The Trainer's hooks average gradients of replicated parameters while this flag is set.
        before, self._accelerator.sync_gradients = self._accelerator.sync_gradients, False
        try:
            yield
        finally:
            self._accelerator.sync_gradients = before

    def average_gradients(self, parameters: list[Parameter]) -> None:
        """Average replicated gradients, which may differ by rounding although all ranks have seen the same examples."""
        if whole := [p for p in parameters if not isinstance(p, DTensor)]:
            super().average_gradients(whole)


class FullyShardedEngine(ShardedEngine):
    """FSDP2, by Accelerate's plugin or by sharded loading, including HSDP and meshes with tensor parallelism.

    FSDP keeps unsynchronised gradients unsharded, and they appear in `p.grad` only after synchronisation.
    """

    parameters_move = True

    def __init__(self, trainer: Trainer):
        super().__init__(trainer)
        self._needs_all_gradients = True  # FSDP decides in its first pass which gradients it reduces
        self._trainer = trainer
        self._sharded_at_load = getattr(trainer, "is_distributed_loading_by_transformers", False)
        self._modules = fsdp_modules(trainer.model)

    @property
    def batches(self) -> int:
        return self._trainer.model.config.distributed_config.dp_size if self._sharded_at_load else super().batches

    @contextlib.contextmanager
    def without_sync(self, model: nn.Module) -> Iterator[None]:
        deferred = (
            self._trainer._defer_fsdp_gradient_reduction()
            if self._sharded_at_load
            else self._accelerator.no_sync(model)
        )
        with deferred, super().without_sync(model):
            yield

    def renew_copies(self) -> None:
        super().renew_copies()
        for module in self._modules:  # some keep their gathered weights between forward passes
            module.reshard()


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    """The modules whose parameters FSDP2 gathers together."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def replicas(p: Tensor) -> int:
    """The number of processes that hold the same shard of `p`."""
    world = dist.get_world_size()
    if not isinstance(p, DTensor):
        return world
    for size, placement in zip(p.device_mesh.shape, p.placements, strict=True):
        if not placement.is_replicate():
            world //= size
    return world
