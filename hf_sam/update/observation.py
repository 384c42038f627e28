"""What the perturbed weights show of the step: the realised size of eps, and the cosine between both gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import Parameter
from transformers.utils import logging

from ..config import SAMConfig
from ..engines.base import Engine
from .parameters import Gradients, Perturbation, local
from .telemetry import Telemetry

logger = logging.get_logger(__name__)


def displacement_shows_gradient(config: SAMConfig) -> bool:
    """Whether `g` can be read off eps, so that its direction needs no copy of its own."""
    if config.row.ascent not in ("gradient", "carried") or config.adaptive or config.weight_decay_in_ascent:
        return False
    return 1 < config.p < math.inf and config.ascent_steps in (None, 1)


def record_displacement(
    telemetry: Telemetry,
    engine: Engine,
    config: SAMConfig,
    perturbation: Perturbation,
    perturbed: Gradients,
    clean: Gradients,
) -> None:
    """Record the realised `||(w + eps) - w||`, and `cos(g, g_s)` over the perturbed parameters.

    Args:
        perturbation (`Perturbation`): While the weights are moved.
        perturbed (`Gradients`): `g_s`.
        clean (`Gradients`): `g` where it was kept; elsewhere it is read off the displacement, or there is no cosine.
    """
    moved, norms, common, dots, g, g_s = [], [], [], [], [], []
    for p, displacement in perturbation.displacement():
        moved.append(p)
        norms.append(torch.linalg.vector_norm(displacement))
        if p in perturbed and (p in clean or displacement_shows_gradient(config)):
            common.append(p)
            direction = clean[p] if p in clean else _gradient_direction(displacement, config.p)
            dots.append(torch.sum(direction * local(perturbed[p])))
            g.append(torch.linalg.vector_norm(direction))
            g_s.append(torch.linalg.vector_norm(local(perturbed[p]).to(direction.dtype)))
    if norms:
        norm = engine.reductions(moved).sum(torch.stack(norms) ** 2).sqrt()
        telemetry.record(sam_perturbation_norm=norm)
    if dots:
        reductions = engine.reductions(common)
        squares = [reductions.sum(torch.stack(parts) ** 2) for parts in (g, g_s)]
        telemetry.record(sam_cosine=reductions.sum(torch.stack(dots)) / (squares[0] * squares[1]).sqrt())


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


def _gradient_direction(displacement: Tensor, p: float) -> Tensor:
    """`g` up to a factor: eps is `sign(g) |g|^(q-1)`, and (q - 1)(p - 1) = 1."""
    return displacement if p == 2 else displacement.sign() * displacement.abs() ** (p - 1)
