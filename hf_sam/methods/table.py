"""The table of published methods: a name, an ascent, a descent, defaults, and the paper.

A method that only sets defaults is a row here. A method with its own formula is a class in `ascents.py`, `descents.py` or
a file of the user, and a row. Passes, copies, fields in use and refusals follow from the classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from .ascents import AuxiliaryPair, Carried, Friendly, Momentum, Noise, Previous, RandomTensors, Steepest
from .base import Method
from .descents import Functional, HardestHit, Reused, SurrogateGap, Weighted
from .lora_noise import LoraNoise
from .variants import AboveAverage, Centred, LossBudget, Preconditioned, SparseByScore, TailClasses

_ROWS = [
    Method(
        "sam",
        "Foret et al. 2021, arXiv 2010.01412, Algorithm 1",
        "Step along the gradient at w + eps, eps = rho g / ||g||.",
        Steepest,
    ),
    Method(
        "asam",
        "Kwon et al. 2021, arXiv 2102.11600, Equation 3",
        "SAM in coordinates scaled by the weights: eps = rho T^2 g / ||T g||, T = |w| + eta.",
        Steepest,
        defaults={"rho": 0.5, "adaptive": True},
    ),
    Method(
        "gsam",
        "Zhuang et al. 2022, arXiv 2203.08065, Algorithm 1",
        "Also close the gap L(w + eps) - L(w): step along g_s - alpha (g - proj_{g_s} g).",
        Steepest,
        SurrogateGap,
        defaults={"rho": 0.6, "rho_min": 0.1, "rho_schedule": "lr"},
    ),
    Method(
        "wsam",
        "Yue et al. 2023, arXiv 2305.15817, Algorithm 1",
        "Weigh the sharpness term: step along (1 - 2 gamma)/(1 - gamma) g + gamma/(1 - gamma) g_s.",
        Steepest,
        Weighted,
    ),
    Method(
        "friendly",
        "Li et al. 2024, arXiv 2403.12350, Algorithm 1",
        "Climb along the batch's own part of the gradient: g - sigma m, m an average of past gradients.",
        Friendly,
    ),
    Method(
        "esam",
        "Du et al. 2022, arXiv 2110.03141, Algorithm 1",
        "Perturb a random share beta of the tensors by eps / beta; descend on the share gamma of hardest-hit examples.",
        RandomTensors,
        HardestHit,
    ),
    Method(
        "looksam",
        "Liu et al. 2022, arXiv 2203.02714, Algorithm 1",
        "SAM on every interval-th step; between, reuse the part of g_s orthogonal to g: g + alpha ||g||/||g_v|| g_v.",
        Steepest,
        Reused,
        defaults={"interval": 5},
    ),
    Method(
        "msam",
        "Becker et al. 2024, arXiv 2401.12033, Algorithm 1",
        "One pass, at w - rho v / ||v||, v the base optimizer's momentum; none during warm-up.",
        Momentum,
        defaults={"rho": 3.0},
    ),
    Method(
        "periodic",
        "Liu et al. 2022, arXiv 2203.02714, Section 3 (SAM-k)",
        "SAM on every interval-th step, plain steps between.",
        Steepest,
        defaults={"interval": 5},
    ),
    Method(
        "late",
        "Zhou et al. 2024, arXiv 2410.10373",
        "SAM in the last part of the run only.",
        Steepest,
        defaults={"start": 0.75},
    ),
    Method(
        "subset",
        "Bahri et al. 2022, arXiv 2110.08529, Section 4.3",
        "Compute eps on a part of the batch.",
        Steepest,
        defaults={"ascent_fraction": 0.25},
    ),
    Method(
        "norm-only",
        "Mueller et al. 2023, arXiv 2306.04226",
        "Perturb the normalisation layers only, with a larger rho (SAM-ON).",
        Steepest,
        defaults={"rho": 0.5, "perturb": "norm"},
    ),
    Method(
        "functional",
        "Singh et al. 2025, arXiv 2502.02407",
        "Keep the clean loss's gradient at the logits and take the Jacobian at w + eps: J(w + eps)^T grad_logits L(w).",
        Steepest,
        Functional,
    ),
    Method(
        "previous",
        "Ji et al. 2024, NeurIPS (S2-SAM)",
        "One pass, at w + rho g/||g||, g the gradient that the step before went along.",
        Previous,
    ),
    Method(
        "carried",
        "this project",
        "Compute g on every interval-th step, on a part of the batch, and climb along it in all steps until the next.",
        Carried,
        defaults={"interval": 5, "ascent_fraction": 0.25},
    ),
    Method(
        "bilora",
        "Liu et al. 2025, arXiv 2508.19564",
        "One pass, with a second LoRA pair that climbs while the adapter descends; ||B2 A2|| at most rho; PEFT only.",
        AuxiliaryPair,
    ),
    Method(
        "random",
        "control",
        "One pass, at w + rho z / ||z||, z Gaussian: what any perturbation of this size does.",
        Noise,
    ),
    Method(
        "lesam",
        "Wang et al. 2026, arXiv 2605.10183",
        "SAM at the radius at which the linearised loss rises by sigma: rho_t = min(sigma / ||g||, rho).",
        LossBudget,
        defaults={"rho": 0.05},
    ),
    Method(
        "precond",
        "after Singh et al. 2025, arXiv 2502.02407",
        "Perturb along D^-1 g, D = sqrt(exp_avg_sq) + floor: the geometry in which AdamW moves.",
        Preconditioned,
    ),
    Method(
        "flat-lora",
        "Li et al. 2024, arXiv 2409.14396",
        "One pass, with noise on the merged weight of every LoRA layer, row by row in proportion to its norm; PEFT only.",
        LoraNoise,
        defaults={"rho": 0.05},
    ),
    Method(
        "imbsam",
        "Zhou et al. 2023, arXiv 2308.07815",
        "Perturb for the examples of rare classes only; the others' gradient is taken at w.",
        TailClasses,
        defaults={"rho": 0.05},
    ),
    Method(
        "aesam",
        "Jiang et al. 2023, arXiv 2304.14647",
        "SAM in steps whose squared gradient norm is above its running mean plus c_t deviations, plain steps otherwise.",
        AboveAverage,
    ),
    Method(
        "gcsam",
        "Hassan et al. 2025, arXiv 2501.11584",
        "SAM along the centred gradient: its mean over all dimensions but the first is taken away.",
        Centred,
    ),
    Method(
        "zsharp",
        "Yun 2025, arXiv 2505.02369",
        "SAM along the coordinates whose |z-score| within their tensor is above a quantile.",
        SparseByScore,
    ),
]

METHODS: Mapping[str, Method] = MappingProxyType({row.name: row for row in _ROWS})
