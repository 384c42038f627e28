"""The steepest direction under a norm, as functions of Vectors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..update.vector import Vector


def steepest(
    g: Vector, rho: float | Tensor, p: float = 2.0, scale: Vector | None = None, sigma: float | None = None
) -> Vector:
    r"""The maximiser of `<g, eps>` over the ball `||eps / scale||_p <= rho`; consumes `g`.

        eps = rho * sign(g) |g|^(q-1) / ||g||_q^(q/p),   1/p + 1/q = 1          (Foret et al. 2021, Equation 2)
        eps = T d(T g), with d as above and T the scale; p = 2: rho T^2 g / ||T g||   (Kwon et al. 2021, Equation 3)

    For general p, `eps` is computed from `g / max|g|`, so that powers of small gradients do not underflow.

    Args:
        g (`Vector`): The gradient, or any direction.
        rho (`float`): Radius of the ball.
        p (`float`, *optional*, defaults to 2.0): Norm of the ball, in [1, inf]. At `p = 1` the largest coordinates
            share rho equally.
        scale (`Vector`, *optional*): The unit of each coordinate; `|w| + eta` in adaptive methods.
        sigma (`float`, *optional*): Upper bound of the linearised rise of the loss, `<g, eps> = rho ||T g||_q`: where it
            would be higher, the radius is `sigma / ||T g||_q` (as in LE-SAM, Wang et al. 2026, arXiv 2605.10183).

    Returns:
        `Vector`: exactly 0 if the norm of `g` is 0 or not finite.
    """
    if scale is not None:
        g *= scale
    if sigma is not None:
        q = 1.0 if p == math.inf else math.inf if p == 1 else p / (p - 1)
        rho = (sigma / g.norm(q)).clamp(max=rho)
    if p == 2:
        norm = g.norm()
        eps = g * usable(norm, rho / norm)
    elif p == math.inf:
        largest = g.norm(math.inf)
        eps = g.map_lists_(torch._foreach_sign_) * usable(largest, torch.ones_like(largest) * rho)
    elif p == 1:
        largest = g.norm(math.inf)
        g.map_lists_(lambda tensors: _keep_signs_of_largest_(tensors, largest))
        eps = g * usable(largest, rho / g.norm(1))
    else:
        q = p / (p - 1)
        largest = g.norm(math.inf)
        g /= largest
        norm = g.norm(q)
        g.map_lists_(lambda tensors: _raise_(tensors, q - 1))
        eps = g * usable(largest, rho / norm ** (q - 1))
    if scale is not None:
        eps *= scale
    return eps


def _keep_signs_of_largest_(tensors: list[Tensor], largest: Tensor) -> None:
    """Replace each entry by its sign if its absolute value is the largest, else by 0."""
    winners = _are_largest(tensors, largest)
    torch._foreach_sign_(tensors)
    torch._foreach_mul_(tensors, winners)


def _are_largest(tensors: list[Tensor], largest: Tensor) -> list[Tensor]:
    """1 where the absolute value is the largest, else 0."""
    sizes = torch._foreach_abs(tensors)
    torch.ops.aten._foreach_add_.Tensor(sizes, -largest.to(sizes[0]))  # 0 for the largest, negative for others
    torch._foreach_sign_(sizes)
    torch._foreach_add_(sizes, 1)
    return sizes


def _raise_(tensors: list[Tensor], power: float) -> None:
    """`sign(t) |t|^power`, in place."""
    signs = torch._foreach_sign(tensors)
    torch._foreach_abs_(tensors)
    torch._foreach_pow_(tensors, power)
    torch._foreach_mul_(tensors, signs)


def usable(norm: Tensor, scale: Tensor) -> Tensor:
    """The scale, or exactly 0 if there is no direction because the norm is 0 or not finite."""
    return torch.where(is_usable(norm), scale, torch.zeros_like(scale))


def is_usable(norm: Tensor) -> Tensor:
    """Whether a norm is finite and not 0."""
    return (norm > 0) & (norm < math.inf)


def projection(vector: Vector, onto: Vector) -> Tensor:
    """`<v, u> / <u, u>`, or 0 if `u` is 0."""
    square = onto.dot(onto)
    return torch.where(square > 0, vector.dot(onto) / square, torch.zeros_like(square))
