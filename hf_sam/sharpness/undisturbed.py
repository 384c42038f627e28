"""Measure a model without changing it: modes, attention, precision flags and random state are restored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

# Attention that torch can differentiate twice; "sdpa" is one because `undisturbed` selects its kernel of matrix products.
TWICE_DIFFERENTIABLE_ATTENTION = (None, "eager", "sdpa")


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run the block in evaluation mode, with full float32 precision and attention that can be differentiated twice.

    On exit, the modes of all modules, the attention implementations, the precision flags, a forward that Accelerate
    wrapped for mixed precision, and the random states of the CPU and of the model's device are restored. Weights,
    buffers and gradients are never changed here: see [`~hf_sam.sharpness.SubsetLoss`].

    Args:
        model (`nn.Module`): The model, not wrapped for distributed training.

    Raises:
        ValueError: The attention implementation has no second derivative and cannot be switched.
    """
    devices = {p.device for p in model.parameters() if p.device.type != "cpu"}
    with ExitStack() as stack:
        for device in devices:
            stack.enter_context(torch.random.fork_rng([device], device_type=device.type))
            stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(torch.random.fork_rng([]))
        stack.enter_context(torch.autocast("cpu", enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(_full_precision())
        stack.enter_context(_evaluation_mode(model))
        stack.enter_context(_original_forward(model))
        stack.enter_context(_differentiable_attention(model))
        yield


def check_whole(model: nn.Module) -> None:
    """Refuse a model of which this process holds only a part, or whose weights are not floating-point numbers.

    Raises:
        ValueError: Parameters are sharded, spread over devices, or quantised.
    """
    parameters = dict(model.named_parameters())
    if any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in parameters.values()):
        raise ValueError(
            "The model's parameters are sharded over processes. Sharpness needs unsharded ones: save a checkpoint and "
            "measure it with `hf-sam sharpness`."
        )
    if len({p.device for p in parameters.values()}) > 1:
        raise ValueError("The model is spread over several devices. Load it without device_map to measure it.")
    for name, p in parameters.items():
        if not p.is_floating_point():
            raise ValueError(
                f"The parameter {name!r} is stored as {p.dtype}: a quantised model cannot be differentiated. Load the "
                "checkpoint without quantisation to measure it."
            )


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:  # one by one: part of a training model may be in evaluation mode
            module.training = training


@contextmanager
def _original_forward(model: nn.Module) -> Iterator[None]:
    """Remove the `forward` that Accelerate installs for mixed precision, which would turn autocast on again."""
    wrapped = vars(model).get("forward")
    if "_original_forward" not in vars(model) or wrapped is None:
        yield
        return
    model.forward = model._original_forward
    try:
        yield
    finally:
        model.forward = wrapped


@contextmanager
def _differentiable_attention(model: nn.Module) -> Iterator[None]:
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    before = {id(module.config): (module.config, module.config._attn_implementation) for module in models}
    try:
        for module in models:
            implementation = module.config._attn_implementation
            if implementation not in TWICE_DIFFERENTIABLE_ATTENTION:
                if not module._can_set_attn_implementation():
                    raise ValueError(
                        f"The attention implementation {implementation!r} of {type(module).__name__} cannot be "
                        "differentiated twice, and this model does not allow switching it. Load the model with "
                        "attn_implementation='eager'."
                    )
                module.set_attn_implementation("eager")
        yield
    finally:
        for config, implementation in before.values():
            config._attn_implementation_internal = (
                implementation  # bypasses the setter, which would query the hub again
            )


@contextmanager
def _full_precision() -> Iterator[None]:
    """Turn TF32 off: differences between losses would be lost in its 10-bit mantissa."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
