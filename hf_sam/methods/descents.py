"""What to step along: the gradient the base optimizer gets, as pure functions of lists of tensors.

Each function changes `perturbed` (`g_s`, the gradient at `w + eps`) in place, given the clean gradient `g` at `w`.
Norms and projections are global: taken over all parameters together.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..update.reductions import Reductions


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
    """`g_s - proj_g(g_s)`.

    LookSAM keeps it for the steps between (Liu et al. 2022, Equation 5). For p = 2 it is also what the Hessian is
    applied to in the term that SAM drops, `(d eps / d w)^T g_s = rho/||g|| H (I - u u^T) g_s`, `u = g/||g||`.
    """
    parallel = _projection_coefficient(perturbed, clean, reductions)
    # Not addcmul, which would round the coefficient to 16-bit gradients' type and leave a part along g.
    return torch._foreach_sub(perturbed, torch._foreach_mul(clean, parallel))


def add_orthogonal_part(gradients: list[Tensor], kept: list[Tensor], alpha: float, reductions: Reductions) -> None:
    """LookSAM between its SAM steps: `g + alpha ||g||/||g_v|| g_v` in place (Liu et al. 2022, Algorithm 1)."""
    norm = reductions.norm(kept)
    factor = torch.where(norm > 0, alpha * reductions.norm(gradients) / norm, torch.zeros_like(norm))
    # No product in memory; for 16-bit gradients this rounds the length of what is added, not its direction.
    torch._foreach_addcmul_(gradients, kept, [factor.to(part) for part in kept])


def per_example_losses(logits: Tensor, labels: Tensor, shifted: bool = False) -> Tensor:
    """The loss of each example, shape `(batch,)`, for ESAM's choice of the examples that a perturbation hits hardest.

    Args:
        logits (`Tensor`): `(batch, classes)`, or `(batch, tokens, vocabulary)`.
        labels (`Tensor`): Class indices with -100 ignored, or floats of the shape of `logits`: several 0/1 labels for
            each example, or one target.
        shifted (`bool`, *optional*, defaults to `False`): Token t is predicted at position t - 1 (causal models).
    """
    if labels.is_floating_point():
        targets = labels.reshape(logits.shape)
        loss = F.binary_cross_entropy_with_logits if logits.shape[-1] > 1 else F.mse_loss
        return loss(logits.float(), targets.float(), reduction="none").flatten(1).mean(1)
    if shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    losses = F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), reduction="none", ignore_index=-100)
    losses, counted = losses.reshape(len(labels), -1), labels.ne(-100).reshape(len(labels), -1)
    return losses.sum(1) / counted.sum(1).clamp(min=1)


def hardest_hit(before: Tensor, after: Tensor, gamma: float) -> Tensor:
    """Indices, in order, of the share `gamma` of examples whose loss rose most (Du et al. 2022, Equation 9)."""
    count = max(1, math.ceil(gamma * len(before)))
    return (after - before).topk(count).indices.sort().values


def functional_loss(loss: Tensor, logits: Tensor, clean_gradient: Tensor) -> Tensor:
    """A loss with the value of `loss` and the gradient `J(w + eps)^T grad_logits L(w)` (Singh et al. 2025, Section 4)."""
    surrogate = (logits * clean_gradient).sum()
    return loss.detach() + surrogate - surrogate.detach()


def _projection_coefficient(vectors: list[Tensor], onto: list[Tensor], reductions: Reductions) -> Tensor:
    """`<v, u> / <u, u>`, or 0 where `u` is 0."""
    square = reductions.dot(onto, onto)
    return torch.where(square > 0, reductions.dot(vectors, onto) / square, torch.zeros_like(square))
