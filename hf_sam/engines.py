"""What Accelerate made of the model: gradient synchronisation, sharded norms, and what is refused."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.nn import Parameter

from .config import SAMConfig
from .reductions import Reductions

if TYPE_CHECKING:
    from transformers import Trainer

# Optimizers of `TrainingArguments.optim` that step inside `backward`: the clean pass would already move the weights.
STEPS_IN_BACKWARD = ("lomo", "adalomo")
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


def _steps_in_backward(trainer: Trainer) -> bool:
    optimizer = type(trainer.optimizer).__name__.lower() if trainer.optimizer is not None else ""
    optim = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    return optim in STEPS_IN_BACKWARD or optim.endswith("layerwise") or optimizer in STEPS_IN_BACKWARD


# What is refused, when it is so, and the remedy.
_REFUSALS: list[tuple[Callable[[Trainer], bool], str]] = [
    (
        _steps_in_backward,
        "optim={trainer.args.optim}: this optimizer steps inside backward, so the first pass would already change the "
        "weights. Choose one that steps on `.grad`, such as adamw_torch or sgd.",
    ),
    (
        lambda trainer: trainer.args.n_gpu > 1,
        "{trainer.args.n_gpu} GPUs in one process (DataParallel) replicate the model anew in every forward pass. Start one "
        "process per GPU with `accelerate launch` or `torchrun`, or show one GPU with CUDA_VISIBLE_DEVICES=0.",
    ),
    (
        lambda trainer: trainer.accelerator.distributed_type not in REPLICATED,
        "{trainer.accelerator.distributed_type} is not supported yet. Use one process or DDP.",
    ),
    (
        lambda trainer: getattr(trainer, "is_distributed_loading_by_transformers", False),
        "models sharded at load time (`DistributedConfig`) are not supported yet. Use one process or DDP.",
    ),
]


def refuse_unsupported(trainer: Trainer) -> None:
    """Stop before training where the update could not be right.

    Raises:
        ValueError: Says what cannot be supported and what to use instead.
    """
    for applies, reason in _REFUSALS:
        if applies(trainer):
            raise ValueError("SAMTrainer: " + reason.format(trainer=trainer))


class Engine:
    """One process, or DDP: every rank holds all parameters.

    Args:
        accelerator (`accelerate.Accelerator`): The Trainer's own.
    """

    def __init__(self, accelerator):
        self._accelerator = accelerator
        self.reductions = Reductions()

    @property
    def rank(self) -> int:
        """This process's number."""
        return self._accelerator.process_index

    def scope(self, config: SAMConfig) -> str:
        """`config.scope` with `"auto"` resolved."""
        if config.scope != "auto":
            return config.scope
        return "device" if config.m is None else "micro"

    def without_sync(self, model: nn.Module) -> contextlib.AbstractContextManager:
        """Backward passes inside keep their gradients on this rank."""
        return self._accelerator.no_sync(model)

    def loss_scale(self, device: torch.device) -> Tensor | float:
        """By how much gradients are larger than the loss's own, under fp16; read without waiting for the device."""
        scaler = self._accelerator.scaler
        return 1.0 if scaler is None else scaler.scale(torch.ones((), device=device))

    def average_gradients(self, parameters: list[Parameter]) -> None:
        """What DDP's backward does, for gradients that were made without it: their mean over all ranks."""
        if self._accelerator.num_processes == 1:
            return
        unused = torch.tensor([p.grad is None for p in parameters], device=parameters[0].device)
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        unused_everywhere = unused.int()
        dist.all_reduce(unused_everywhere, op=dist.ReduceOp.MIN)
        for dtype in {p.dtype for p in parameters}:
            gradients = [p.grad for p in parameters if p.dtype == dtype]
            flat = torch._utils._flatten_dense_tensors(gradients)
            dist.all_reduce(flat)
            flat /= self._accelerator.num_processes
            torch._foreach_copy_(gradients, torch._utils._unflatten_dense_tensors(flat, gradients))
        for p, is_unused in zip(parameters, unused_everywhere.tolist(), strict=True):
            if is_unused:
                p.grad = None
