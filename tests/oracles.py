"""The methods written a second time, from their papers, on one flat float64 vector: what the package is tested against.

Nothing here uses `hf_sam`. A model becomes an explicit function of the vector of its parameters; gradients come from
`torch.autograd` on that function, and every formula is a line of numpy-like code on whole vectors, so that a norm or a
projection cannot be anything but global.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

Loss = Callable[[Tensor], Tensor]


def used_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Name -> value of the parameters that take part in the loss."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if "unused" not in name}


def flatten(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors.values()])


def loss_function(model: nn.Module, batch: dict[str, Tensor], part: str = "loss") -> Loss:
    """`w -> L(w)` on `batch`, or `w -> logits` for `part="logits"`."""
    shapes = {name: p.shape for name, p in used_parameters(model).items()}

    def function(vector: Tensor) -> Tensor:
        values, offset = {}, 0
        for name, shape in shapes.items():
            values[name] = vector[offset : offset + shape.numel()].reshape(shape)
            offset += shape.numel()
        return functional_call(model, values, kwargs=batch)[part]

    return function


def gradient(loss: Loss, w: Tensor) -> Tensor:
    w = w.detach().requires_grad_(True)
    return torch.autograd.grad(loss(w), w)[0]


def hessian(loss: Loss, w: Tensor) -> Tensor:
    return torch.autograd.functional.hessian(loss, w)


# --- eps -----------------------------------------------------------------------------------------------------------


def eps_of(g: Tensor, rho: float, p: float) -> Tensor:
    """Foret et al. 2021, Equation 2, as printed; its two limits by what the maximiser of <g, eps> has to be."""
    if p == math.inf:
        return rho * g.sign()
    if p == 1:
        winners = (g.abs() == g.abs().max()).double()
        return rho * g.sign() * winners / winners.sum()
    q = p / (p - 1)
    return rho * g.sign() * g.abs() ** (q - 1) / (g.abs() ** q).sum() ** (1 / p)


def eps_adaptive(g: Tensor, w: Tensor, rho: float, eta: float) -> Tensor:
    """Kwon et al. 2021, Equation 3."""
    t = w.abs() + eta
    return rho * t**2 * g / (t * g).norm()


# --- one step: the gradient that the base optimizer gets -------------------------------------------------------------


def sam(loss: Loss, w: Tensor, rho: float, p: float = 2, steps: int = 1, decay: float = 0.0) -> Tensor:
    position = w.clone()
    for _ in range(steps):
        position = position + eps_of(gradient(loss, position) + decay * w, rho / steps, p)
    return gradient(loss, position)


def asam(loss: Loss, w: Tensor, rho: float, eta: float) -> Tensor:
    return gradient(loss, w + eps_adaptive(gradient(loss, w), w, rho, eta))


def gsam(loss: Loss, w: Tensor, rho: float, alpha: float) -> Tensor:
    g, g_s = gradient(loss, w), sam(loss, w, rho)
    return g_s - alpha * (g - (g @ g_s) / (g_s @ g_s) * g_s)


def wsam(loss: Loss, w: Tensor, rho: float, gamma: float) -> Tensor:
    return ((1 - 2 * gamma) * gradient(loss, w) + gamma * sam(loss, w, rho)) / (1 - gamma)


def friendly(loss: Loss, w: Tensor, rho: float, sigma: float, decay: float, state: dict) -> Tensor:
    g, m = gradient(loss, w), state.get("m", torch.zeros_like(w))
    state["m"] = decay * m + (1 - decay) * g
    return gradient(loss, w + eps_of(g - sigma * m, rho, 2))


def looksam(loss: Loss, w: Tensor, rho: float, alpha: float, interval: int, step: int, state: dict) -> Tensor:
    g = gradient(loss, w)
    if step % interval == 0:
        g_s = gradient(loss, w + eps_of(g, rho, 2))
        state["g_v"] = g_s - (g_s @ g) / (g @ g) * g
        return g_s
    return g + alpha * g.norm() / state["g_v"].norm() * state["g_v"]


def functional(loss: Loss, logits: Loss, from_logits: Callable[[Tensor], Tensor], w: Tensor, rho: float) -> Tensor:
    """J(w + eps)^T grad_logits L(w), through the whole Jacobian."""
    outer = gradient(from_logits, logits(w).detach())
    w_eps = w + eps_of(gradient(loss, w), rho, 2)
    jacobian = torch.autograd.functional.jacobian(logits, w_eps)  # (batch, classes, parameters)
    return torch.einsum("bc,bcw->w", outer, jacobian)


def second_order(loss: Loss, w: Tensor, rho: float) -> Tensor:
    """The whole derivative of w -> L(w + eps(w)), by differentiating through eps."""

    def objective(position: Tensor) -> Tensor:
        g = torch.autograd.grad(loss(position), position, create_graph=True)[0]
        return loss(position + rho * g / g.norm())

    return gradient(objective, w)


# --- later methods ---------------------------------------------------------------------------------------------------


def loss_budget(loss: Loss, w: Tensor, sigma: float, ceiling: float) -> Tensor:
    """Wang et al. 2026 (LE-SAM): the radius at which the linearised loss rises by sigma."""
    g = gradient(loss, w)
    return gradient(loss, w + min(sigma / g.norm().item(), ceiling) * g / g.norm())


def preconditioned_eps(g: Tensor, v: Tensor | None, rho: float, floor: float) -> Tensor:
    """Along D^-1 g with Euclidean length rho, D = sqrt(v) + floor rms(sqrt(v))."""
    if v is not None:
        g = g / (v.sqrt() + floor * v.mean().sqrt())
    return rho * g / g.norm()


def by_tensor(vector: Tensor, shapes: dict[str, torch.Size], change: Callable[[Tensor], Tensor]) -> Tensor:
    """`change` of each parameter's part of a flat vector."""
    parts = vector.split([shape.numel() for shape in shapes.values()])
    return torch.cat(
        [change(part.reshape(shape)).reshape(-1) for part, shape in zip(parts, shapes.values(), strict=True)]
    )


def centred(t: Tensor) -> Tensor:
    """Hassan et al. 2025 (GCSAM): less the mean over all dimensions but the first."""
    return t if t.dim() < 2 else t - t.flatten(1).mean(1).reshape(-1, *[1] * (t.dim() - 1))


def outliers(t: Tensor, quantile: float) -> Tensor:
    """Yun 2025 (ZSharp): only where |z| is above its quantile within the tensor."""
    if t.dim() < 2:
        return t
    z = ((t - t.mean()) / t.std()).abs()
    threshold = z.flatten().sort().values[max(1, math.ceil(quantile * t.numel())) - 1]
    return torch.where(z > threshold, t, torch.zeros_like(t))
