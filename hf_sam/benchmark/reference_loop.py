"""A reference loop: SAM as usually written by hand, with loops over parameters, two passes, and one optimizer step.

It follows the widely used PyTorch implementation of Foret et al. 2021 (github.com/davda54/sam): `first_step` moves to
`w + eps` and keeps a copy of every weight; `second_step` moves back and steps the base optimizer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import Parameter


class TwoPassLoop:
    """
    One optimizer step of the hand-written loop.

    Args:
        model (`nn.Module`): The model, wrapped for distributed training if there are several processes.
        optimizer (`torch.optim.Optimizer`): The base optimizer.
        scheduler (`torch.optim.lr_scheduler.LRScheduler`): The scheduler of its learning rate.
        accelerator (`Accelerator`): Runs the backward pass, and defers synchronization under gradient accumulation.
        rho (`float`): Size of the perturbation.
        max_grad_norm (`float`): Norm to which the gradient is clipped before the optimizer step; 0 for no clipping.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        accelerator: Accelerator,
        rho: float,
        max_grad_norm: float,
    ):
        self.model, self.optimizer, self.scheduler, self.accelerator = model, optimizer, scheduler, accelerator
        self.rho, self.max_grad_norm = rho, max_grad_norm
        self._kept: dict[Parameter, torch.Tensor] = {}

    def step(self, window: list[dict[str, Any]]) -> None:
        """Run both passes over the micro-batches of one optimizer step, then the step."""
        self.model.train()
        self._passes(window)
        self.first_step()
        self._passes(window)
        if self.max_grad_norm:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.second_step()
        self.scheduler.step()

    @torch.no_grad()
    def first_step(self) -> None:
        """Set `w <- w + rho g / ||g||`, and the gradient to zero."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm(p=2) for p in parameters]).norm(p=2)
        scale = self.rho / (norm + 1e-12)
        for p in parameters:
            self._kept[p] = p.clone()
            p.add_(p.grad * scale)
        self.optimizer.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        """Move back to `w`, and step the base optimizer along the gradient at `w + eps`."""
        for p, kept in self._kept.items():
            p.copy_(kept)
        self._kept = {}
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _passes(self, window: list[dict[str, Any]]) -> None:
        for inputs in window:
            is_last = inputs is window[-1]
            self.accelerator.gradient_state._set_sync_gradients(is_last)
            held_back: Callable = contextlib.nullcontext if is_last else self.accelerator.no_sync
            with held_back(*([] if is_last else [self.model])):
                loss = self.model(**inputs)["loss"] / len(window)
                self.accelerator.backward(loss)


class PytorchOptimizerLoop(TwoPassLoop):
    """
    The same loop with `SAM` of the package pytorch_optimizer.

    Raises:
        ValueError: The package is not installed.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        try:
            from pytorch_optimizer import SAM
        except ImportError:
            raise ValueError("pytorch_optimizer is not installed: pip install 'hf-sam[benchmark]'.") from None
        self._sam = SAM(self.optimizer.param_groups, lambda groups, **options: self.optimizer, rho=self.rho)

    def first_step(self) -> None:
        self._sam.first_step(zero_grad=True)

    def second_step(self) -> None:
        self._sam.second_step(zero_grad=True)
