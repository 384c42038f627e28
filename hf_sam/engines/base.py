"""What Accelerate or transformers made of the model: how gradients are synchronised, and where norms are taken."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

from ..config import SAMConfig
from ..update.parameters import Gradients, gradients_only_for, laid_out_as, put_gradients, take_gradients
from ..update.reductions import Reductions, ShardedReductions

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
    """The engine's row in the table of what is supported; `"unknown"` where it has none."""
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
    engines = {
        "tensor parallel": ShardedEngine,
        "FSDP2": FullyShardedEngine,
        "ZeRO-0, 1, 2": ZeroEngine,
        "ZeRO-3": Zero3Engine,
    }
    return engines.get(kind_of(trainer), Engine)(trainer)


class Engine:
    """One process, or DDP: every rank holds all parameters.

    Args:
        trainer (`~transformers.Trainer`): Whose accelerator and model are read; it is never changed.
    """

    # Whether parameters lie in memory that the engine knows by its address: they are then changed in place only.
    parameters_are_views = False

    def __init__(self, trainer: Trainer):
        self._accelerator = trainer.accelerator
        # DDP counts on every gradient, unless it looks for those that are missing.
        wrapper, scope = trainer.model_wrapped, self.scope(trainer.sam_config)
        counts = isinstance(wrapper, DistributedDataParallel) and not wrapper.find_unused_parameters
        self._needs_all_gradients = counts and scope == "global"

    @property
    def rank(self) -> int:
        """This process's number."""
        return self._accelerator.process_index

    @property
    def batches(self) -> int:
        """How many processes see different examples at the same time."""
        parallelism = self._accelerator.parallelism_config
        return self._accelerator.num_processes // (parallelism.non_data_parallel_size if parallelism else 1)

    def scope(self, config: SAMConfig) -> str:
        """`config.scope` with `"auto"` resolved."""
        if config.scope != "auto":
            return config.scope
        return "device" if config.m is None else "micro"

    def reductions(self, parameters: Sequence[Parameter]) -> Reductions:
        """Norms and inner products of lists that hold one tensor for each of `parameters`, in this order."""
        return Reductions()

    def without_sync(self, model: nn.Module) -> contextlib.AbstractContextManager:
        """Backward passes inside keep their gradients on this rank."""
        return self._accelerator.no_sync(model)

    @contextlib.contextmanager
    def looking(self, model: nn.Module, synced: bool) -> Iterator[nn.Module]:
        """For a pass whose gradients show where to look, and are never stepped along; yields the module to run.

        `synced` leaves synchronisation as the Trainer has set it for this micro-batch; otherwise there is none.
        """
        with contextlib.nullcontext() if synced else self.without_sync(model):
            yield model

    def stepping(self, model: nn.Module, synced: bool) -> contextlib.AbstractContextManager[nn.Module]:
        """For a pass whose gradients the optimizer steps along."""
        return self.looking(model, synced)

    def finish_step(self) -> None:
        """Called where the optimizer's step is due: after the last micro-batch, the weights being in place again."""

    @contextlib.contextmanager
    def gradients_only_for(self, chosen: Sequence[Parameter], trainable: Sequence[Parameter]) -> Iterator[None]:
        """Backward passes inside leave no gradients at the other trainable parameters, and compute none if possible."""
        if self._needs_all_gradients:
            yield
            put_gradients(dict.fromkeys(set(trainable).difference(chosen)))
            return
        with gradients_only_for(chosen, trainable), backward_where_needed(self._accelerator):
            yield

    def take_gradients(self, parameters: Sequence[Parameter]) -> Gradients:
        """Move the gradients of passes inside `looking` to the caller."""
        return take_gradients(parameters)

    def gradients(self, parameters: Sequence[Parameter]) -> Gradients:
        """The gradients there are, left where they are."""
        return {p: laid_out_as(p, p.grad) for p in parameters if p.grad is not None}

    def renew_copies(self) -> None:
        """Drop what was derived from the weights, which have moved."""
        torch.clear_autocast_cache()

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
            if p not in self._shares:  # made once: moving a number to the device waits for it
                self._shares[p] = torch.tensor(1 / replicas(p), dtype=torch.float64).to(p.device, torch.float32)
        return ShardedReductions([self._shares[p] for p in parameters])

    @contextlib.contextmanager
    def without_sync(self, model: nn.Module) -> Iterator[None]:
        # Hooks of the Trainer's own average the gradients of replicated parameters wherever this flag is set.
        before, self._accelerator.sync_gradients = self._accelerator.sync_gradients, False
        try:
            yield
        finally:
            self._accelerator.sync_gradients = before

    def average_gradients(self, parameters: list[Parameter]) -> None:
        """Every rank has seen the same examples; what it holds whole may still have been rounded otherwise."""
        if whole := [p for p in parameters if not isinstance(p, DTensor)]:
            super().average_gradients(whole)


class FullyShardedEngine(ShardedEngine):
    """FSDP2, by Accelerate's plugin or loaded sharded, HSDP and meshes with tensor parallelism included.

    Gradients that wait for their synchronisation are held whole by FSDP itself and show in `p.grad` only after it.
    """

    def __init__(self, trainer: Trainer):
        super().__init__(trainer)
        self._needs_all_gradients = True  # FSDP fixes at its first pass which ones it reduces
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
        for module in self._modules:  # some keep their gathered weights from one forward pass to the next
            module.reshard()


class ZeroEngine(Engine):
    """DeepSpeed ZeRO-0, 1 and 2: every rank holds all weights; optimizer states and gradients may be sharded.

    Accelerate's `backward` steps the optimizer. Here the passes that look never reach DeepSpeed: their gradients are
    taken from autograd and, at global scope, averaged. Those that step do, and its step comes when the weights are back.
    """

    parameters_are_views = True

    def __init__(self, trainer: Trainer):
        super().__init__(trainer)
        self._deepspeed = trainer.model_wrapped
        self._wanted = [p for p in trainer.model.parameters() if p.requires_grad]

    @contextlib.contextmanager
    def looking(self, model: nn.Module, synced: bool) -> Iterator[nn.Module]:
        wanted = self._wanted

        def backward(loss: Tensor, **kwargs) -> None:
            gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
            for p, gradient in zip(wanted, gradients, strict=True):
                if gradient is not None:
                    p.grad = gradient if p.grad is None else p.grad.add_(gradient)

        with _replaced_backward(self._accelerator, backward):
            yield self._deepspeed.module
        if synced:
            self.average_gradients(wanted)

    @contextlib.contextmanager
    def stepping(self, model: nn.Module, synced: bool) -> Iterator[nn.Module]:
        def backward(loss: Tensor, **kwargs) -> None:
            self._deepspeed.set_gradient_accumulation_boundary(synced and self._accelerator.sync_gradients)
            self._deepspeed.backward(loss, **kwargs)

        with _replaced_backward(self._accelerator, backward):
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
        return {}  # those of the optimizer's are spread over ranks, and gathering them would cost what ZeRO saves


class Zero3Engine(ZeroEngine):
    """DeepSpeed ZeRO-3: each rank holds a flat part of every parameter, and DeepSpeed reduces all gradients."""

    def __init__(self, trainer: Trainer):
        super().__init__(trainer)
        self._whole_share = torch.ones((), device=self._wanted[0].device)

    def scope(self, config: SAMConfig) -> str:
        return "global" if config.scope == "auto" and config.m is None else super().scope(config)

    def reductions(self, parameters: Sequence[Parameter]) -> Reductions:
        return ShardedReductions([self._whole_share] * len(parameters))

    def looking(self, model: nn.Module, synced: bool) -> contextlib.AbstractContextManager[nn.Module]:
        return self.stepping(model, synced)

    @contextlib.contextmanager
    def gradients_only_for(self, chosen: Sequence[Parameter], trainable: Sequence[Parameter]) -> Iterator[None]:
        self._wanted = list(chosen)  # until the gradients are taken: DeepSpeed makes all of them
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


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    """The modules whose parameters FSDP2 gathers together."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def replicas(p: Tensor) -> int:
    """How many processes of the world hold the same part of `p`."""
    world = dist.get_world_size()
    if not isinstance(p, DTensor):
        return world
    for size, placement in zip(p.device_mesh.shape, p.placements, strict=True):
        if not placement.is_replicate():
            world //= size
    return world


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
