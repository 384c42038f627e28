"""What the perturbed weights show of the step: the realised size of eps, and the cosine between both gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from torch.nn import Parameter
from transformers.utils import logging

from .parameters import Gradients, local
from .perturbation import Perturbation
from .roles import GROUPS
from .telemetry import Telemetry
from .vector import Space, Vector

logger = logging.get_logger(__name__)


def record_displacement(
    telemetry: Telemetry,
    space: Space,
    perturbation: Perturbation,
    perturbed: Gradients,
    clean: Vector | None,
    gradient_in: Callable[[Tensor], Tensor | None],
    groups: Mapping[Parameter, str] | None = None,
) -> None:
    """Record the realised `||(w + eps) - w||`, and `cos(g, g_s)` over the perturbed parameters.

    Args:
        perturbation (`Perturbation`): While the weights are moved.
        perturbed (`Gradients`): `g_s`.
        clean (`Vector`, *optional*): `g`, where it was kept.
        gradient_in (`Callable`): Elsewhere `g` up to a factor, read off the displacement; where that is None there is no
            cosine.
        groups (`Mapping[Parameter, str]`, *optional*): Record which share of the squared norm each group of modules has.
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
        for group in GROUPS if groups is not None else ():
            own = [n if groups.get(p) == group else torch.zeros_like(n) for p, n in zip(moved, squares, strict=True)]
            telemetry.record(**{f"sam_share/{group}": _total(space, moved, own) / total})
    if dots:
        squares = [_total(space, common, [n**2 for n in parts]) for parts in (g, g_s)]
        telemetry.record(sam_cosine=_total(space, common, dots) / (squares[0] * squares[1]).sqrt())


def _total(space: Space, parameters: list[Parameter], parts: list[Tensor]) -> Tensor:
    device = parts[0].device  # a model split over several devices has scalars on each
    return space.reductions(parameters).sum(torch.stack([part.to(device) for part in parts]))


def log_entries(means: dict[str, float], perturbed: Iterable[Parameter]) -> dict[str, float]:
    """The means that are logged: without the intended size, and without a cosine that is undefined.

    Warns, once, where rounding the weights has changed the size of the perturbation by more than a tenth.
    """
    intended, realised = means.get("_intended_norm", 0.0), means.get("sam_perturbation_norm", 0.0)
    if intended > 0 and abs(realised / intended - 1) > 0.1:
        dtypes = {str(p.dtype).removeprefix("torch.") for p in perturbed}
        is_lost = realised < intended
        logger.warning_once(  # without numbers, which would make a new message of it each time
            f"Rounding to weights stored in {' and '.join(sorted(dtypes))} {'loses' if is_lost else 'adds'} more than a tenth "
            f"of the perturbation's norm; sam_perturbation_norm is what was realised. Keep the weights in float32 (bf16=True "
            f"trains float32 weights under autocast), {'set stochastic_rounding=True, ' if is_lost else ''}or choose a larger "
            "rho."
        )
    return {
        name: value
        for name, value in means.items()
        if not name.startswith("_") and not (name == "sam_cosine" and math.isnan(value))
    }
