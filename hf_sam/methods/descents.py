"""What the optimizer gets: the descents of the published methods. Norms and projections are over all parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .base import FORWARD_SHARE, HESSIAN_PASSES, Descent, Needs, Step
from .fields import number
from .geometry import projection, usable

if TYPE_CHECKING:
    from ..update.vector import Vector


@dataclass(frozen=True)
class SurrogateGap(Descent):
    """`g_s - alpha g_orth`, with g_orth the part of g orthogonal to g_s.

    GSAM, Zhuang et al. 2022, arXiv 2203.08065, Algorithm 1.

    Args:
        alpha (`float`): Weight of that part, which reduces the gap L(w + eps) - L(w).
    """

    needs: ClassVar = Needs.CLEAN_GRADIENT

    alpha: float = number(0.4, 0)

    def gradient(self, g: Vector, g_s: Vector, step: Step) -> Vector:
        g_s *= 1 + self.alpha * projection(g, onto=g_s)
        g_s -= g * self.alpha
        return g_s


@dataclass(frozen=True)
class Weighted(Descent):
    """`(1 - 2 gamma)/(1 - gamma) g + gamma/(1 - gamma) g_s` (WSAM, Yue et al. 2023, arXiv 2305.15817, Algorithm 1).

    Args:
        gamma (`float`): Weight of the sharpness term; 0.5 is SAM.
    """

    needs: ClassVar = Needs.CLEAN_GRADIENT

    gamma: float = number(0.9, 0, 1, below=True)

    def gradient(self, g: Vector, g_s: Vector, step: Step) -> Vector:
        g_s *= self.gamma / (1 - self.gamma)
        g_s += g * ((1 - 2 * self.gamma) / (1 - self.gamma))
        return g_s


@dataclass(frozen=True)
class Reused(Descent):
    """SAM in due steps; in between, `g + alpha ||g||/||g_v|| g_v`, with g_v the last part of g_s orthogonal to g.

    LookSAM, Liu et al. 2022, arXiv 2203.02714, Algorithm 1 and Equation 5.

    Args:
        alpha (`float`): Weight of the reused part.
    """

    needs: ClassVar = Needs.CLEAN_GRADIENT
    memory: ClassVar = ("orthogonal",)

    alpha: float = number(0.7, 0)

    def gradient(self, g: Vector, g_s: Vector, step: Step) -> Vector:
        step.memory["orthogonal"] = orthogonal_part(g_s, to=g)
        return g_s

    def between(self, g: Vector, step: Step) -> Vector:
        kept = step.memory["orthogonal"]
        norm = kept.norm()
        g += kept * usable(norm, self.alpha * g.norm() / norm)
        return g


@dataclass(frozen=True)
class HardestHit(Descent):
    """`g_s` of the examples whose loss rises most under eps (ESAM, Du et al. 2022, arXiv 2110.03141, Equation 9).

    Args:
        gamma (`float`): Fraction of the examples to keep.
    """

    needs: ClassVar = Needs.SUBSET

    gamma: float = number(0.5, 0, 1, above=True)

    @property
    def extra_passes(self) -> float:
        return 0.0 if self.gamma == 1 else self.gamma + FORWARD_SHARE - 1

    def examples(self, before: Tensor, after: Tensor) -> Tensor | None:
        if self.gamma == 1:
            return None
        count = max(1, math.ceil(self.gamma * len(before)))
        return (after - before).topk(count).indices.sort().values


@dataclass(frozen=True)
class Functional(Descent):
    """`J(w + eps)^T grad_logits L(w)`: only the Jacobian is perturbed (Singh et al. 2025, arXiv 2502.02407)."""

    needs: ClassVar = Needs.LOGITS

    def keep(self, loss: Tensor, logits: Tensor) -> Tensor:
        return torch.autograd.grad(loss, logits, retain_graph=True)[0]

    def loss(self, loss: Tensor, logits: Tensor, kept: Any) -> Tensor:
        surrogate = (logits * kept).sum()
        return loss.detach() + surrogate - surrogate.detach()  # the value of `loss`, the gradient of `surrogate`


@dataclass(frozen=True)
class ThroughPerturbation(Descent):
    """`g_s + (d eps/d w)^T g_s = g_s + rho/||g|| H (I - u u^T) g_s`, with u = g/||g||: SAM with the term it drops.

    Foret et al. 2021, Equation 3 before the approximation; for p = 2. Logs the cosine between this gradient and g_s.
    """

    needs: ClassVar = Needs.CLEAN_GRADIENT | Needs.HVP

    @property
    def extra_passes(self) -> float:
        return HESSIAN_PASSES

    def gradient(self, g: Vector, g_s: Vector, step: Step) -> Vector:
        g, perturbed = g.over(step.weights), g_s.over(step.weights)
        norm = g.norm()
        product = step.hessian_product(orthogonal_part(perturbed, to=g))
        plain = perturbed.clone()
        g_s += product.over(g_s) * usable(norm, step.rho / norm)
        perturbed = g_s.over(step.weights)
        step.record(sam_second_order_cosine=plain.dot(perturbed) / (plain.norm() * perturbed.norm()))
        return g_s


def orthogonal_part(vector: Vector, to: Vector) -> Vector:
    """`v - proj_u(v)`, with u = `to`."""
    return vector - to * projection(vector, onto=to)
