"""`SAMConfig`: the user's choices, validated field by field, with conversion to and from JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from .methods.ascents import Steepest
from .methods.base import Ascent, Descent, Method, Needs, combines, copies_of, needs_of, overrides
from .methods.descents import ThroughPerturbation
from .methods.fields import is_choice, is_flag, is_moment, is_number, is_selector, is_whole
from .methods.table import METHODS
from .methods.users import describe_part, part_from_description, refuse_undeclared
from .suggestions import did_you_mean

SCOPES = ("auto", "micro", "device", "global")
RHO_SCHEDULES = ("constant", "linear", "cosine", "lr")
SELECTORS = ("all", "norm", "no-norm-no-bias", "no-embeddings", "no-embeddings-no-head")

# Values of fields that neither the user nor the method sets. For a method that does not use a field, setting it to this
# value has no effect. Fields that are not listed stay None, which means off.
DEFAULTS: dict[str, Any] = {
    "rho": 0.005,  # a tenth of the usual value, which hurts in short fine-tuning: docs/methods.md, "The default radius"
    "scope": "auto",
    "ascent_fraction": 1.0,
    "interval": 1,
    "start": 0.0,
    "end": 1.0,
    "rho_schedule": "constant",
    "perturb": "all",
    "replay_rng": True,
    "second_order": False,
    "stochastic_rounding": False,
    "log_shares": False,
    "p": 2.0,
    "adaptive": False,
    "ascent_steps": 1,
    "weight_decay_in_ascent": False,
}

DEFAULT_SIGMA = 0.03  # nats; goes with the default rho: docs/results/default.md

_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "method": is_choice(tuple(METHODS)),
    "rho": is_number(0),
    "scope": is_choice(SCOPES),
    "m": is_whole(1),
    "ascent_fraction": is_number(0, 1, above=True),
    "interval": is_whole(1),
    "start": is_moment,
    "end": is_moment,
    "rho_schedule": is_choice(RHO_SCHEDULES),
    "rho_min": is_number(0),
    "perturb": is_selector(SELECTORS),
    "replay_rng": is_flag,
    "second_order": is_flag,
    "stochastic_rounding": is_flag,
    "log_shares": is_flag,
}


class Parts(NamedTuple):
    """The ascent and the descent of a configuration."""

    ascent: Ascent
    descent: Descent

    @property
    def needs(self) -> Needs:
        """The needs of both parts."""
        return needs_of(*self)

    @property
    def combines(self) -> bool:
        """Whether the optimizer gets a gradient built from `g_s` rather than `g_s` itself."""
        return combines(self.descent)

    @property
    def carries_on(self) -> bool:
        """Whether the method keeps state between steps."""
        return bool(self.ascent.memory or self.ascent.scalars or self.descent.memory)

    @property
    def copies(self) -> int:
        """Copies of the perturbed weights held in addition to stock training, in a step that logs."""
        return copies_of(*self)


@dataclass
class SAMConfig:
    r"""
    The configuration of sharpness-aware minimization, next to the usual `TrainingArguments`.

    A field left at `None` takes the default of the chosen method, or else the one given here; after construction the
    fields hold the effective values, and only `rho` can still be set. `SAMConfig(rho=0)` is the stock Trainer.

    Args:
        method (`str`, *optional*, defaults to `"sam"`):
            A row of [`~hf_sam.methods.METHODS`].
        rho (`float`, *optional*, defaults to 0.005, or what the method's row says, such as 0.5 for `"asam"`):
            Size of the perturbation: the p-norm of `eps` over all perturbed parameters together. At least 0. The useful
            size differs between models, and no default gains anything in our short fine-tuning runs; 0.005 without the
            bound `sigma` costs DINOv2 up to 13 points in 60 steps. When training from scratch, start at 0.05 (Foret et
            al. 2021). `hf-sam find-rho` searches for a good value.
        p (`float`, *optional*, defaults to 2.0):
            The norm that bounds the perturbation, in [1, inf]; `"inf"` is accepted. Foret et al. 2021, Equation 2.
        adaptive (`bool`, *optional*, defaults to `False`, `True` for `"asam"`):
            Measure the perturbation in units of the weights, `T = |w| + eta` (Kwon et al. 2021).
        eta (`float`, *optional*, defaults to 0.01):
            Added to `|w|` so that weights at zero move too. At least 0; only with `adaptive`.
        scope (`str`, *optional*, defaults to `"auto"`):
            The examples over which one perturbation is computed. `"micro"`: each micro-batch. `"device"`: all examples
            of one device in one optimizer step. `"global"`: the whole effective batch. `"auto"`: `"micro"` if `m` is
            given, else `"device"` if parameters are replicated and `"global"` if they are sharded.
        m (`int`, *optional*):
            Examples per perturbation, as in the paper's m-sharpness: each micro-batch is split further. Only with
            `scope="micro"` or `"auto"`.
        ascent_steps (`int`, *optional*, defaults to 1):
            Number K of inner ascent steps, each of size rho / K. Each costs one pass.
        ascent_fraction (`float`, *optional*, defaults to 1.0):
            Share of each micro-batch that the ascent pass sees, in (0, 1].
        interval (`int`, *optional*, defaults to 1):
            Perturb every `interval`-th step; for `"carried"`, compute a direction in every `interval`-th step.
        start, end (`int` or `float`, *optional*, default to 0.0 and 1.0):
            First perturbed step, and end of the perturbed steps (exclusive). A float in [0, 1] is a fraction of the
            steps that the Trainer runs, an int is a step.
        rho_schedule (`str`, *optional*, defaults to `"constant"`):
            `"linear"` or `"cosine"` ramps from `rho_min` to `rho` between `start` and `end`; `"lr"` is proportional to
            the learning rate, but never below `rho_min`.
        rho_min (`float`, *optional*, defaults to 0.0):
            Lower end of the schedule, in [0, rho].
        alpha (`float`, *optional*):
            Weight of the extra component of `"gsam"` and `"looksam"`. At least 0. For `"carried"`, the factor by which
            the perturbation shrinks with each step since its direction was computed.
        gamma (`float`, *optional*):
            `"wsam"`: weight of the sharpness term, in [0, 1). `"esam"`: share of the examples kept, in (0, 1].
        beta (`float`, *optional*):
            `"esam"`: probability that a weight is perturbed, in (0, 1].
        sigma (`float`, *optional*, defaults to 0.03 with the default `rho`, else to no bound):
            Methods along the gradient itself: upper bound of the linearised rise of the loss, in its units (Wang et al.
            2026, arXiv 2605.10183). rho is smaller where `rho ||g||` would exceed it. Above 0. A rho of your own has no
            bound unless you give one. `"lesam"`: the rise itself, 0.1 by default. `"friendly"`: how much of the
            averaged gradient is removed from the ascent direction, at least 0; 1 by default.
        ema_decay (`float`, *optional*):
            `"friendly"`: decay of that average, in [0, 1).
        perturb (`str` or `list[str]`, *optional*, defaults to `"all"`):
            The trainable parameters that are perturbed and counted in the norm: `"all"`, `"norm"` (normalisation layers
            only), `"no-norm-no-bias"`, `"no-embeddings"` (neither tokens, patches, positions nor class tokens),
            `"no-embeddings-no-head"`, or shell patterns over parameter names such as `"*.attention.*"`.
        replay_rng (`bool`, *optional*, defaults to `True`):
            Use the same dropout masks in both passes.
        weight_decay_in_ascent (`bool`, *optional*, defaults to `False`):
            Add the optimizer's `weight_decay * w` to the ascent gradient: the L2 term of the paper's objective.
        second_order (`bool`, *optional*, defaults to `False`):
            Keep the term that the paper drops, `(d eps / d w)^T g_s`. For analysis; costs a Hessian-vector product.
        stochastic_rounding (`bool`, *optional*, defaults to `False`):
            Round `w + eps` up or down at random, so that 16-bit parameters keep the perturbation in expectation.
        log_shares (`bool`, *optional*, defaults to `False`):
            Log the share of the squared norm of `eps` in each group of modules, such as `sam_share/attention`.
        ascent (`Ascent`, *optional*):
            Where to perturb: a custom object, or one of `hf_sam.methods`, that replaces the method's ascent; on the command
            line, the path of its class, `module:Class`. Set its hyperparameters on the object. See `docs/write_your_own.md`.
        descent (`Descent`, *optional*):
            What the optimizer gets: a custom object that replaces the method's descent, in the same way.
        options (`Mapping[str, Any]`, *optional*):
            Hyperparameters of the method that have no field here; on the command line, as JSON, also those of custom
            classes.

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
    log_shares: bool | None = None
    ascent: Ascent | None = None
    descent: Descent | None = None
    options: Mapping[str, Any] | None = None

    def __post_init__(self):
        if not isinstance(self.method, str) or self.method not in METHODS:
            raise ValueError(
                f"method={self.method!r} is unknown.{did_you_mean(self.method, METHODS)} Allowed: {', '.join(METHODS)}."
            )
        # The values given by the user, without derived ones.
        self._given = {name: getattr(self, name) for name in self.fields() if getattr(self, name) is not None}
        for field, kind in (("ascent", Ascent), ("descent", Descent)):
            value = getattr(self, field)
            if value is not None and not isinstance(value, kind):
                hint = (
                    f"{value.__name__}()"
                    if isinstance(value, type)
                    else f"an instance of a subclass of hf_sam.{kind.__name__}"
                )
                raise ValueError(f"{field}={value!r} must be an {kind.__name__}: give {hint}.")
            if value is not None:
                refuse_undeclared(value)
        self._refuse_unused()
        self._fill_in()
        for field, check in _CHECKS.items():
            if getattr(self, field) is not None:
                setattr(self, field, check(field, getattr(self, field)))
        if self.rho_min is not None and "rho_min" not in self._given:
            self.rho_min = min(self.rho_min, self.rho)  # the default must not exceed the chosen rho
        for field in self._own_hyperparameters:  # each is checked by its class
            value = next((getattr(part, field) for part in self.parts if hasattr(part, field)), None)
            if field not in _FLAT:
                self.options[field] = value
            elif getattr(self, field) is not None:
                setattr(self, field, value)
        self._check_combinations()
        self._is_complete = True

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field; after construction only `rho`, since the other fields have gone into the method's objects.

        A rho that is set before training is the user's own, so the default bound `sigma` goes with the default rho.

        Raises:
            AttributeError: Another field is set after construction.
            ValueError: `rho` is out of range.
        """
        if name in type(self).fields() and getattr(self, "_is_complete", False):
            if name != "rho":
                raise AttributeError(
                    f"{name} cannot be set after construction, because other fields depend on it. Make a new configuration: "
                    f"config.changed({name}={value!r})."
                )
            value = _CHECKS[name](name, value)
            if self._has_default_bound:
                self._has_default_bound = False
                super().__setattr__("sigma", None)
                self.__dict__.pop("parts", None)
        super().__setattr__(name, value)

    def _refuse_unused(self) -> None:
        if self.options is not None and not isinstance(self.options, Mapping):
            raise ValueError(f'options={self.options!r} must be a mapping such as {{"quantile": 0.9}}.')
        for option in self.options or ():
            if option not in self._own_hyperparameters:
                raise ValueError(
                    f"options: {option!r} is not a hyperparameter of {self.label}.{did_you_mean(option, self._own_hyperparameters)} Allowed: "
                    f"{', '.join(self._own_hyperparameters) or 'none; set those of ascent= and descent= on the objects'}."
                )
            if getattr(self, option, None) is not None:
                raise ValueError(f"{option} is given twice, as a field and in options. Remove one of them.")
        for field in self.fields():
            value = getattr(self, field)
            if value is None or self._uses(field):
                continue
            if value == DEFAULTS.get(field):  # a neutral value may be given explicitly
                setattr(self, field, None)
                continue
            users = [name for name, row in METHODS.items() if field in fields_used(row)]
            raise ValueError(
                f"{field}={value!r} is not used by {self.label}, which uses: "
                f"{', '.join(name for name in self.fields() if self._uses(name))}. Leave {field} out, or choose "
                f"a method that uses it: {', '.join(users) or 'none'}."
            )

    def _fill_in(self) -> None:
        """Set used fields to their defaults; a dependent field only if the field that enables it is set."""
        options = dict(self.options or {})
        for field in [option for option in options if option in _FLAT]:
            setattr(self, field, options.pop(field))
        self.options = options
        defaults = {**DEFAULTS, **self._own_hyperparameters, **self.row.defaults}
        dependent = {"eta": "adaptive=True", "rho_min": "a rho_schedule other than 'constant'"}
        for field in self.fields():
            if getattr(self, field) is None and self._uses(field) and field not in dependent:
                setattr(self, field, defaults.get(field))
        may_be_bounded = self.sigma is None and self._own_hyperparameters.get("sigma", 0.0) is None
        has_default_rho = "rho" not in self._given and "rho" not in self.row.defaults
        self._has_default_bound = may_be_bounded and has_default_rho and not self.second_order
        if self._has_default_bound:
            self.sigma = DEFAULT_SIGMA
        is_on = {"eta": bool(self.adaptive), "rho_min": self.rho_schedule != "constant"}
        for field, switch in dependent.items():
            value = getattr(self, field)
            if value is not None and not is_on[field]:
                raise ValueError(f"{field}={value!r} is used only with {switch}. Leave {field} out, or set {switch}.")
            if value is None and is_on[field] and self._uses(field):
                setattr(self, field, defaults.get(field, 0.0))

    def _check_combinations(self) -> None:
        if self.m is not None and self.scope not in ("auto", "micro"):
            raise ValueError(
                f"m={self.m} splits micro-batches and needs scope='micro' or 'auto', not scope={self.scope!r}."
            )
        if self.parts.needs & Needs.WHOLE_STEP and self.scope == "micro":
            raise ValueError(
                f"scope='micro' does not work with {self.label}, which reuses the gradient of a whole step. "
                "Choose scope='device', 'global' or 'auto'."
            )
        if self.second_order:
            for field, needed in (
                ("p", 2.0),
                ("adaptive", False),
                ("ascent_steps", 1),
                ("ascent_fraction", 1.0),
                ("weight_decay_in_ascent", False),
                ("sigma", None),
            ):
                if getattr(self, field) != needed:
                    raise ValueError(
                        f"second_order=True is derived for plain sam only: {field}={getattr(self, field)!r} must be {needed!r}."
                    )
        if self.rho_min is not None and self.rho_min > self.rho:
            raise ValueError(f"rho_min={self.rho_min} must be at most rho={self.rho}.")
        if type(self.start) is type(self.end) and self.start >= self.end:
            raise ValueError(f"start={self.start} must be below end={self.end}: otherwise no step is perturbed.")

    def changed(self, **changes: Any) -> SAMConfig:
        """A copy of this configuration with some of the given values changed.

        If the method changes, only values that do not depend on it are kept: a radius or hyperparameter for one method
        means something else for another.

        Raises:
            ValueError: As for the constructor; also for an unknown field.
        """
        given = dict(self._given)
        if changes.get("method", self.method) != self.method:
            new = METHODS.get(changes["method"], self.row)
            given = {k: v for k, v in given.items() if k != "method" and not depends_on_method(k, self.row, new)}
        return SAMConfig.from_dict({**given, **changes})

    # --- derived from the fields -------------------------------------------------------------------------------------

    @property
    def row(self) -> Method:
        """The chosen method's row of the table."""
        return METHODS[self.method]

    @property
    def name(self) -> str:
        """The method's name, or the names of the custom classes that replace it."""
        own = [type(part).__name__ for part in (self.ascent, self.descent) if part is not None]
        return " + ".join([*([self.method] if self.method != "sam" or not own else []), *own])

    @property
    def label(self) -> str:
        """The method as it appears in messages."""
        return f"method={self.name!r}"

    @property
    def paper(self) -> str | None:
        """The method's paper; None if a custom object replaces a part."""
        return self.row.paper if self.ascent is None and self.descent is None else None

    @property
    def summary(self) -> str:
        """The update in one sentence."""
        own = [part for part in (self.ascent, self.descent) if part is not None]
        lines = [(type(part).__doc__ or type(part).__name__).strip().splitlines()[0] for part in own]
        return " ".join(lines) if lines else self.row.summary

    @cached_property
    def parts(self) -> Parts:
        """The ascent and the descent that this configuration runs."""
        ascent, descent = self._classes
        return Parts(self.ascent or self._make(ascent), self.descent or self._make(descent))

    @property
    def _classes(self) -> tuple[type[Ascent], type[Descent]]:
        """The classes of the table's row, before custom objects replace them."""
        ascent, descent = self.row.classes
        return ascent, ThroughPerturbation if self.second_order else descent

    def _make(self, kind: type) -> Any:
        values = {name: getattr(self, name, None) for name in hyperparameters(kind)} | {
            name: value for name, value in (self.options or {}).items() if name in hyperparameters(kind)
        }
        return kind(**{name: value for name, value in values.items() if value is not None})

    @cached_property
    def _own_hyperparameters(self) -> dict[str, Any]:
        """Hyperparameters, with defaults, of the classes of the row that no custom object replaces."""
        given = zip(self.row.classes, (self.ascent, self.descent), strict=True)
        return {
            name: default for kind, part in given if part is None for name, default in hyperparameters(kind).items()
        }

    def _uses(self, field: str) -> bool:
        return field in self._own_hyperparameters or field in common_fields(
            *(part or kind for part, kind in zip((self.ascent, self.descent), self.row.classes, strict=True)), self.row
        )

    @property
    def passes_per_step(self) -> float:
        """Forward-backward passes over the batch in a perturbed step, including the descent pass."""
        ascent, descent = self.parts
        clean = (self.ascent_fraction or 1.0) if self.parts.needs & Needs.GRADIENT else 0.0
        return clean + (ascent.ascent_steps - 1) + 1.0 + descent.extra_passes

    # --- serialisation -----------------------------------------------------------------------------------------------

    @classmethod
    def fields(cls) -> tuple[str, ...]:
        """The names of all fields, in the order of the constructor."""
        return tuple(field.name for field in dataclasses.fields(cls))

    def to_dict(self) -> dict[str, Any]:
        """The fields in use, as JSON-serialisable values.

        `p=inf` becomes `"inf"`; a custom object becomes the path of its class and its fields.
        """
        values = {name: getattr(self, name) for name in self.fields() if getattr(self, name) not in (None, {})}
        values |= {name: describe_part(values[name]) for name in ("ascent", "descent") if name in values}
        return {name: "inf" if value == math.inf else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SAMConfig:
        """The inverse of `to_dict`. It imports nothing: a custom class must be in a module that is already imported.

        Raises:
            ValueError: A key is not a field (the message suggests the nearest one), or a class is not imported.
        """
        for key in values:
            if key not in cls.fields():
                hint = did_you_mean(key, cls.fields())
                raise ValueError(f"{key!r} is not a field of SAMConfig.{hint} Allowed: {', '.join(cls.fields())}.")
        made = {
            name: part_from_description(values[name], kind)
            for name, kind in (("ascent", Ascent), ("descent", Descent))
            if values.get(name) is not None
        }
        return cls(**{**values, **made})

    def to_json(self) -> str:
        """`to_dict` as indented JSON text.

        Raises:
            ValueError: A field of a custom object has a value that JSON cannot hold, such as a tensor.
        """
        try:
            return json.dumps(self.to_dict(), indent=2) + "\n"
        except TypeError as error:
            raise ValueError(
                f"{self.label} cannot be written to sam_config.json, which every checkpoint gets ({error}). Give the fields of "
                "custom ascents and descents numbers, strings or lists of them, and build other objects from these in the class."
            ) from error

    @classmethod
    def from_json(cls, text: str) -> SAMConfig:
        """The inverse of `to_json`."""
        return cls.from_dict(json.loads(text))


_FLAT = frozenset(SAMConfig.fields())
_METHOD_FIELDS = {"rho", "rho_min", "rho_schedule", "second_order", "ascent", "descent", "options"}


# --- which fields a method uses, derived from its classes ------------------------------------------------------------


def hyperparameters(kind: type) -> dict[str, Any]:
    """The fields of an `Ascent` or `Descent` class, with their defaults."""
    return {field.name: field.default for field in dataclasses.fields(kind)}


def common_fields(ascent: Ascent | type, descent: Descent | type, row: Method) -> frozenset[str]:
    """The `SAMConfig` fields, apart from hyperparameters, that a pair of classes or objects uses."""
    needs = needs_of(ascent, descent)
    used = {"method", "ascent", "descent", "options", "rho", "start", "end", "rho_schedule", "rho_min"}
    if not needs & Needs.ATTACHMENT:
        used |= {"interval", "perturb", "stochastic_rounding", "log_shares"}
    if needs & Needs.UNEVEN_PASSES:
        return frozenset(used | {"replay_rng"})
    if needs & (Needs.GRADIENT | Needs.NOISE) and not needs & Needs.ATTACHMENT:
        used |= {"scope"}
    if needs & Needs.GRADIENT:
        used |= {"replay_rng"} if needs & Needs.WHOLE_STEP else {"replay_rng", "m"}
        if not needs & (Needs.CLEAN_GRADIENT | Needs.SUBSET | Needs.LOGITS) and not overrides(ascent, "examples"):
            used |= {"ascent_fraction"}
    is_plain = not {"adaptive", "ascent_fraction"} & row.defaults.keys()
    if is_plain and ascent is Steepest and descent is Descent:
        used |= {"second_order"}
    return frozenset(used)


def fields_used(row: Method) -> frozenset[str]:
    """The `SAMConfig` fields that a row of the table uses."""
    ascent, descent = row.classes
    own = hyperparameters(ascent) | hyperparameters(descent)
    return common_fields(ascent, descent, row) | (own.keys() & _FLAT)


def depends_on_method(name: str, old: Method, new: Method) -> bool:
    """Whether a value chosen for the method `old` means something else, or nothing, for `new`."""
    hyper = {field for row in METHODS.values() for kind in row.classes for field in hyperparameters(kind)}
    return name in _METHOD_FIELDS | hyper | old.defaults.keys() | new.defaults.keys() or name not in fields_used(new)
