"""Sharpness measures of a [`SubsetLoss`] around its weights: pure functions of flat vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .estimators import Estimate
from .loss import SubsetLoss


@dataclass(frozen=True)
class Objective:
    r"""The paper's objective `max_{||eps|| <= rho} L(w + eps) + lambda ||w||_2^2` (Foret et al. 2021, Equation 1), by term.

    Args:
        loss (`float`): `L(w)`.
        sharpness (`float`): `L(w + eps) - L(w)` at the first-order maximiser `eps`.
        l2 (`float`): `weight_decay / 2 * ||w||_2^2`, the term whose gradient is `weight_decay * w`.
        rho (`float`): Size of `eps`.
    """

    loss: float
    sharpness: float
    l2: float
    rho: float

    @property
    def total(self) -> float:
        return self.loss + self.sharpness + self.l2


def scaling(weights: Tensor, adaptive: bool, eta: float = 0.0) -> Tensor | float:
    """`T`, the unit of perturbations: `|w| + eta` per coordinate, or 1 (Kwon et al. 2021)."""
    return weights.abs() + eta if adaptive else 1.0


def ascent_direction(gradient: Tensor, scale: Tensor | float, p: float) -> Tensor:
    """The `eps` that maximises `g^T eps` subject to `||T^-1 eps||_p <= 1`, for p = 2 or infinity; 0 if `g` is 0."""
    scaled = scale * gradient
    if p == math.inf:
        return scale * torch.sign(scaled)
    norm = torch.linalg.vector_norm(scaled)
    return scale * scaled / norm if norm > 0 else torch.zeros_like(gradient)


def sam_sharpness(
    loss: SubsetLoss,
    rhos: Sequence[float],
    *,
    p: float = 2.0,
    adaptive: bool = False,
    eta: float = 0.0,
    known: tuple[float, Tensor] | None = None,
) -> dict[float, float]:
    """`L(w + eps) - L(w)` for each rho, where `eps` is SAM's perturbation: `rho` times the direction of steepest ascent at `w`.

    Args:
        loss ([`SubsetLoss`]): The function.
        rhos (`Sequence[float]`): Sizes of `eps`.
        p (`float`, *optional*, defaults to 2.0): The norm that bounds `eps`: 2 or infinity.
        adaptive (`bool`, *optional*, defaults to `False`): Bound `eps / (|w| + eta)` instead of `eps`.
        eta (`float`, *optional*, defaults to 0.0): Only with `adaptive`.
        known (`tuple[float, Tensor]`, *optional*): The result of `loss.gradient()`, to save a pass.
    """
    clean, gradient = loss.gradient() if known is None else known
    direction = ascent_direction(gradient, scaling(loss.weights, adaptive, eta), p)
    return {rho: loss(loss.weights + rho * direction) - clean for rho in rhos}


def objective(loss: SubsetLoss, rho: float, weight_decay: float = 0.0) -> Objective:
    """Loss, sharpness term and L2 term at the model's weights."""
    known = loss.gradient()
    return Objective(known[0], sam_sharpness(loss, [rho], known=known)[rho], l2_term(loss, weight_decay), rho)


def l2_term(loss: SubsetLoss, weight_decay: float) -> float:
    """`weight_decay / 2 * ||w||_2^2`, the term whose gradient is `weight_decay * w`."""
    return 0.5 * weight_decay * loss.weights.double().square().sum().item()


def m_sharpness(loss: SubsetLoss, m: int, rho: float, **kind) -> float:
    """The mean of `sam_sharpness` over chunks of `m` examples, each with its own `eps` (Foret et al. 2021, Section 4.1).

    Chunks are weighted by their labels, so that the clean losses average to `L(w)` for every m. Processes share the chunks.

    Args:
        loss ([`SubsetLoss`]): The function.
        m (`int`): Examples per chunk.
        rho (`float`): Size of each `eps`.
        kind: `p`, `adaptive` and `eta` of `sam_sharpness`.
    """
    rank, world = loss.rank_and_world
    total = torch.zeros((), dtype=torch.float64, device=loss.device)
    for chunk in loss.subset.chunks(m)[rank::world]:
        part = loss.on(chunk)
        if part.num_labels:
            total += sam_sharpness(part, [rho], **kind)[rho] * part.num_labels
    if world > 1:
        dist.all_reduce(total)
    return total.item() / loss.num_labels


def worst_case_sharpness(
    loss: SubsetLoss, rho: float, *, p: float = 2.0, adaptive: bool = False, steps: int = 20, seed: int = 0
) -> float:
    """`max L(w + eps) - L(w)` over `||eps||_p <= rho` (adaptive: `||eps / |w| ||_p <= rho`), by projected ascent.

    The first step goes to SAM's `eps`; a step that does not raise the loss is undone and halved. The result is a lower
    bound on the maximum, never below `sam_sharpness` or 0.

    Args:
        loss ([`SubsetLoss`]): The function.
        rho (`float`): Radius of the ball.
        p (`float`, *optional*, defaults to 2.0): Norm of the ball: 2 or infinity.
        adaptive (`bool`, *optional*, defaults to `False`): Bound each coordinate in units of its weight.
        steps (`int`, *optional*, defaults to 20): Number of gradients after the first.
        seed (`int`, *optional*, defaults to 0): Seed of the direction in which to leave a point with zero gradient.
    """
    scale = scaling(loss.weights, adaptive)
    clean, gradient = loss.gradient()
    if not gradient.any():
        gradient = _noise(loss, torch.Generator().manual_seed(seed))
    best, best_u, best_gradient = clean, torch.zeros_like(gradient), gradient  # u = eps / T, in a plain ball
    length = rho
    for _ in range(steps):
        u = _project(best_u + length * ascent_direction(scale * best_gradient, 1.0, p), rho, p)
        value, gradient = loss.gradient(loss.weights + scale * u)
        if value > best:
            best, best_u, best_gradient = value, u, gradient
        else:
            length /= 2
    return best - clean


def average_sharpness(
    loss: SubsetLoss, sigma: float, *, adaptive: bool = False, draws: int = 8, seed: int = 0
) -> Estimate:
    """`E[L(w + xi)] - L(w)` over Gaussian `xi` of standard deviation `sigma` (adaptive: `sigma |w|`) per coordinate.

    Each draw is used with both signs, which removes the gradient's contribution to the variance. The same seed gives the same
    draws for every checkpoint of one architecture.

    Args:
        loss ([`SubsetLoss`]): The function.
        sigma (`float`): Standard deviation; `rho / sqrt(P)` gives perturbations with a norm of about rho.
        adaptive (`bool`, *optional*, defaults to `False`): Measure `sigma` in units of each weight.
        draws (`int`, *optional*, defaults to 8): Number of pairs of opposite perturbations.
        seed (`int`, *optional*, defaults to 0): Seed of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    scale, clean = scaling(loss.weights, adaptive), loss()
    rises = []
    for _ in range(draws):
        xi = sigma * scale * _noise(loss, generator)
        rises.append((loss(loss.weights + xi) + loss(loss.weights - xi)) / 2 - clean)
    return Estimate.of(rises)


def _project(u: Tensor, radius: float, p: float) -> Tensor:
    if p == math.inf:
        return u.clamp(-radius, radius)
    return u * min(1.0, radius / max(torch.linalg.vector_norm(u).item(), torch.finfo(u.dtype).tiny))


def _noise(loss: SubsetLoss, generator: torch.Generator) -> Tensor:
    """A standard Gaussian vector of shape `(P,)`, the same on every device and in every process."""
    return torch.randn(loss.weights.shape, generator=generator).to(loss.weights)
