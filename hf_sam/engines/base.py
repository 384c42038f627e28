"""The engine for one process and DDP: synchronises gradients and computes norms."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

from ..config import SAMConfig
from ..methods.base import overrides
from ..update.buckets import buckets
from ..update.parameters import (
    Gradients,
    are_plain_tensors,
    existing_gradients,
    gradients_only_for,
    put_gradients,
    sharded_like,
    take_gradients,
)
from ..update.reductions import Reductions

if TYPE_CHECKING:
    from transformers import Trainer


class Engine:
    """One process, or DDP: every rank holds all parameters.

    Args:
        trainer (`~transformers.Trainer`): The trainer, of which only accelerator and model are read.
    """

    # Whether the engine holds addresses of the parameters' memory, so that they may only be changed in place.
    parameters_are_views = False
    # Whether the engine moves parameters in memory between and during passes.
    parameters_move = False
    # Whether the optimizer's groups hold the model's own parameters.
    optimizer_holds_parameters = True

    def __init__(self, trainer: Trainer):
        self._accelerator = trainer.accelerator
        # DDP waits for every gradient unless it searches for unused parameters.
        wrapper, scope = trainer.model_wrapped, self.scope(trainer.sam_config)
        counts = isinstance(wrapper, DistributedDataParallel) and not wrapper.find_unused_parameters
        self._needs_all_gradients = counts and scope == "global"
        if is_compiled(trainer) and overrides(trainer.sam_config.parts.ascent, "parameters"):
            self._needs_all_gradients = True  # each choice of parameters would trigger a recompilation
        if checkpoints_reentrantly(trainer.model):
            self._needs_all_gradients = True  # blocks whose input needs no gradient would compute none
        # Whether gradients are views of DDP's buckets, which its next pass overwrites.
        self._gradients_are_views = (
            isinstance(wrapper, DistributedDataParallel) and wrapper.gradient_as_bucket_view and scope == "global"
        )

    @property
    def may_skip_steps(self) -> bool:
        """Whether the optimizer skips steps whose gradients have overflowed."""
        return self._accelerator.scaler is not None

    @property
    def rank(self) -> int:
        """The rank of this process."""
        return self._accelerator.process_index

    @property
    def batches(self) -> int:
        """The number of processes that see different examples at the same time."""
        parallelism = self._accelerator.parallelism_config
        return self._accelerator.num_processes // (parallelism.non_data_parallel_size if parallelism else 1)

    def scope(self, config: SAMConfig) -> str:
        """`config.scope` with `"auto"` resolved."""
        if config.scope != "auto":
            return config.scope
        return "device" if config.m is None else "micro"

    def reductions(self, parameters: Sequence[Parameter]) -> Reductions:
        """Norms and inner products of lists of one tensor per parameter, in the order of `parameters`."""
        return Reductions()

    def without_sync(self, model: nn.Module) -> contextlib.AbstractContextManager:
        """A context in which backward passes do not synchronise gradients."""
        return self._accelerator.no_sync(model)

    @contextlib.contextmanager
    def ascent_pass(self, model: nn.Module, synced: bool) -> Iterator[nn.Module]:
        """A context for a pass whose gradients determine the perturbation; yields the module to run.

        With `synced`, gradients are synchronised if the Trainer would for this micro-batch, otherwise never. The
        optimizer never steps along these gradients.
        """
        with contextlib.nullcontext() if synced else self.without_sync(model):
            yield model

    def descent_pass(self, model: nn.Module, synced: bool) -> contextlib.AbstractContextManager[nn.Module]:
        """A context for a pass whose gradients the optimizer steps along; yields the module to run."""
        return self.ascent_pass(model, synced)

    def finish_step(self) -> None:
        """Take the optimizer step if the engine does that itself; called after the weights are restored."""

    @contextlib.contextmanager
    def gradients_only_for(self, chosen: Sequence[Parameter], trainable: Sequence[Parameter]) -> Iterator[None]:
        """A context in which only `chosen` parameters get gradients; those of others are not computed if possible."""
        if self._needs_all_gradients:
            yield
            put_gradients(dict.fromkeys(set(trainable).difference(chosen)))
            return
        with gradients_only_for(chosen, trainable), backward_where_needed(self._accelerator):
            yield

    def take_gradients(self, parameters: Sequence[Parameter]) -> Gradients:
        """Move the gradients of ascent passes out of the engine; the caller owns them."""
        return take_gradients(parameters, are_views=self._gradients_are_views)

    def gradients(self, parameters: Sequence[Parameter]) -> Gradients:
        """The existing gradients, left in place."""
        gradients = existing_gradients(parameters)
        return (
            gradients
            if are_plain_tensors(gradients.values())
            else {p: sharded_like(p, g) for p, g in gradients.items()}
        )

    def renew_copies(self) -> None:
        """Invalidate everything derived from the weights, after they have changed."""
        torch.clear_autocast_cache()

    def loss_scale(self, device: torch.device) -> Tensor | float:
        """The fp16 loss scale, 1.0 without fp16; does not synchronise with the device."""
        scaler = self._accelerator.scaler
        return 1.0 if scaler is None else scaler.scale(torch.ones((), device=device))

    def average_gradients(self, parameters: list[Parameter]) -> None:
        """Average the gradients of unsynchronised passes over all ranks, as DDP's backward would.

        Buckets are reduced one at a time, in the same order on every rank. Gradients that no rank has stay None; only
        ranks with missing gradients synchronise with the device for that.
        """
        if self._accelerator.num_processes == 1 or not parameters:
            return
        unused = [p.grad is None for p in parameters]
        unused_everywhere = torch.tensor(unused, dtype=torch.int32).to(parameters[0].device, non_blocking=True)
        dist.all_reduce(unused_everywhere, op=dist.ReduceOp.MIN)
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        for (gradients,) in buckets([p.grad for p in parameters]):
            flat = _flatten_dense_tensors(gradients)
            dist.all_reduce(flat)
            flat /= self._accelerator.num_processes
            torch._foreach_copy_(gradients, _unflatten_dense_tensors(flat, gradients))
        if any(unused):
            for p, is_unused in zip(parameters, unused_everywhere.tolist(), strict=True):
                if is_unused:
                    p.grad = None

    def agree(self, flag: bool) -> bool:
        """Whether `flag` holds on every rank; synchronises all ranks."""
        if self._accelerator.num_processes == 1:
            return flag
        agreed = torch.tensor([int(flag)], device=self._accelerator.device)
        dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
        return bool(agreed.item())


def is_compiled(trainer: Trainer) -> bool:
    """Whether the model is compiled, by `torch_compile=True` or by the user."""
    modules = (trainer.model, trainer.model_wrapped)
    by_user = any(
        hasattr(module, "_torchdynamo_orig_callable") or getattr(module, "_compiled_call_impl", None)
        for module in modules
    )
    return bool(trainer.args.torch_compile) or by_user


def checkpoints_reentrantly(model: nn.Module) -> bool:
    """Whether a transformers model recomputes activations with `use_reentrant=True`."""
    functions = (getattr(module, "_gradient_checkpointing_func", None) for module in model.modules())
    return any(getattr(function, "keywords", {}).get("use_reentrant") for function in functions)


@contextlib.contextmanager
def loss_instead_of_backward(accelerator) -> Iterator[list[Tensor]]:
    """Collect the normalised losses that `training_step` passes to `accelerator.backward`, without a backward pass."""
    losses: list[Tensor] = []
    with replaced_backward(accelerator, lambda loss, **kwargs: losses.append(loss)):
        yield losses


def backward_where_needed(accelerator) -> contextlib.AbstractContextManager:
    """A context that skips the backward pass of losses that require no gradient."""
    backward = accelerator.backward
    return replaced_backward(
        accelerator, lambda loss, **kwargs: backward(loss, **kwargs) if loss.requires_grad else None
    )


@contextlib.contextmanager
def replaced_backward(accelerator, backward: Callable) -> Iterator[None]:
    before = vars(accelerator).get("backward")  # None for the method of the class
    accelerator.backward = backward
    try:
        yield
    finally:
        if before is None:
            del accelerator.backward
        else:
            accelerator.backward = before
