"""The table of published methods: name, paper, summary, ascent, descent, and defaults.

A method that only sets defaults is a row here. A method with its own formula is a class (in `ascents.py`,
`descents.py`, `variants.py` or your own module) and a row. The number of passes and copies, the fields in use and the
engines that refuse the method all follow from the classes.
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
        "Step along the gradient at w + eps, with eps = rho g / ||g||.",
        Steepest,
    ),
    Method(
        "asam",
        "Kwon et al. 2021, arXiv 2102.11600, Equation 3",
        "SAM in coordinates scaled by the weights: eps = rho T^2 g / ||T g||, with T = |w| + eta.",
        Steepest,
        defaults={"rho": 0.5, "adaptive": True},
        rho_is_from_scratch=True,
    ),
    Method(
        "gsam",
        "Zhuang et al. 2022, arXiv 2203.08065, Algorithm 1",
        "Also reduce the gap L(w + eps) - L(w): step along g_s - alpha (g - proj_{g_s} g).",
        Steepest,
        SurrogateGap,
        defaults={"rho": 0.6, "rho_min": 0.1, "rho_schedule": "lr"},
        rho_is_from_scratch=True,
    ),
    Method(
        "wsam",
        "Yue et al. 2023, arXiv 2305.15817, Algorithm 1",
        "Weight the sharpness term: step along (1 - 2 gamma)/(1 - gamma) g + gamma/(1 - gamma) g_s.",
        Steepest,
        Weighted,
    ),
    Method(
        "friendly",
        "Li et al. 2024, arXiv 2403.12350, Algorithm 1",
        "Perturb along the batch-specific part of the gradient: g - sigma m, with m a running average of g.",
        Friendly,
    ),
    Method(
        "esam",
        "Du et al. 2022, arXiv 2110.03141, Algorithm 1",
        "Perturb each tensor with probability beta, by eps / beta; descend on the fraction gamma of the examples whose "
        "loss rises most.",
        RandomTensors,
        HardestHit,
    ),
    Method(
        "looksam",
        "Liu et al. 2022, arXiv 2203.02714, Algorithm 1",
        "SAM every interval steps; in between, reuse g_v, the part of g_s orthogonal to g: g + alpha ||g||/||g_v|| g_v.",
        Steepest,
        Reused,
        defaults={"interval": 5},
    ),
    Method(
        "msam",
        "Becker et al. 2024, arXiv 2401.12033, Algorithm 1",
        "One pass, at w - rho v / ||v||, with v the optimizer's momentum; no perturbation during warm-up.",
        Momentum,
        defaults={"rho": 3.0},
        rho_is_from_scratch=True,
    ),
    Method(
        "periodic",
        "Liu et al. 2022, arXiv 2203.02714, Section 3 (SAM-k)",
        "SAM every interval steps, plain steps in between.",
        Steepest,
        defaults={"interval": 5},
    ),
    Method(
        "late",
        "Zhou et al. 2024, arXiv 2410.10373",
        "SAM only in the last part of the run.",
        Steepest,
        defaults={"start": 0.75},
    ),
    Method(
        "subset",
        "Bahri et al. 2022, arXiv 2110.08529, Section 4.3",
        "Compute eps on a fraction of the batch.",
        Steepest,
        defaults={"ascent_fraction": 0.25},
    ),
    Method(
        "norm-only",
        "Mueller et al. 2023, arXiv 2306.04226",
        "Perturb only the normalization layers, with a larger rho (SAM-ON).",
        Steepest,
        defaults={"rho": 0.5, "perturb": "norm"},
        rho_is_from_scratch=True,
    ),
    Method(
        "functional",
        "Singh et al. 2025, arXiv 2502.02407",
        "Combine the gradient at the logits of L(w) with the Jacobian at w + eps: J(w + eps)^T grad_logits L(w).",
        Steepest,
        Functional,
    ),
    Method(
        "previous",
        "Ji et al. 2024, NeurIPS (S2-SAM)",
        "One pass, at w + rho g / ||g||, with g the gradient of the previous optimizer step.",
        Previous,
    ),
    Method(
        "carried",
        "this project",
        "Compute g every interval steps, on a fraction of the batch, and perturb along it until it is next computed.",
        Carried,
        defaults={"interval": 5, "ascent_fraction": 0.25},
    ),
    Method(
        "bilora",
        "Liu et al. 2025, arXiv 2508.19564",
        "One pass, with a second LoRA pair that ascends while the adapter descends; ||s B2 A2|| at most rho; PEFT only.",
        AuxiliaryPair,
    ),
    Method(
        "random",
        "control",
        "One pass, at w + rho z / ||z||, with z Gaussian: the effect of a perturbation of this size in any direction.",
        Noise,
    ),
    Method(
        "lesam",
        "Wang et al. 2026, arXiv 2605.10183",
        "SAM with the radius at which the linearized loss rises by sigma: rho_t = min(sigma / ||g||, rho).",
        LossBudget,
        defaults={"rho": 0.05},
    ),
    Method(
        "precond",
        "after Singh et al. 2025, arXiv 2502.02407",
        "Perturb along D^-1 g, with D = sqrt(exp_avg_sq) + floor: AdamW's own geometry.",
        Preconditioned,
    ),
    Method(
        "flat-lora",
        "Li et al. 2024, arXiv 2409.14396",
        "One pass, with noise on the merged weight of each LoRA layer, scaled by the norm of each row; PEFT only.",
        LoraNoise,
        defaults={"rho": 0.05},
    ),
    Method(
        "imbsam",
        "Zhou et al. 2023, arXiv 2308.07815",
        "Take the gradient of rare classes at w + eps and that of all others at w.",
        TailClasses,
        defaults={"rho": 0.05},
    ),
    Method(
        "aesam",
        "Jiang et al. 2023, arXiv 2304.14647",
        "SAM in steps whose ||g||^2 exceeds its running mean by c_t standard deviations; plain steps otherwise.",
        AboveAverage,
    ),
    Method(
        "gcsam",
        "Hassan et al. 2025, arXiv 2501.11584",
        "SAM along the centered gradient, with its mean over all dimensions but the first subtracted.",
        Centred,
    ),
    Method(
        "zsharp",
        "Yun 2025, arXiv 2505.02369",
        "SAM along the coordinates whose |z-score| within their tensor exceeds a quantile.",
        SparseByScore,
    ),
]

METHODS: Mapping[str, Method] = MappingProxyType({row.name: row for row in _ROWS})
