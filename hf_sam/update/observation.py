"""Values measured at the perturbed weights: the realised norm of eps, and the cosine between g and g_s."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from . import buckets
from .parameters import Gradients, local
from .perturbation import Perturbation
from .reductions import stack_scalars
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
    """Record the realised `||(w + eps) - w||` and `cos(g, g_s)` over the perturbed parameters.

    Args:
        perturbation (`Perturbation`): The current perturbation, while the weights are moved.
        perturbed (`Gradients`): `g_s`.
        clean (`Vector`, *optional*): `g`, if it was kept.
        gradient_in (`Callable`): Recovers `g` up to a factor from the displacement if `g` was not kept. If it returns
            None, no cosine is recorded.
        groups (`Mapping[Parameter, str]`): The module group of each parameter.
        shares_of (`Sequence[str]`): The groups whose shares of the squared norm are recorded.
    """
    kept = {} if clean is None else dict(zip(clean.parameters, clean.tensors, strict=True))
    moved, norms, common, dots, g, g_s = [], [], [], [], [], []
    for parameters, displacements, rows in perturbation.displacements():
        moved += parameters
        norms += torch._foreach_norm(displacements)
        directions, seconds = [], []
        for p, displacement in zip(parameters, displacements, strict=True):
            direction = _rows_of(kept[p], rows) if p in kept else gradient_in(displacement) if p in perturbed else None
            if p in perturbed and direction is not None:
                common.append(p)
                directions.append(direction)
                seconds.append(_rows_of(local(perturbed[p]), rows))
        if not directions:
            continue
        if space.in_buckets:
            dtype = torch.promote_types(directions[0].dtype, torch.float32)
            dots += buckets.dots(directions, seconds, dtype)
            g += buckets.norms(directions, 2, dtype)
            g_s += buckets.norms(seconds, 2, dtype)
        else:
            for direction, second in zip(directions, seconds, strict=True):
                dots.append(torch.sum(direction * second))
                g.append(torch.linalg.vector_norm(direction))
                g_s.append(torch.linalg.vector_norm(second.to(direction.dtype)))
    if norms:
        squares = stack_scalars(norms) ** 2
        total = _total(space, moved, squares)
        telemetry.record(sam_perturbation_norm=total.sqrt())
        for group in shares_of:
            own = torch.tensor([groups.get(p) == group for p in moved]).to(squares.device)
            telemetry.record(**{f"sam_share/{group}": _total(space, moved, squares * own) / total})
    if dots:
        squares = [_total(space, common, stack_scalars(parts) ** 2) for parts in (g, g_s)]
        telemetry.record(sam_cosine=_total(space, common, stack_scalars(dots)) / (squares[0] * squares[1]).sqrt())


def _rows_of(tensor: Tensor, rows: slice) -> Tensor:
    return tensor if rows == slice(None) else tensor[rows]


def _total(space: Space, parameters: list[Parameter], parts: Tensor) -> Tensor:
    return space.layout(parameters).reductions.sum(parts)


def log_entries(means: dict[str, float], log_shares: bool = True) -> dict[str, float]:
    """The means to log: without internal values and undefined cosines, and without shares unless `log_shares`."""
    return {
        name: value
        for name, value in means.items()
        if not name.startswith("_")
        and (name != "sam_cosine" or math.isfinite(value))
        and (log_shares or not name.startswith("sam_share/"))
    }
