"""The values that a search starts from: around the rho whose sharpness is a tenth of the loss, measured in a short probe.

The useful rho depends on the scale of gradients and weights, which differs between models by orders of magnitude. The
ratio of sharpness to loss differs less: it is what `hf_sam.update.diagnosis` judges a running rho by. For a small rho
sharpness is proportional to it, so one short run with any small rho tells the scale. A tenth is near the best rho for
training from scratch with wrong labels, and mostly above it for fine-tuning (docs/results/units.md), so the grid reaches
further down than up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..config import SAMConfig
from ..methods.ascents import Steepest

TARGET = 0.1  # sharpness relative to the loss
FACTOR = 10**0.5  # between neighbouring values
SHARE, LEAST = 0.05, 4  # of the steps of an ordinary run; number of steps


def probe_steps(length: int) -> int:
    """Steps of the probe, for ordinary runs of `length` steps."""
    return min(length, max(LEAST, math.ceil(SHARE * length)))


def has_a_scale(config: SAMConfig) -> bool:
    """Whether the ascent is along the gradient, so that sharpness is measured, and proportional to a small rho."""
    ascent = config.parts.ascent
    return type(ascent) is Steepest and ascent.sigma is None and not config.rho_min


def middle_rho(curves: Sequence[Mapping[str, Any]]) -> float | None:
    """
    The rho at which sharpness is a tenth of the loss, from the entries of a run that logged every step.

    Args:
        curves (`Sequence[Mapping]`): The Trainer's `log_history`.

    Returns:
        `float`, *optional*: The median over perturbed steps; `None` if there is none, or if the loss does not rise.
    """
    found = []
    for entry in curves:
        sharpness = entry.get("sam_sharpness")
        if sharpness is not None:
            loss = entry["sam_perturbed_loss"] - sharpness  # "loss" is rounded
            found.append(TARGET * loss * entry["sam_rho"] / sharpness if sharpness else math.inf)
    median = float(np.median(found)) if found else math.nan
    return median if 0 < median < math.inf else None


def values_around(middle: float, points: int) -> list[float]:
    """`points` values half a decade apart, around `middle`; if their number is even, one more below it than above."""
    exponents = np.arange(points) - points // 2
    return sorted({float(f"{middle * FACTOR**exponent:.2g}") for exponent in exponents})
