"""The weights that treatments alter, as matrices with one row per output channel, and their temporary replacement."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from ..update.roles import groups_of

BODY = ("attention", "mlp", "other")  # of `hf_sam.update.roles.GROUPS`; norms have no matrices


@dataclass(frozen=True)
class WeightMatrix:
    """
    A layer's weight, viewed as a matrix `(output channels, inputs)`.

    Args:
        weight (`Tensor`): The weight in the module's own layout.
        outputs (`tuple[int, ...]`): The axes that index output channels.
    """

    weight: Tensor
    outputs: tuple[int, ...]

    def map_rows(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply `function` to the matrix `(output channels, inputs)`; the result has the weight's own shape."""
        inputs = [axis for axis in range(self.weight.ndim) if axis not in self.outputs]
        order = [*self.outputs, *inputs]
        moved = self.weight.detach().permute(order)
        rows = math.prod(moved.shape[: len(self.outputs)])
        altered = function(moved.reshape(rows, -1)).reshape(moved.shape)
        return altered.permute([order.index(axis) for axis in range(self.weight.ndim)])


def weight_matrices(model: nn.Module, embeddings: bool = False, head: bool = False) -> dict[str, WeightMatrix]:
    """
    The weights that quantization, pruning and noise alter: linear and convolutional layers, and stacked experts.

    Biases and normalization layers are never altered. Embeddings (of tokens, positions and patches) and the head are
    left out by default: libraries keep them in full precision, and rounding them would mask the effect on the body.
    Output embeddings that are tied to the input embeddings count as embeddings.

    Args:
        model (`nn.Module`): Any model.
        embeddings (`bool`, *optional*, defaults to `False`): Include the embeddings.
        head (`bool`, *optional*, defaults to `False`): Include the head.
    """
    altered = {*BODY, *(["embeddings"] if embeddings else []), *(["head"] if head else [])}
    groups = groups_of(model)
    owners = {id(p): module for module in model.modules() for p in module._parameters.values() if p is not None}
    return {
        name: WeightMatrix(p, _output_axes(owners[id(p)], p))
        for name, p in model.named_parameters()
        if p.ndim > 1 and p.is_floating_point() and groups[name] in altered and "bias" not in name
    }


def _output_axes(owner: nn.Module, weight: Tensor) -> tuple[int, ...]:
    if isinstance(owner, Conv1D) or (isinstance(owner, _ConvNd) and owner.transposed):
        return (1,)
    if isinstance(owner, _ConvNd):
        return (0,)
    return tuple(range(weight.ndim - 1))  # a matrix, or one matrix per expert


@contextmanager
def replaced(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[nn.Module]:
    """
    Run the block with other values in the named parameters and buffers, then restore the old ones bit for bit.

    Args:
        model (`nn.Module`): The model, altered in place.
        tensors (`Mapping[str, Tensor]`): New values by name, of the same shapes.
    """
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    kept = {name: own[name].detach().clone() for name in tensors}
    try:
        _assign(own, tensors)
        yield model
    finally:
        _assign(own, kept)


@torch.no_grad()
def _assign(own: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        if own[name].shape != value.shape:
            raise ValueError(f"{name} has the shape {tuple(own[name].shape)}, not {tuple(value.shape)}.")
        own[name].copy_(value)
