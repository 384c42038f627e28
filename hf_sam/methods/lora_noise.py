"""Flat-LoRA: noise on the merged weight of each LoRA layer, applied to the activations, so that no weight changes."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .auxiliary_lora import linear_lora_layers
from .base import Ascent, Needs, Step


@dataclass(frozen=True)
class LoraNoise(Ascent):
    """Gaussian noise N on the merged weight `W' = W + s B A` of each LoRA layer, in one pass.

    Row i of N has the standard deviation `f_t rho ||W'_i|| / sqrt(n)`, with n the number of inputs and
    `f_t = (1 - cos(pi t / T)) / 2` over the run; N is redrawn in every step (Flat-LoRA, Li et al. 2024, arXiv
    2409.14396, and the authors' code). `(W' + N) x` is computed as `W' x + N x`, and N is drawn from its seed in the
    forward pass and again in the backward pass. So nothing is stored or restored, and quantized weights work, too.
    """

    needs: ClassVar = Needs.NOISE

    def eps(self, g: None, step: Step) -> None:
        return None

    def radius(self, step: Step) -> float:
        return step.rho * (1 - math.cos(math.pi * step.progress)) / 2

    def attach(self, model: nn.Module, seed: int) -> NoisyLayers:
        return NoisyLayers(model)

    def applied(self, step: Step) -> AbstractContextManager:
        rho = self.radius(step)
        step.record(sam_rho=rho)
        return step.attached.noisy(rho, step.generator)


class NoisyLayers:
    """The LoRA layers of a PEFT model, each with a hook that adds noise inside `noisy`.

    Args:
        model (`nn.Module`): A PEFT model whose active adapter is LoRA.

    Raises:
        ValueError: The model has no linear LoRA layer.
    """

    def __init__(self, model: nn.Module):
        self._layers = linear_lora_layers(model, "method='flat-lora' adds noise to the weights under LoRA adapters")
        self._squares = [_squared_row_norms(layer) for layer in self._layers.values()]  # of W, which is frozen
        self._noise: tuple[float, list[int]] | None = None  # rho, and one seed per layer
        self._hooks = [layer.register_forward_hook(self._hook(i)) for i, layer in enumerate(self._layers.values())]

    @contextlib.contextmanager
    def noisy(self, rho: float, generator: torch.Generator) -> Iterator[None]:
        """Run the passes inside at `W' + N`, including recomputation in the backward pass."""
        dice = random.Random(generator.initial_seed())
        self._noise = rho, [dice.getrandbits(63) for _ in self._layers]
        try:
            yield
        finally:
            self._noise = None

    def drawn(self, i: int) -> tuple[Tensor, int]:
        """Standard deviations of the rows of the i-th layer's noise, and its seed; only inside `noisy`."""
        rho, seeds = self._noise
        return _deviations(list(self._layers.values())[i], self._squares[i], rho), seeds[i]

    def remove(self) -> None:
        """Remove the hooks from the model."""
        for hook in self._hooks:
            hook.remove()

    def state_dict(self) -> dict[str, Tensor]:
        """Empty: nothing is kept from step to step."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state_dict`."""

    def _hook(self, i: int):
        def add_noise(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if self._noise is None:
                return output
            deviations, seed = self.drawn(i)
            return output + _NoiseProduct.apply(inputs[0], deviations, seed, layer.in_features).to(output.dtype)

        return add_noise


class _NoiseProduct(torch.autograd.Function):
    """`x N^T`, with N drawn from a seed, and drawn again for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, deviations: Tensor, seed: int, inputs: int) -> Tensor:
        ctx.save_for_backward(deviations)
        ctx.seed, ctx.inputs, ctx.dtype = seed, inputs, x.dtype
        return x @ noise(deviations, seed, inputs).to(x.dtype).T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (deviations,) = ctx.saved_tensors
        return gradient.to(ctx.dtype) @ noise(deviations, ctx.seed, ctx.inputs).to(ctx.dtype), None, None, None


def noise(deviations: Tensor, seed: int, inputs: int) -> Tensor:
    """N, shape `(rows, inputs)`; row i has the standard deviation `deviations[i]`. The same for the same seed."""
    generator = torch.Generator(deviations.device).manual_seed(seed)
    draw = torch.randn(len(deviations), inputs, generator=generator, device=deviations.device, dtype=deviations.dtype)
    return draw.mul_(deviations[:, None])


def _squared_row_norms(layer: nn.Module) -> Tensor:
    from peft.utils.integrations import dequantize_module_weight

    weight = dequantize_module_weight(layer.get_base_layer()).detach()
    return weight.to(torch.promote_types(weight.dtype, torch.float32)).square().sum(1)


@torch.no_grad()
def _deviations(layer: nn.Module, squares: Tensor, rho: float) -> Tensor:
    """`rho ||W'_i|| / sqrt(n)`, without forming W'.

    `||W'_i||^2 = ||W_i||^2 + 2 s B_i . (A W_i^T) + s^2 B_i A A^T B_i^T` needs no matrix larger than the factors.
    """
    from peft.utils.integrations import dequantize_module_weight

    adapter = layer.active_adapters[0]
    weight = dequantize_module_weight(layer.get_base_layer()).to(squares.dtype)
    a, b = (factor[adapter].weight.to(squares.dtype) for factor in (layer.lora_A, layer.lora_B))
    scale = layer.scaling[adapter]
    merged = squares + 2 * scale * (b * (weight @ a.T)).sum(1) + scale**2 * ((b @ (a @ a.T)) * b).sum(1)
    return rho * merged.clamp(min=0).sqrt() / math.sqrt(layer.in_features)
