"""The published methods as rows of a table: a name, the choices it makes, what they cost, and the paper.

A method is three independent choices: *where to look* (a row of `ascent.py`), *what to step along* (a row of
`descent.py`) and *when and how far* (`schedule.py`, through the `interval`, `start`, `end` and `rho_schedule` fields).
To add a method, add a row here and, where its choice does not exist yet, one pure function there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

# Fields that mean the same for every method, and those of methods that move the weights themselves.
SCHEDULE_FIELDS = frozenset(["method", "rho", "start", "end", "rho_schedule", "rho_min"])
WEIGHT_FIELDS = SCHEDULE_FIELDS | {"interval", "perturb", "stochastic_rounding"}
# Fields of the methods that look where a gradient of the batch, from a pass of its own, points.
CLEAN_PASS_FIELDS = WEIGHT_FIELDS | {
    "scope",
    "m",
    "p",
    "adaptive",
    "eta",
    "ascent_steps",
    "weight_decay_in_ascent",
    "replay_rng",
}
# Those whose ascent pass may see fewer examples than the descent pass.
GRADIENT_FIELDS = CLEAN_PASS_FIELDS | {"ascent_fraction"}

# A backward pass costs about twice a forward pass, and a Hessian-vector product two of both.
FORWARD_SHARE = 1 / 3
HESSIAN_PASSES = 2.0


@dataclass(frozen=True)
class Method:
    """One published method.

    Args:
        name (`str`): What the user writes in `SAMConfig(method=...)`.
        paper (`str`): Authors, year and arXiv number.
        summary (`str`): The update in one sentence.
        ascent (`str`): Where to look: along the `"gradient"` of a clean pass, the `"friendly"` part of it, or that
            gradient `"carried"` on to the steps that follow; without such a pass along the `"previous"` step's gradient,
            the optimizer's `"momentum"`, a `"random"` direction or with an `"auxiliary"` adapter.
        descent (`str`): What to step along: the `"perturbed"` gradient, a combination with the clean one
            (`"surrogate-gap"`, `"weighted"`, `"reused"`), or that of a changed loss (`"hardest-hit"`, `"functional"`).
        fields (`frozenset[str]`): The `SAMConfig` fields it uses.
        defaults (`Mapping[str, Any]`): Its own defaults, from its paper where the paper states one.
    """

    name: str
    paper: str
    summary: str
    ascent: str = "gradient"
    descent: str = "perturbed"
    fields: frozenset[str] = GRADIENT_FIELDS
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def has_clean_pass(self) -> bool:
        """Whether `eps` comes from a pass of its own, at `w`, if only in some steps."""
        return self.ascent in ("gradient", "friendly", "carried")

    @property
    def combines(self) -> bool:
        """Whether the step needs the clean gradient beside the perturbed one: one more copy in memory."""
        return self.descent in ("surrogate-gap", "weighted", "reused")

    def uses(self, name: str) -> bool:
        """Whether the method reads the `SAMConfig` field `name`."""
        return name in self.fields


_ROWS = [
    Method(
        "sam",
        "Foret et al. 2021, arXiv 2010.01412, Algorithm 1",
        "Step along the gradient at w + eps, eps = rho g / ||g||.",
        fields=GRADIENT_FIELDS | {"second_order"},
    ),
    Method(
        "asam",
        "Kwon et al. 2021, arXiv 2102.11600, Equation 3",
        "SAM in coordinates scaled by the weights: eps = rho T^2 g / ||T g||, T = |w| + eta.",
        defaults={"rho": 0.5, "adaptive": True, "eta": 0.01},
    ),
    Method(
        "gsam",
        "Zhuang et al. 2022, arXiv 2203.08065, Algorithm 1",
        "Also close the gap L(w + eps) - L(w): step along g_s - alpha (g - proj_{g_s} g).",
        descent="surrogate-gap",
        fields=CLEAN_PASS_FIELDS | {"alpha"},
        defaults={"rho": 0.6, "rho_min": 0.1, "rho_schedule": "lr", "alpha": 0.4},
    ),
    Method(
        "wsam",
        "Yue et al. 2023, arXiv 2305.15817, Algorithm 1",
        "Weigh the sharpness term: step along (1 - 2 gamma)/(1 - gamma) g + gamma/(1 - gamma) g_s.",
        descent="weighted",
        fields=CLEAN_PASS_FIELDS | {"gamma"},
        defaults={"gamma": 0.9},
    ),
    Method(
        "friendly",
        "Li et al. 2024, arXiv 2403.12350, Algorithm 1",
        "Climb along the batch's own part of the gradient: g - sigma m, m an average of past gradients.",
        ascent="friendly",
        fields=GRADIENT_FIELDS - {"ascent_steps"} | {"sigma", "ema_decay"},
        defaults={"sigma": 1.0, "ema_decay": 0.9},
    ),
    Method(
        "esam",
        "Du et al. 2022, arXiv 2110.03141, Algorithm 1",
        "Perturb a random share beta of the tensors by eps / beta; descend on the share gamma of hardest-hit examples.",
        descent="hardest-hit",
        fields=CLEAN_PASS_FIELDS - {"ascent_steps"} | {"beta", "gamma"},
        defaults={"beta": 0.6, "gamma": 0.5},
    ),
    Method(
        "looksam",
        "Liu et al. 2022, arXiv 2203.02714, Algorithm 1",
        "SAM on every interval-th step; between, reuse the part of g_s orthogonal to g: g + alpha ||g||/||g_v|| g_v.",
        descent="reused",
        fields=CLEAN_PASS_FIELDS - {"m"} | {"alpha"},
        defaults={"interval": 5, "alpha": 0.7},
    ),
    Method(
        "msam",
        "Becker et al. 2024, arXiv 2401.12033, Algorithm 1",
        "One pass, at w - rho v / ||v||, v the base optimizer's momentum; none during warm-up.",
        ascent="momentum",
        fields=WEIGHT_FIELDS,
        defaults={"rho": 3.0},
    ),
    Method(
        "periodic",
        "Liu et al. 2022, arXiv 2203.02714, Section 3 (SAM-k)",
        "SAM on every interval-th step, plain steps between.",
        defaults={"interval": 5},
    ),
    Method(
        "late",
        "Zhou et al. 2024, arXiv 2410.10373",
        "SAM in the last part of the run only.",
        defaults={"start": 0.75},
    ),
    Method(
        "subset",
        "Bahri et al. 2022, arXiv 2110.08529, Section 4.3",
        "Compute eps on a part of the batch.",
        defaults={"ascent_fraction": 0.25},
    ),
    Method(
        "norm-only",
        "Mueller et al. 2023, arXiv 2306.04226",
        "Perturb the normalisation layers only, with a larger rho (SAM-ON).",
        defaults={"rho": 0.5, "perturb": "norm"},
    ),
    Method(
        "functional",
        "Singh et al. 2025, arXiv 2502.02407",
        "Keep the clean loss's gradient at the logits and take the Jacobian at w + eps: J(w + eps)^T grad_logits L(w).",
        descent="functional",
        fields=CLEAN_PASS_FIELDS,
    ),
    Method(
        "previous",
        "Ji et al. 2024, NeurIPS (S2-SAM)",
        "One pass, at w + rho g/||g||, g the gradient that the step before went along.",
        ascent="previous",
        fields=WEIGHT_FIELDS,
    ),
    Method(
        "carried",
        "this project",
        "Compute g on every interval-th step, on a part of the batch, and climb along it in all steps until the next.",
        ascent="carried",
        fields=GRADIENT_FIELDS - {"m", "ascent_steps", "weight_decay_in_ascent"} | {"alpha"},
        defaults={"interval": 5, "ascent_fraction": 0.25, "alpha": 1.0},
    ),
    Method(
        "bilora",
        "Liu et al. 2025, arXiv 2508.19564",
        "One pass, with a second LoRA pair that climbs while the adapter descends; ||B2 A2|| at most rho; PEFT only.",
        ascent="auxiliary",
        fields=SCHEDULE_FIELDS,
    ),
    Method(
        "random",
        "control",
        "One pass, at w + rho z / ||z||, z Gaussian: what any perturbation of this size does.",
        ascent="random",
        fields=WEIGHT_FIELDS | {"scope"},
    ),
]

METHODS: Mapping[str, Method] = MappingProxyType({row.name: row for row in _ROWS})
