"""Weight-only quantization by rounding to the nearest level, and torch's dynamic int8."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .weights import WeightMatrix


def round_to_nearest(weight: Tensor, bits: int, group_size: int | None = None) -> Tensor:
    """
    Quantize and dequantize: each group gets `2^bits` evenly spaced levels from its minimum to its maximum.

    Zero is always a level, so the range is widened to include it. This is the round-to-nearest baseline of Frantar et
    al. 2023 (GPTQ, arXiv 2210.17323) and the asymmetric affine scheme of torchao.

    Args:
        weight (`Tensor` of shape `(output channels, inputs)`): A weight in full precision.
        bits (`int`): Number of bits, at least 1.
        group_size (`int`, *optional*): Number of consecutive inputs of a channel that share scale and zero point; the
            last group may be smaller. The whole channel if `None`.
    """
    if bits < 1:
        raise ValueError(f"bits={bits} must be at least 1.")
    if group_size is not None and group_size < 1:
        raise ValueError(f"group_size={group_size} must be at least 1.")
    width = weight.shape[1]
    size = min(group_size or width, width)
    filled = torch.cat(
        [weight, weight[:, -1:].expand(-1, -width % size)], dim=1
    )  # padding by repetition keeps minimum and maximum
    groups = filled.unflatten(1, (-1, size))  # (output channels, groups, size)
    if groups.dtype not in (torch.float32, torch.float64):
        groups = groups.float()
    low = groups.amin(-1, keepdim=True).clamp(max=0)
    high = groups.amax(-1, keepdim=True).clamp(min=0)
    highest = 2**bits - 1
    scale = ((high - low) / highest).clamp(min=torch.finfo(groups.dtype).tiny)
    zero = -(low / scale).round()
    level = ((groups / scale).round() + zero).clamp(0, highest)
    return ((level - zero) * scale).flatten(1)[:, :width].to(weight.dtype)


def quantized(matrices: Mapping[str, WeightMatrix], bits: int, group_size: int | None = None) -> dict[str, Tensor]:
    """Each of `matrices`, rounded by `round_to_nearest`."""
    return {
        name: matrix.map_rows(lambda rows: round_to_nearest(rows, bits, group_size))
        for name, matrix in matrices.items()
    }


def dynamic_int8(model: nn.Module, names: Mapping[str, WeightMatrix]) -> nn.Module:
    """
    A copy of `model` on the CPU whose linear layers have int8 weights and round their activations on the fly.

    Args:
        model (`nn.Module`): The model, which does not change.
        names (`Mapping`): The weights to quantize, see `weight_matrices`.

    Raises:
        ImportError: This version of torch no longer has dynamic quantization.
    """
    from torch.ao.quantization import default_dynamic_qconfig, quantize_dynamic

    chosen = {
        name: default_dynamic_qconfig
        for name, module in model.named_modules()
        if type(module) is nn.Linear and f"{name}.weight" in names
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message=".*quantized tensor creation functions.*", category=UserWarning)
        return quantize_dynamic(copy.deepcopy(model).cpu().eval(), chosen, dtype=torch.qint8, inplace=True)
