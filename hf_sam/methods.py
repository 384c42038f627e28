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

# Fields that mean the same for every method.
UNIVERSAL_FIELDS = frozenset(
    [
        "method",
        "rho",
        "scope",
        "m",
        "interval",
        "start",
        "end",
        "rho_schedule",
        "rho_min",
        "perturb",
        "replay_rng",
        "stochastic_rounding",
    ]
)
# Fields of the methods that climb along a gradient which a first pass computes.
GRADIENT_FIELDS = frozenset(["p", "adaptive", "eta", "ascent_steps", "ascent_fraction", "weight_decay_in_ascent"])


@dataclass(frozen=True)
class Method:
    """One published method.

    Args:
        name (`str`): What the user writes in `SAMConfig(method=...)`.
        paper (`str`): Authors, year and arXiv number.
        summary (`str`): The update in one sentence.
        ascent (`str`): Where to look; a key of [`~hf_sam.ascent.ASCENTS`].
        descent (`str`): What to step along; a key of [`~hf_sam.descent.DESCENTS`].
        fields (`frozenset[str]`): The `SAMConfig` fields it uses beside `UNIVERSAL_FIELDS`.
        defaults (`Mapping[str, Any]`): Its own defaults, from its paper where the paper states one.
    """

    name: str
    paper: str
    summary: str
    ascent: str = "gradient"
    descent: str = "perturbed"
    fields: frozenset[str] = GRADIENT_FIELDS
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def uses(self, name: str) -> bool:
        """Whether the method reads the `SAMConfig` field `name`."""
        return name in UNIVERSAL_FIELDS or name in self.fields


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
]

METHODS: Mapping[str, Method] = MappingProxyType({row.name: row for row in _ROWS})
