"""Bi-LoRA's second LoRA pair, which ascends while the adapter descends (Liu et al. 2025, arXiv 2508.19564)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors


class AuxiliaryLora:
    """One pair `(A2, B2)` for each linear LoRA layer of a PEFT model; not part of the model, and not saved with it.

    Inside `active`, each such layer also adds `s B2 A2 x`, with `s` the adapter's scaling, and `backward` computes
    the pair's gradient along with all others. `ascend` then moves the pair along it and clips `||s B2 A2||_F`, over
    all layers together, to rho.

    Args:
        model (`nn.Module`): A PEFT model whose active adapter is LoRA.
        seed (`int`): Seed of the initial `A2`; `B2` starts at zero, as in LoRA.

    Raises:
        ValueError: The model has no linear LoRA layer.
    """

    def __init__(self, model: nn.Module, seed: int):
        self._layers = linear_lora_layers(model, "method='bilora' attaches a second LoRA pair to each LoRA layer")
        self._pairs: dict[str, tuple[Tensor, Tensor]] = {}
        self._scales: dict[tuple[float, ...], Tensor] = {}
        self._is_active = False
        generator = torch.Generator().manual_seed(seed)
        for name, layer in self._layers.items():
            adapter = layer.active_adapters[0]
            first, second = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight  # (r, in), (out, r)
            a, b = torch.empty(first.shape), torch.zeros(second.shape)
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
            self._pairs[name] = tuple(t.to(first).requires_grad_(True) for t in (a, b))
        self._hooks = [layer.register_forward_hook(self._hook(name)) for name, layer in self._layers.items()]

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Run the passes inside at the perturbed weights, including recomputation in the backward pass."""
        self._is_active = True
        try:
            yield
        finally:
            self._is_active = False

    @torch.no_grad()
    def ascend(self, rho: float, lr: float, loss_scale: Tensor | float) -> Tensor:
        """`theta2 <- clip_rho(theta2 + lr grad)`, and clear the gradients; returns the norm of the perturbation."""
        factors = [factor for factor in self._factors() if factor.grad is not None]
        changes = torch._foreach_mul([factor.grad for factor in factors], lr / loss_scale)
        for factor in factors:
            factor.grad = None
        if changes:
            finite = torch.nan_to_num(_flatten_dense_tensors(changes), nan=0.0, posinf=0.0, neginf=0.0)
            torch._foreach_add_(factors, _unflatten_dense_tensors(finite, changes))
        norm = self.norm()
        shrink = torch.clamp(rho / norm, max=1.0).nan_to_num(nan=1.0)
        seconds = [b for _, b in self._pairs.values()]
        torch._foreach_mul_(seconds, shrink.to(seconds[0]))
        return norm * shrink

    @torch.no_grad()
    def norm(self) -> Tensor:
        """`||s B2 A2||_F` over all layers, from r x r matrices alone: `||B A||^2 = <B^T B, A A^T>`.

        Layers of the same shape are processed together, so that the number of operations does not grow with the depth.
        """
        groups: dict[tuple, list[str]] = {}
        for name, (a, b) in self._pairs.items():
            groups.setdefault((a.shape, b.shape), []).append(name)
        squares = []
        for names in groups.values():
            pairs = [self._pairs[name] for name in names]
            a, b = (torch.stack(factors) for factors in zip(*pairs, strict=True))  # (layers, r, in), (layers, out, r)
            a, b = (factor.to(torch.promote_types(factor.dtype, torch.float32)) for factor in (a, b))
            scales = tuple(self._scaling(name) ** 2 for name in names)
            if scales not in self._scales:  # copying numbers to the device synchronizes with it
                self._scales[scales] = torch.tensor(scales, dtype=a.dtype, device=a.device)
            squares.append(self._scales[scales] @ ((b.mT @ b) * (a @ a.mT)).sum((1, 2)))
        return torch.stack(squares).sum().clamp(min=0).sqrt()

    def remove(self) -> None:
        """Remove the hooks from the model."""
        for hook in self._hooks:
            hook.remove()

    def state_dict(self) -> dict[str, Tensor]:
        """The factors by layer, for a checkpoint."""
        return {
            f"{letter}2.{name}": factor.detach()
            for name, pair in self._pairs.items()
            for letter, factor in zip("AB", pair, strict=True)
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state_dict`."""
        for name, factor in self.state_dict().items():
            factor.copy_(state[name])

    def _factors(self) -> Iterator[Tensor]:
        for pair in self._pairs.values():
            yield from pair

    def _scaling(self, name: str) -> float:
        layer = self._layers[name]
        return layer.scaling[layer.active_adapters[0]]

    def _hook(self, name: str):
        def add_auxiliary(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not self._is_active:
                return output
            a, b = self._pairs[name]
            x = inputs[0].to(a.dtype)
            return output + (self._scaling(name) * (x @ a.T) @ b.T).to(output.dtype)

        return add_auxiliary


def _is_linear_lora(module: nn.Module) -> bool:
    adapters = getattr(module, "active_adapters", None)
    layers = getattr(module, "lora_A", None)
    if not adapters or not isinstance(layers, nn.ModuleDict) or adapters[0] not in layers:
        return False
    return isinstance(layers[adapters[0]], nn.Linear)


def linear_lora_layers(model: nn.Module, purpose: str) -> dict[str, nn.Module]:
    """The linear LoRA layers of a PEFT model, by name.

    Raises:
        ValueError: It has none; the message starts with `purpose`.
    """
    layers = {name: module for name, module in model.named_modules() if _is_linear_lora(module)}
    if not layers:
        raise ValueError(
            f"{purpose}, but this model has no linear LoRA layer. Wrap it with peft.get_peft_model(model, LoraConfig(...)), or "
            "choose another method."
        )
    return layers
