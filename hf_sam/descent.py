"""What to step along: the gradient the base optimizer gets, as pure functions of lists of tensors.

Each function changes `perturbed` (`g_s`, the gradient at `w + eps`) in place, given the clean gradient `g` at `w`.
Norms and projections are global: taken over all parameters together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reductions import Reductions


def surrogate_gap(clean: list[Tensor], perturbed: list[Tensor], alpha: float, reductions: Reductions) -> None:
    """GSAM: `g_s - alpha * g_orth`, `g_orth` the part of `g` orthogonal to `g_s` (Zhuang et al. 2022, Algorithm 1)."""
    parallel = _projection_coefficient(clean, perturbed, reductions)
    torch._foreach_mul_(perturbed, 1 + alpha * parallel)
    torch._foreach_add_(perturbed, clean, alpha=-alpha)


def weighted_sharpness(clean: list[Tensor], perturbed: list[Tensor], gamma: float) -> None:
    """WSAM: `(1 - 2 gamma)/(1 - gamma) g + gamma/(1 - gamma) g_s` (Yue et al. 2023, Algorithm 1); 0.5 is SAM."""
    torch._foreach_mul_(perturbed, gamma / (1 - gamma))
    torch._foreach_add_(perturbed, clean, alpha=(1 - 2 * gamma) / (1 - gamma))


def orthogonal_part(clean: list[Tensor], perturbed: list[Tensor], reductions: Reductions) -> list[Tensor]:
    """LookSAM's `g_v = g_s - proj_g(g_s)`, kept for the steps between (Liu et al. 2022, Equation 5)."""
    parallel = _projection_coefficient(perturbed, clean, reductions)
    return torch._foreach_sub(perturbed, torch._foreach_mul(clean, parallel))


def add_orthogonal_part(gradients: list[Tensor], kept: list[Tensor], alpha: float, reductions: Reductions) -> None:
    """LookSAM between its SAM steps: `g + alpha ||g||/||g_v|| g_v` in place (Liu et al. 2022, Algorithm 1)."""
    norm = reductions.norm(kept)
    factor = torch.where(norm > 0, alpha * reductions.norm(gradients) / norm, torch.zeros_like(norm))
    torch._foreach_add_(gradients, torch._foreach_mul(kept, factor))


def _projection_coefficient(vectors: list[Tensor], onto: list[Tensor], reductions: Reductions) -> Tensor:
    """`<v, u> / <u, u>`, or 0 where `u` is 0."""
    square = reductions.dot(onto, onto)
    return torch.where(square > 0, reductions.dot(vectors, onto) / square, torch.zeros_like(square))
