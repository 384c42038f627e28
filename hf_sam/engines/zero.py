"""Engines for DeepSpeed ZeRO."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from ..config import SAMConfig
from ..update.parameters import Gradients
from ..update.reductions import Reductions, ShardedReductions
from .base import Engine, replaced_backward

if TYPE_CHECKING:
    from transformers import Trainer


class ZeroEngine(Engine):
    """DeepSpeed ZeRO-0, 1 and 2: every rank holds all weights; optimizer states and gradients may be sharded.

    Accelerate's `backward` would step the optimizer, so ascent passes bypass DeepSpeed: their gradients come from
    autograd and are averaged at global scope. Descent passes go through DeepSpeed, which steps after the weights are
    restored.
    """

    parameters_are_views = True
    optimizer_holds_parameters = False

    def __init__(self, trainer: Trainer):
        super().__init__(trainer)
        self._deepspeed = trainer.model_wrapped
        self._wanted = [p for p in trainer.model.parameters() if p.requires_grad]

    @contextlib.contextmanager
    def ascent_pass(self, model: nn.Module, synced: bool) -> Iterator[nn.Module]:
        wanted = self._wanted

        def backward(loss: Tensor, **kwargs) -> None:
            gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
            for p, gradient in zip(wanted, gradients, strict=True):
                if gradient is not None:
                    p.grad = gradient if p.grad is None else p.grad.add_(gradient)

        with replaced_backward(self._accelerator, backward):
            yield self._deepspeed.module
        if synced:
            self.average_gradients(wanted)

    @contextlib.contextmanager
    def descent_pass(self, model: nn.Module, synced: bool) -> Iterator[nn.Module]:
        def backward(loss: Tensor, **kwargs) -> None:
            self._deepspeed.set_gradient_accumulation_boundary(synced and self._accelerator.sync_gradients)
            self._deepspeed.backward(loss, **kwargs)

        with replaced_backward(self._accelerator, backward):
            yield model

    def finish_step(self) -> None:
        self._deepspeed.step()

    @contextlib.contextmanager
    def gradients_only_for(self, chosen: Sequence[Parameter], trainable: Sequence[Parameter]) -> Iterator[None]:
        before, self._wanted = self._wanted, list(chosen)
        try:
            yield
        finally:
            self._wanted = before

    def gradients(self, parameters: Sequence[Parameter]) -> Gradients:
        return {}  # gradients are sharded over ranks; gathering them would cost the memory that ZeRO saves


class Zero3Engine(ZeroEngine):
    """DeepSpeed ZeRO-3: each rank holds a flat shard of every parameter, and DeepSpeed reduces all gradients."""

    parameters_move = True

    def __init__(self, trainer: Trainer):
        super().__init__(trainer)
        self._whole_share = torch.ones((), device=self._wanted[0].device)

    def scope(self, config: SAMConfig) -> str:
        return "global" if config.scope == "auto" and config.m is None else super().scope(config)

    def reductions(self, parameters: Sequence[Parameter]) -> Reductions:
        return ShardedReductions([self._whole_share] * len(parameters))

    def ascent_pass(self, model: nn.Module, synced: bool) -> contextlib.AbstractContextManager[nn.Module]:
        return self.descent_pass(model, synced)

    @contextlib.contextmanager
    def gradients_only_for(self, chosen: Sequence[Parameter], trainable: Sequence[Parameter]) -> Iterator[None]:
        self._wanted = list(chosen)  # selects in `take_gradients`: DeepSpeed computes all gradients
        yield

    def take_gradients(self, parameters: Sequence[Parameter]) -> Gradients:
        taken = {p: gradient.clone() for p, gradient in self.gradients(self._wanted).items()}
        self._deepspeed.optimizer.zero_grad()
        return taken

    def gradients(self, parameters: Sequence[Parameter]) -> Gradients:
        from deepspeed.utils import safe_get_local_grad

        return {p: safe_get_local_grad(p) for p in parameters}

    def renew_copies(self) -> None:
        super().renew_copies()
        self._deepspeed.optimizer.empty_partition_cache()
