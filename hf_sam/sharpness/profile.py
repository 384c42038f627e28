"""Take several measures of one checkpoint: configuration, JSON-compatible results, and scalars by name."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .estimators import (
    Estimate,
    hutchinson_trace,
    most_negative_eigenvalue,
    spectral_density,
    top_eigenvalues,
)
from .landscape import filter_normalised_direction, slice_1d, slice_2d
from .loss import SubsetLoss
from .measures import average_sharpness, l2_term, m_sharpness, sam_sharpness, worst_case_sharpness
from .operators import CurvatureOperator, GaussNewton, Hessian

Result = dict[str, Any]


@dataclass
class SharpnessConfig:
    """
    What to measure, and how accurately.

    Args:
        measures (`list[str]`, *optional*):
            Any of `"sam"`, `"m"`, `"worst"`, `"average"`, `"hessian"`, `"gauss_newton"`, `"density"`, `"slice_1d"`,
            `"slice_2d"`.
        rho (`list[float]`, *optional*):
            Sizes of SAM's perturbation.
        adaptive_rho (`list[float]`, *optional*):
            Sizes in units of the weights, for `"sam"`.
        radius, adaptive_radius (`float`, *optional*, default to 0.05 and 0.5):
            Radii of the balls of `"m"` and `"worst"`. The boxes of `"worst"` have the half side `radius / sqrt(P)`, so
            that their corners lie on the ball.
        m (`list[int]`, *optional*, defaults to `[1, 16]`):
            Examples per chunk of the m-sharpness.
        steps (`int`, *optional*, defaults to 10):
            Number of gradients in the projected ascent of `"worst"`.
        sigma, adaptive_sigma (`float`, *optional*, default to 0.005 and 0.1):
            Standard deviation of the noise of `"average"`, per weight and relative to each weight.
        draws (`int`, *optional*, defaults to 8):
            Number of pairs of noise vectors.
        eigenvalues (`int`, *optional*, defaults to 5):
            Number of largest eigenvalues for `"hessian"` and `"gauss_newton"`.
        tolerance (`float`, *optional*, defaults to 1e-2):
            Relative accuracy of eigenvalues.
        max_products (`int`, *optional*, defaults to 150):
            Limit on the products in the search for eigenvalues.
        probes (`int`, *optional*, defaults to 8):
            Number of sign vectors for the trace.
        lanczos_steps, lanczos_draws (`int`, *optional*, default to 30 and 2):
            Steps per draw and number of draws of `"density"`.
        extent (`float`, *optional*, defaults to 0.5):
            Slices reach from `-extent` to `extent` times the norm of each filter.
        points (`int`, *optional*, defaults to 11):
            Grid points of a slice along each direction.
        directions (`int`, *optional*, defaults to 3):
            Random directions of `"slice_1d"`.
        weight_decay (`float`, *optional*, defaults to 0.0):
            Weight decay in the L2 term of the objective.
        seed (`int`, *optional*, defaults to 0):
            Seed of all random draws.

    Raises:
        ValueError: A measure is unknown, or a number is out of range.
    """

    measures: list[str] = field(default_factory=lambda: ["sam", "m", "worst", "average", "hessian"])
    rho: list[float] = field(default_factory=lambda: [0.005, 0.01, 0.02, 0.05, 0.1, 0.2])
    adaptive_rho: list[float] = field(default_factory=lambda: [0.5])
    radius: float = 0.05
    adaptive_radius: float = 0.5
    m: list[int] = field(default_factory=lambda: [1, 16])
    steps: int = 10
    sigma: float = 0.005
    adaptive_sigma: float = 0.1
    draws: int = 8
    eigenvalues: int = 5
    tolerance: float = 1e-2
    max_products: int = 150
    probes: int = 8
    lanczos_steps: int = 30
    lanczos_draws: int = 2
    extent: float = 0.5
    points: int = 11
    directions: int = 3
    weight_decay: float = 0.0
    seed: int = 0

    def __post_init__(self):
        for name in ("measures", "rho", "adaptive_rho", "m"):
            setattr(self, name, list(dict.fromkeys(getattr(self, name))))  # measure duplicates once
        for name in self.measures:
            if name not in MEASURES:
                raise ValueError(f"measures: {name!r} is unknown. Allowed: {', '.join(MEASURES)}.")
        for name in (
            *("m", "steps", "draws", "eigenvalues", "max_products", "probes", "lanczos_steps", "lanczos_draws"),
            *("points", "directions"),
        ):
            self._check(name, lambda value: isinstance(value, int) and value >= 1, "a whole number, at least 1")
        for name in ("rho", "adaptive_rho", "radius", "adaptive_radius", "sigma", "adaptive_sigma", "extent"):
            self._check(name, lambda value: 0 < value < math.inf, "a number above 0")
        self._check("tolerance", lambda value: 0 < value < 1, "a number in (0, 1)")
        self._check("weight_decay", lambda value: 0 <= value < math.inf, "a number, at least 0")

    def _check(self, name: str, allowed: Callable[[Any], bool], words: str) -> None:
        value = getattr(self, name)
        for item in value if isinstance(value, list) else [value]:
            if not allowed(item):
                raise ValueError(f"{name}={item!r} must be {words}.")


def measure(
    loss: SubsetLoss, config: SharpnessConfig, on_measure: Callable[[str], Any] | None = None
) -> dict[str, Result]:
    """
    Take the measures in `config`, and record the cost of each.

    Args:
        loss ([`SubsetLoss`]): The loss function.
        config ([`SharpnessConfig`]): The measures and their settings.
        on_measure (`Callable[[str], Any]`, *optional*): Called with the name of each measure before it starts.

    Returns:
        `dict[str, dict]`: For each measure, its results in JSON-compatible form, `seconds`, and `passes` over the
        subset by kind (a curvature pass is a product with the Hessian).
    """
    results = {}
    for name in config.measures:
        if on_measure is not None:
            on_measure(name)
        before, start = dict(loss.passes), time.perf_counter()
        numbers = MEASURES[name](loss, config)
        seconds = time.perf_counter() - start
        passes = {kind: round(count - before[kind], 3) for kind, count in loss.passes.items()}
        results[name] = {**numbers, "seconds": seconds, "passes": passes}
    return results


def scalars(results: dict[str, Result]) -> dict[str, float]:
    """The scalars in the results of `measure`, by short names, for a log or a table."""
    return {
        key: value
        for name, result in results.items()
        for key, value in _SCALARS.get(name, lambda result: {})(result).items()
        if value is not None
    }


# --- one function per measure: from the loss to JSON-compatible results ---------------------------------------------


def _sam(loss: SubsetLoss, config: SharpnessConfig) -> Result:
    known = loss.gradient()
    return {
        "loss": known[0],
        "gradient_norm": torch.linalg.vector_norm(known[1]).item(),
        "weight_norm": torch.linalg.vector_norm(loss.weights).item(),
        "l2": l2_term(loss, config.weight_decay),
        "rho": config.rho,
        "sharpness": list(sam_sharpness(loss, config.rho, known=known).values()),
        "adaptive_rho": config.adaptive_rho,
        "adaptive_sharpness": list(sam_sharpness(loss, config.adaptive_rho, adaptive=True, known=known).values()),
    }


def _m(loss: SubsetLoss, config: SharpnessConfig) -> Result:
    sharpness = [m_sharpness(loss, m, config.radius) for m in config.m]
    return {"m": config.m, "rho": config.radius, "sharpness": sharpness}


def _worst(loss: SubsetLoss, config: SharpnessConfig) -> Result:
    per_coordinate = 1 / math.sqrt(loss.weights.numel())
    balls = {
        "l2": (config.radius, 2.0, False),
        "linf": (config.radius * per_coordinate, math.inf, False),
        "l2_adaptive": (config.adaptive_radius, 2.0, True),
        "linf_adaptive": (config.adaptive_radius * per_coordinate, math.inf, True),
    }
    return {
        name: {
            "radius": radius,
            "sharpness": worst_case_sharpness(
                loss, radius, p=p, adaptive=adaptive, steps=config.steps, seed=config.seed
            ),
        }
        for name, (radius, p, adaptive) in balls.items()
    }


def _average(loss: SubsetLoss, config: SharpnessConfig) -> Result:
    kinds = {"plain": (config.sigma, False), "adaptive": (config.adaptive_sigma, True)}
    return {
        name: {
            "sigma": sigma,
            **_estimate(average_sharpness(loss, sigma, adaptive=adaptive, draws=config.draws, seed=config.seed)),
        }
        for name, (sigma, adaptive) in kinds.items()
    }


def _hessian(loss: SubsetLoss, config: SharpnessConfig) -> Result:
    operator = Hessian(loss)
    result = _spectrum_and_trace(operator, config)
    lowest = most_negative_eigenvalue(
        operator,
        largest=max(result["eigenvalues"], default=None),
        tolerance=config.tolerance,
        max_products=config.max_products,
        seed=config.seed,
    )
    return {
        **result,
        "converged": result["converged"] and lowest.converged,
        "most_negative": lowest.values[0] if lowest.values else None,
    }


def _gauss_newton(loss: SubsetLoss, config: SharpnessConfig) -> Result:
    return _spectrum_and_trace(GaussNewton(loss), config)


def _spectrum_and_trace(operator: CurvatureOperator, config: SharpnessConfig) -> Result:
    top = top_eigenvalues(
        operator,
        config.eigenvalues,
        tolerance=config.tolerance,
        max_products=config.max_products,
        seed=config.seed,
    )
    has_ratio = top.converged and len(top.values) >= 5 and top.values[4] > 0
    return {
        "eigenvalues": top.values,
        "converged": top.converged,
        "ratio_1_5": top.values[0] / top.values[4] if has_ratio else None,
        "trace": _estimate(hutchinson_trace(operator, config.probes, seed=config.seed)),
    }


def _density(loss: SubsetLoss, config: SharpnessConfig) -> Result:
    density = spectral_density(Hessian(loss), config.lanczos_steps, config.lanczos_draws, seed=config.seed)
    return {
        "nodes": density.nodes.tolist(),
        "weights": density.weights.tolist(),
        "parameters": loss.weights.numel(),
        "mean": _estimate(density.mean()),
    }


def _slice_1d(loss: SubsetLoss, config: SharpnessConfig) -> Result:
    alphas = _grid(config)
    directions = (filter_normalised_direction(loss, config.seed + i) for i in range(config.directions))
    return {"alphas": alphas, "losses": [slice_1d(loss, direction, alphas) for direction in directions]}


def _slice_2d(loss: SubsetLoss, config: SharpnessConfig) -> Result:
    alphas = _grid(config)
    first, second = (filter_normalised_direction(loss, config.seed + i) for i in range(2))
    return {"alphas": alphas, "losses": slice_2d(loss, first, second, alphas)}


def _grid(config: SharpnessConfig) -> list[float]:
    return np.linspace(-config.extent, config.extent, config.points).tolist()


def _estimate(estimate: Estimate) -> Result:
    result = dataclasses.asdict(estimate)
    return {**result, "standard_error": None if math.isnan(estimate.standard_error) else estimate.standard_error}


MEASURES: dict[str, Callable[[SubsetLoss, SharpnessConfig], Result]] = {
    "sam": _sam,
    "m": _m,
    "worst": _worst,
    "average": _average,
    "hessian": _hessian,
    "gauss_newton": _gauss_newton,
    "density": _density,
    "slice_1d": _slice_1d,
    "slice_2d": _slice_2d,
}


# --- from results to named scalars -------------------------------------------------------------------------------------


def _sam_scalars(result: Result) -> dict[str, float]:
    plain = zip(result["rho"], result["sharpness"], strict=True)
    adaptive = zip(result["adaptive_rho"], result["adaptive_sharpness"], strict=True)
    return {
        "loss": result["loss"],
        "gradient_norm": result["gradient_norm"],
        "weight_norm": result["weight_norm"],
        "l2": result["l2"] or None,
        **{f"sam_{rho:g}": value for rho, value in plain},
        **{f"sam_adaptive_{rho:g}": value for rho, value in adaptive},
    }


def _curvature_scalars(result: Result, prefix: str = "") -> dict[str, float | None]:
    return {
        f"{prefix}lambda_1": max(result["eigenvalues"], default=None),
        f"{prefix}lambda_1_over_5": result["ratio_1_5"],
        f"{prefix}trace": result["trace"]["mean"],
        **({f"{prefix}lambda_min": result["most_negative"]} if "most_negative" in result else {}),
    }


_SCALARS: dict[str, Callable[[Result], dict[str, float | None]]] = {
    "sam": _sam_scalars,
    "m": lambda r: {f"m_{m}": value for m, value in zip(r["m"], r["sharpness"], strict=True)},
    "worst": lambda r: {
        f"worst_{ball}": v["sharpness"] for ball, v in r.items() if isinstance(v, dict) and "radius" in v
    },
    "average": lambda r: {"average": r["plain"]["mean"], "average_adaptive": r["adaptive"]["mean"]},
    "hessian": _curvature_scalars,
    "gauss_newton": lambda r: _curvature_scalars(r, "gauss_newton_"),
}
