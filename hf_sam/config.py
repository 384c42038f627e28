"""`SAMConfig`: what a user chooses, validated field by field, to and from JSON."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .methods.table import FORWARD_SHARE, HESSIAN_PASSES, METHODS, Method

SCOPES = ("auto", "micro", "device", "global")
RHO_SCHEDULES = ("constant", "linear", "cosine", "lr")
SELECTORS = ("all", "norm", "no-norm-no-bias")

# What a field is when neither the user nor the method says anything. A field that is not here stays None: off.
DEFAULTS: dict[str, Any] = {
    "rho": 0.005,  # a tenth of the usual one, which does harm in short fine-tuning: docs/methods.md, "The default rho"
    "p": 2.0,
    "adaptive": False,
    "scope": "auto",
    "ascent_steps": 1,
    "ascent_fraction": 1.0,
    "interval": 1,
    "start": 0.0,
    "end": 1.0,
    "rho_schedule": "constant",
    "perturb": "all",
    "replay_rng": True,
    "weight_decay_in_ascent": False,
    "second_order": False,
    "stochastic_rounding": False,
}
# Fields that another field switches on: (field, its value when switched on, the switch, is the switch on).
_DEPENDENT: list[tuple[str, float, str, Callable[[SAMConfig], bool]]] = [
    ("eta", 0.01, "adaptive=True", lambda config: bool(config.adaptive)),
    ("rho_min", 0.0, "a rho_schedule other than 'constant'", lambda config: config.rho_schedule != "constant"),
]


@dataclass
class SAMConfig:
    r"""
    What sharpness-aware minimization does, beside the usual `TrainingArguments`.

    Every field left at `None` takes the default of the chosen method, else the one named here; after construction the
    fields hold the values in force. `SAMConfig(rho=0)` is the stock Trainer.

    Args:
        method (`str`, *optional*, defaults to `"sam"`):
            A row of [`~hf_sam.methods.METHODS`].
        rho (`float`, *optional*, defaults to 0.005, or what the method's row says, such as 0.5 for `"asam"`):
            Size of the perturbation: the p-norm of `eps` over all perturbed parameters together. At least 0. The default
            was not told from no SAM in our fine-tuning runs, where 0.05 did harm; from scratch start at 0.05 (Foret et al. 2021), or look for
            one with `recipes/find_rho.py`.
        p (`float`, *optional*, defaults to 2.0):
            The norm that bounds the perturbation, in [1, inf]; `"inf"` is accepted. Foret et al. 2021, Equation 2.
        adaptive (`bool`, *optional*, defaults to `False`, `True` for `"asam"`):
            Measure the perturbation in units of the weights, `T = |w| + eta` (Kwon et al. 2021).
        eta (`float`, *optional*, defaults to 0.01):
            Added to `|w|` so that weights at zero move too. At least 0; only with `adaptive`.
        scope (`str`, *optional*, defaults to `"auto"`):
            Over which examples one perturbation is computed. `"micro"`: each micro-batch. `"device"`: all that one
            device sees in one optimizer step. `"global"`: the whole effective batch. `"auto"`: `"micro"` where `m` is
            given, else `"device"` where parameters are replicated and `"global"` where they are sharded.
        m (`int`, *optional*):
            Examples per perturbation, the paper's m-sharpness: splits each micro-batch further. Only with
            `scope="micro"`.
        ascent_steps (`int`, *optional*, defaults to 1):
            Inner ascent steps K, each of size rho / K. Every one costs a pass.
        ascent_fraction (`float`, *optional*, defaults to 1.0):
            Share of each micro-batch that the ascent pass sees, in (0, 1].
        interval (`int`, *optional*, defaults to 1):
            Perturb every `interval`-th step; for `"carried"`, look for a direction in every `interval`-th step.
        start, end (`int` or `float`, *optional*, default to 0.0 and 1.0):
            First step that perturbs and first one that no longer does. A float in [0, 1] is a fraction of the steps
            that the Trainer really runs, an int is a step.
        rho_schedule (`str`, *optional*, defaults to `"constant"`):
            `"linear"` or `"cosine"` ramp from `rho_min` to `rho` between `start` and `end`; `"lr"` in proportion to
            the learning rate, never below `rho_min`.
        rho_min (`float`, *optional*, defaults to 0.0):
            Lower end of the schedule, in [0, rho].
        alpha (`float`, *optional*):
            Weight of the extra component of `"gsam"` and `"looksam"`. At least 0. For `"carried"` the factor by which
            the perturbation shrinks with each step that its direction grows older.
        gamma (`float`, *optional*):
            `"wsam"`: weight of the sharpness term, in [0, 1). `"esam"`: share of the examples kept, in (0, 1].
        beta (`float`, *optional*):
            `"esam"`: probability that a weight is perturbed, in (0, 1].
        sigma (`float`, *optional*):
            `"friendly"`: how much of the averaged gradient is removed from the ascent direction. At least 0.
        ema_decay (`float`, *optional*):
            `"friendly"`: decay of that average, in [0, 1).
        perturb (`str` or `list[str]`, *optional*, defaults to `"all"`):
            Which trainable parameters are perturbed, and counted in the norm: `"all"`, `"norm"` (normalisation layers
            only), `"no-norm-no-bias"`, or shell patterns over parameter names such as `"*.attention.*"`.
        replay_rng (`bool`, *optional*, defaults to `True`):
            Use the same dropout masks in both passes.
        weight_decay_in_ascent (`bool`, *optional*, defaults to `False`):
            Add the optimizer's `weight_decay * w` to the ascent gradient: the L2 term of the paper's objective.
        second_order (`bool`, *optional*, defaults to `False`):
            Keep the term that the paper drops, `(d eps / d w)^T g_s`. For analysis: costs a Hessian-vector product.
        stochastic_rounding (`bool`, *optional*, defaults to `False`):
            Round `w + eps` up or down at random, so that in expectation the perturbation survives in parameters that
            are stored in 16 bits.

    Raises:
        ValueError: An unknown method, a value out of range, or a field that the chosen method does not use. The
            message names the field and what is allowed.
    """

    method: str = "sam"
    rho: float | None = None
    p: float | None = None
    adaptive: bool | None = None
    eta: float | None = None
    scope: str | None = None
    m: int | None = None
    ascent_steps: int | None = None
    ascent_fraction: float | None = None
    interval: int | None = None
    start: int | float | None = None
    end: int | float | None = None
    rho_schedule: str | None = None
    rho_min: float | None = None
    alpha: float | None = None
    gamma: float | None = None
    beta: float | None = None
    sigma: float | None = None
    ema_decay: float | None = None
    perturb: str | Sequence[str] | None = None
    replay_rng: bool | None = None
    weight_decay_in_ascent: bool | None = None
    second_order: bool | None = None
    stochastic_rounding: bool | None = None

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(
                f"method={self.method!r} is unknown.{_nearest(self.method, METHODS)} Allowed: {', '.join(METHODS)}."
            )
        for field in self.fields():
            if self.row.uses(field):
                continue
            if getattr(self, field) == DEFAULTS.get(field):  # a neutral value may be said aloud
                setattr(self, field, None)
            elif getattr(self, field) is not None:
                users = [name for name, row in METHODS.items() if row.uses(field)]
                raise ValueError(
                    f"{field}={getattr(self, field)!r} has no meaning for method={self.method!r}, which uses: "
                    f"{', '.join(name for name in self.fields() if self.row.uses(name))}. Leave {field} out, or choose "
                    f"a method that uses it: {', '.join(users) or 'none'}."
                )
        dependent = {field for field, *_ in _DEPENDENT}
        defaults = {**DEFAULTS, **self.row.defaults}
        for field, default in defaults.items():
            if getattr(self, field) is None and self.row.uses(field) and field not in dependent:
                setattr(self, field, default)
        for field, default, switch, is_on in _DEPENDENT:
            if not self.row.uses(field):
                continue
            if not is_on(self) and getattr(self, field) is not None:
                raise ValueError(
                    f"{field}={getattr(self, field)!r} is used only with {switch}. Leave it out or set that."
                )
            if is_on(self) and getattr(self, field) is None:
                setattr(self, field, defaults.get(field, default))
                if field == "rho_min" and isinstance(self.rho, int | float):
                    self.rho_min = min(self.rho_min, self.rho)  # a default gives way to the rho that the user chose
        for field in self.fields():
            if getattr(self, field) is not None:
                setattr(self, field, _CHECKS[field](field, getattr(self, field)))
        self._check_combinations()

    def _check_combinations(self):
        if self.m is not None and self.scope not in ("auto", "micro"):
            raise ValueError(
                f"m={self.m} splits micro-batches and needs scope='micro' (or 'auto'), not {self.scope!r}."
            )
        if self.method in ("looksam", "carried") and self.scope == "micro":
            raise ValueError(
                f"scope='micro' does not go with method={self.method!r}, which uses the gradient of a whole step again: "
                "choose 'device', 'global' or 'auto'."
            )
        if self.method == "wsam" and self.gamma == 1:
            raise ValueError("gamma=1.0 must be a number in [0, 1) for method='wsam', whose weights are 1/(1 - gamma).")
        if self.method == "esam" and self.gamma == 0:
            raise ValueError(
                "gamma=0.0 must be a number in (0, 1] for method='esam', which keeps that share of examples."
            )
        if self.second_order:
            for field, needed in (
                ("p", 2.0),
                ("adaptive", False),
                ("ascent_steps", 1),
                ("ascent_fraction", 1.0),
                ("weight_decay_in_ascent", False),
            ):
                if getattr(self, field) != needed:
                    raise ValueError(
                        f"second_order=True is derived for plain sam: {field}={getattr(self, field)!r} must be {needed!r}."
                    )
        if self.rho_min is not None and self.rho_min > self.rho:
            raise ValueError(f"rho_min={self.rho_min} must be at most rho={self.rho}.")
        if type(self.start) is type(self.end) and self.start >= self.end:
            raise ValueError(f"start={self.start} must be below end={self.end}: as it is, no step would be perturbed.")

    @property
    def row(self) -> Method:
        """The chosen method's row of the table."""
        return METHODS[self.method]

    @property
    def passes_per_step(self) -> float:
        """Forward-backward passes over the batch in a step that perturbs, the descent pass included."""
        if not self.row.has_clean_pass:
            return 1.0
        inner = (self.ascent_steps or 1) - 1
        descent = 1.0 if self.row.descent != "hardest-hit" or self.gamma == 1 else self.gamma + FORWARD_SHARE
        return (self.ascent_fraction or 1.0) + inner + descent + (HESSIAN_PASSES if self.second_order else 0)

    @classmethod
    def fields(cls) -> tuple[str, ...]:
        """The names of all fields, in the order of the constructor."""
        return tuple(field.name for field in dataclasses.fields(cls))

    def to_dict(self) -> dict[str, Any]:
        """The fields that are in force, as JSON can hold them (`p=inf` becomes `"inf"`)."""
        values = {name: getattr(self, name) for name in self.fields() if getattr(self, name) is not None}
        return {name: "inf" if value == math.inf else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SAMConfig:
        """The inverse of `to_dict`.

        Raises:
            ValueError: A key that is no field; the message suggests the nearest one.
        """
        for key in values:
            if key not in cls.fields():
                hint = _nearest(key, cls.fields())
                raise ValueError(f"{key!r} is no field of SAMConfig.{hint} Allowed: {', '.join(cls.fields())}.")
        return cls(**values)

    def to_json(self) -> str:
        """`to_dict` as indented JSON text."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> SAMConfig:
        """The inverse of `to_json`."""
        return cls.from_dict(json.loads(text))


def _nearest(name: Any, known) -> str:
    found = difflib.get_close_matches(str(name), list(known), n=1)
    return f" Did you mean {found[0]!r}?" if found else ""


# --- one check per kind of value: returns the value in its own type, or raises ------------------------------------


def _number(low: float, high: float = math.inf, *, above: bool = False, below: bool = False, inf: bool = False):
    """A finite number (or inf where `inf`) in [low, high], open at `low` where `above` and at `high` where `below`."""
    interval = f"{'(' if above else '['}{low:g}, {high:g}{']' if (high < math.inf and not below) or inf else ')'}"

    def check(field: str, value: Any) -> float:
        try:
            number = float(value) if not isinstance(value, bool) else math.nan
        except (TypeError, ValueError):
            number = math.nan
        inside = (low < number if above else low <= number) and (number < high if below else number <= high)
        if not inside or (number == math.inf and not inf):  # a NaN is never inside
            raise ValueError(f"{field}={value!r} must be a number in {interval}.")
        return number

    return check


def _whole(low: int):
    def check(field: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ValueError(f"{field}={value!r} must be a whole number, at least {low}.")
        return value

    return check


def _choice(allowed: Sequence[str]):
    def check(field: str, value: Any) -> str:
        if value not in allowed:
            raise ValueError(f"{field}={value!r} is unknown.{_nearest(value, allowed)} Allowed: {', '.join(allowed)}.")
        return value

    return check


def _flag(field: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{field}={value!r} must be True or False.")
    return value


def _moment(field: str, value: Any) -> int | float:
    """A step (int) or a fraction of the run (float)."""
    is_step = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    is_fraction = isinstance(value, float) and 0.0 <= value <= 1.0
    if not (is_step or is_fraction):
        raise ValueError(
            f"{field}={value!r} must be a step (a whole number, at least 0) or a fraction of the run (0.0 to 1.0)."
        )
    return value


def _selector(field: str, value: Any) -> str | list[str]:
    patterns = [value] if isinstance(value, str) else value
    if not isinstance(patterns, Sequence) or not patterns or not all(isinstance(p, str) and p for p in patterns):
        raise ValueError(
            f"{field}={value!r} must be one of {', '.join(SELECTORS)}, or shell patterns over parameter names."
        )
    return value if isinstance(value, str) else list(value)


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "method": _choice(tuple(METHODS)),
    "rho": _number(0),
    "p": _number(1, inf=True),
    "adaptive": _flag,
    "eta": _number(0),
    "scope": _choice(SCOPES),
    "m": _whole(1),
    "ascent_steps": _whole(1),
    "ascent_fraction": _number(0, 1, above=True),
    "interval": _whole(1),
    "start": _moment,
    "end": _moment,
    "rho_schedule": _choice(RHO_SCHEDULES),
    "rho_min": _number(0),
    "alpha": _number(0),
    "gamma": _number(0, 1),
    "beta": _number(0, 1, above=True),
    "sigma": _number(0),
    "ema_decay": _number(0, 1, below=True),
    "perturb": _selector,
    "replay_rng": _flag,
    "weight_decay_in_ascent": _flag,
    "second_order": _flag,
    "stochastic_rounding": _flag,
}
