"""Where to look: the perturbation `eps` as pure functions of lists of tensors.

Each function returns `(directions, scale)` with `eps = scale * directions`: one tensor per parameter, and one 0-dim
factor that keeps the division by a norm on the device. They overwrite the gradients they are given, whose memory the
caller no longer needs; momenta and whatever is given for p = 2 without adaptive scaling stay as they are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..update.reductions import Reductions


def dual_norm_direction(
    gradients: list[Tensor], rho: float | Tensor, p: float, reductions: Reductions
) -> tuple[list[Tensor], Tensor]:
    r"""The maximiser of `<g, eps>` over the ball `||eps||_p <= rho` (Foret et al. 2021, Equation 2).

        eps = rho * sign(g) |g|^(q-1) / ||g||_q^(q/p),   1/p + 1/q = 1

    Computed on `u = g / max|g|`, of which `eps` is the same function, so that no power of a small gradient underflows.

    Args:
        gradients (`list[Tensor]`): `g`, one tensor per parameter; overwritten unless `p` is 2.
        rho (`float`): Radius of the ball.
        p (`float`): Norm of the ball, in [1, inf]. At `p = 1` the largest coordinates share rho equally.
        reductions (`Reductions`): Where norms are taken.

    Returns:
        `(directions, scale)`. The scale is 0 where the norm of `g` is 0 or not finite.
    """
    if p == 2:
        norm = reductions.norm(gradients)
        return gradients, _usable(norm, rho / norm)

    largest = reductions.norm(gradients, math.inf)
    if p == math.inf:
        torch._foreach_sign_(gradients)
        return gradients, _usable(largest, torch.full_like(largest, float(rho)))
    if p == 1:
        winners = [g.abs() == largest for g in gradients]
        for g, wins in zip(gradients, winners, strict=True):
            g.sign_().mul_(wins)
        return gradients, _usable(largest, rho / reductions.count(winners).to(largest.dtype))

    q = p / (p - 1)
    torch._foreach_div_(gradients, largest)
    norm = reductions.norm(gradients, q)
    for g in gradients:
        g.copy_(g.sign() * g.abs() ** (q - 1))
    return gradients, _usable(largest, rho / norm ** (q - 1))


def adaptive_direction(
    gradients: list[Tensor], weights: list[Tensor], rho: float | Tensor, p: float, eta: float, reductions: Reductions
) -> tuple[list[Tensor], Tensor]:
    """The maximiser over the ball measured in units of the weights (Kwon et al. 2021, Equation 3, for any p).

        eps = T d(T g),   T = |w| + eta,   d the dual norm direction;   at p = 2: rho T^2 g / ||T g||

    Every selected tensor is scaled, as in the paper; its authors' code leaves T = 1 on tensors not named weight.
    """

    def scale_by_weights(tensors: list[Tensor]) -> None:
        for tensor, w in zip(tensors, weights, strict=True):
            tensor.mul_(w.abs().add_(eta))

    scale_by_weights(gradients)
    directions, scale = dual_norm_direction(gradients, rho, p, reductions)
    scale_by_weights(directions)
    return directions, scale


def remove_average(gradients: list[Tensor], averages: list[Tensor], sigma: float, loss_scale: Tensor | float) -> None:
    """Friendly SAM's `g - sigma m` in place, the batch's own part of the gradient (Li et al. 2024, Equation 10).

    `averages` are in units of the loss; the gradients may be `loss_scale` times larger.
    """
    torch._foreach_sub_(gradients, torch._foreach_mul(averages, sigma * loss_scale))


def momentum_direction(momenta: list[Tensor], rho: float, reductions: Reductions) -> tuple[list[Tensor], Tensor]:
    """`eps = -rho v / ||v||`: ahead, where the momentum is about to carry the weights (Becker et al. 2024, Alg. 1)."""
    directions, scale = dual_norm_direction(momenta, rho, 2, reductions)  # which overwrites nothing at p = 2
    return directions, -scale


def random_direction(
    weights: list[Tensor], rho: float, generator: torch.Generator, reductions: Reductions
) -> tuple[list[Tensor], Tensor]:
    """`eps = rho z / ||z||`, `z` standard normal: uniform on the sphere, the control for every other direction."""
    noise = [torch.randn(w.shape, generator=generator, device=w.device, dtype=w.dtype) for w in weights]
    return dual_norm_direction(noise, rho, 2, reductions)


def add_weight_decay(gradients: list[Tensor], weights: list[Tensor], decay: list[float], loss_scale: Tensor | float):
    """`g + weight_decay * w` in place: the gradient with the paper's L2 term (Foret et al. 2021, Equation 1)."""
    for g, w, factor in zip(gradients, weights, decay, strict=True):
        if factor:
            g.add_(w * (factor * loss_scale))


def _usable(norm: Tensor, scale: Tensor) -> Tensor:
    """The scale, or exactly 0 where there is no direction: a zero gradient, or one with NaN or infinity."""
    return torch.where(torch.isfinite(norm) & (norm > 0), scale, torch.zeros_like(scale))
