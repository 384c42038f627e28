"""What the perturbed weights show of the step: the realised size of eps, and the cosine between both gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from .parameters import Gradients, local
from .perturbation import Perturbation
from .roles import GROUPS
from .telemetry import Telemetry
from .vector import Space, Vector


def record_displacement(
    telemetry: Telemetry,
    space: Space,
    perturbation: Perturbation,
    perturbed: Gradients,
    clean: Vector | None,
    gradient_in: Callable[[Tensor], Tensor | None],
    groups: Mapping[Parameter, str],
    shares_of: Sequence[str] = GROUPS,
) -> None:
    """Record the realised `||(w + eps) - w||`, and `cos(g, g_s)` over the perturbed parameters.

    Args:
        perturbation (`Perturbation`): While the weights are moved.
        perturbed (`Gradients`): `g_s`.
        clean (`Vector`, *optional*): `g`, where it was kept.
        gradient_in (`Callable`): Elsewhere `g` up to a factor, read off the displacement; where that is None there is no
            cosine.
        groups (`Mapping[Parameter, str]`): The group of modules that each parameter belongs to.
        shares_of (`Sequence[str]`): Record which share of the squared norm these groups have.
    """
    kept = {} if clean is None else dict(zip(clean.parameters, clean.tensors, strict=True))
    local_parts = {p: local(gradient) for p, gradient in perturbed.items()}
    moved, norms, common, dots, g, g_s = [], [], [], [], [], []
    for p, displacement, along, g_there in perturbation.displacement(kept, local_parts):
        moved.append(p)
        norms.append(torch.linalg.vector_norm(displacement))
        direction = along if along is not None else gradient_in(displacement) if g_there is not None else None
        if g_there is not None and direction is not None:
            common.append(p)
            dots.append(torch.sum(direction * g_there))
            g.append(torch.linalg.vector_norm(direction))
            g_s.append(torch.linalg.vector_norm(g_there.to(direction.dtype)))
    if norms:
        squares = [n**2 for n in norms]
        total = _total(space, moved, squares)
        telemetry.record(sam_perturbation_norm=total.sqrt())
        for group in shares_of:
            own = [n if groups.get(p) == group else torch.zeros_like(n) for p, n in zip(moved, squares, strict=True)]
            telemetry.record(**{f"sam_share/{group}": _total(space, moved, own) / total})
    if dots:
        squares = [_total(space, common, [n**2 for n in parts]) for parts in (g, g_s)]
        telemetry.record(sam_cosine=_total(space, common, dots) / (squares[0] * squares[1]).sqrt())


def _total(space: Space, parameters: list[Parameter], parts: list[Tensor]) -> Tensor:
    device = parts[0].device  # a model split over several devices has scalars on each
    return space.reductions(parameters).sum(torch.stack([part.to(device) for part in parts]))


def log_entries(means: dict[str, float], log_shares: bool = True) -> dict[str, float]:
    """The means that are logged: without the intended size, and without a cosine that is undefined."""
    return {
        name: value
        for name, value in means.items()
        if not name.startswith("_")
        and not (name == "sam_cosine" and math.isnan(value))
        and (log_shares or not name.startswith("sam_share/"))
    }
