"""What Accelerate made of the model: gradient synchronisation, sharded norms, and what is refused."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
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
# Trainers whose batches stack chosen above rejected answers: a part of such a batch is no batch.
STACKS_PAIRS = ("DPOTrainer", "KTOTrainer", "RewardTrainer")
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


def _static_graph_meets_two_passes(trainer: Trainer) -> bool:
    config, args = trainer.sam_config, trainer.args
    is_same_graph_and_synced = config.scope == "global" and config.perturb == "all"
    return bool(args.ddp_static_graph) and args.world_size > 1 and not is_same_graph_and_synced


def _parts_of_pairs(trainer: Trainer) -> bool:
    config = trainer.sam_config
    takes_parts = config.m is not None or (config.ascent_fraction or 1) < 1 or config.method == "esam"
    bases = {base.__name__ for base in type(trainer).__mro__}
    return takes_parts and (not trainer.sam_splits_batches or not bases.isdisjoint(STACKS_PAIRS))


# What is refused, when it is so, and the remedy.
_REFUSALS: list[tuple[Callable[[Trainer], bool], str]] = [
    (
        lambda trainer: hasattr(trainer, "_buffered_inputs"),
        "{trainer.__class__.__name__} generates its inputs inside the training step, so that a second pass would see other "
        "ones. Sharpness-aware minimization needs a trainer with a fixed batch, such as SFTTrainer or DPOTrainer.",
    ),
    (
        _parts_of_pairs,
        "m, ascent_fraction and method='esam' take parts of a batch, and {trainer.__class__.__name__} stacks pairs of "
        "answers in one. Leave them out.",
    ),
    (
        _static_graph_meets_two_passes,
        "ddp_static_graph=True needs every backward pass to be the same and synchronised, which only scope='global' with "
        "perturb='all' is. Set ddp_static_graph=False, or choose that scope.",
    ),
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
        if config.scope not in (None, "auto"):
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


@contextlib.contextmanager
def loss_instead_of_backward(accelerator) -> Iterator[list[Tensor]]:
    """Collect the losses that `training_step` hands to `accelerator.backward`, normalised as it does, and go no further."""
    losses: list[Tensor] = []
    with _replaced_backward(accelerator, lambda loss, **kwargs: losses.append(loss)):
        yield losses


def backward_where_needed(accelerator) -> contextlib.AbstractContextManager:
    """No backward pass where the loss does not depend on any parameter that requires a gradient."""
    backward = accelerator.backward
    return _replaced_backward(
        accelerator, lambda loss, **kwargs: backward(loss, **kwargs) if loss.requires_grad else None
    )


@contextlib.contextmanager
def _replaced_backward(accelerator, backward: Callable) -> Iterator[None]:
    before = vars(accelerator).get("backward")  # None: the class's own
    accelerator.backward = backward
    try:
        yield
    finally:
        if before is None:
            del accelerator.backward
        else:
            accelerator.backward = before
