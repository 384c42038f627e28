"""The interface of a method: an `Ascent` says where to perturb, a `Descent` what the optimizer gets.

Both are frozen dataclasses whose fields are their hyperparameters. The package does the rest: it accumulates and
synchronizes gradients, perturbs and restores the weights, saves `memory` in checkpoints, and derives from `needs` what
a step costs and which engines cannot run it. `docs/write_your_own.md` shows how to write one from a formula.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import Flag, auto
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch

from .fields import check_fields

if TYPE_CHECKING:
    import random

    from torch import Tensor, nn

    from ..update.vector import Vector

# A backward pass costs about twice a forward pass; a Hessian-vector product costs about two forward-backward passes.
FORWARD_SHARE = 1 / 3
HESSIAN_PASSES = 2.0


class Needs(Flag):
    """What a method needs from a step; each engine states which of these it lacks, and why."""

    NOTHING = 0
    # Of an ascent
    GRADIENT = auto()  # the gradient at w, from a separate pass
    WHOLE_STEP = auto()  # the gradient of the whole step, not of one micro-batch
    WHOLE_TENSORS = auto()  # statistics of whole tensors, which cannot be computed from a shard
    OPTIMIZER_STATE = auto()  # the base optimizer's state, such as its momentum
    NOISE = auto()  # random numbers that differ between ranks
    # Of a descent
    CLEAN_GRADIENT = auto()  # g in addition to g_s: one more copy of the weights
    SUBSET = auto()  # the loss of each example, and passes over part of a batch
    LOGITS = auto()  # the loss as a function of the model's logits
    HVP = auto()  # a Hessian-vector product
    # Derived from what a class overrides
    STEP_GRADIENT = auto()  # `after`: the gradient that the optimizer is about to step along
    ATTACHMENT = auto()  # `attach`: extra modules attached to the model
    OWN_GRADIENT = auto()  # `gradient`, `between`, `may_skip`: the method builds the gradient for the optimizer
    UNEVEN_PASSES = auto()  # `perturbed_examples`: the number of passes differs between ranks


class Step(Protocol):
    """What a method knows about the optimizer step it runs in.

    Attributes:
        index (`int`): Number of optimizer steps before this one.
        progress (`float`): Fraction of the run that is done, in [0, 1).
        rho (`float`): Size of the perturbation: the scheduled rho, divided by the number of inner ascent steps.
        share (`float`): Fraction of the step's examples that `g` is the gradient of: 1, or less with `scope="micro"` under
            accumulation and with `m`. The losses of all parts sum to that of the step.
        lr (`float`): The largest learning rate of the optimizer's parameter groups.
        age (`int`): Steps since the last one that was due under `interval`; 0 in a due step.
        is_first (`bool`): Whether the optimizer has not stepped yet since the run started or was resumed.
        weights (`Vector`): `w` over the perturbed parameters; do not change it in place.
        memory (`MutableMapping[str, Vector]`): State that the method keeps from step to step, under its declared names.
            In-place operations never overwrite a Vector that was read from it.
        generator (`torch.Generator`): Random numbers that depend only on seed, step, rank and micro-batch.
        shared_random (`random.Random`): Random numbers that are the same on every rank and in every micro-batch of the
            step.
        attached (`Any`): What `Ascent.attach` returned.
        loss_scale (`Tensor` or `float`): The factor by which gradients outside Vectors are scaled up under fp16.
        optimizer_name (`str`): The optimizer's class, for error messages.
    """

    index: int
    progress: float
    rho: float
    share: float
    lr: float
    age: int
    is_first: bool
    weights: Vector
    memory: MutableMapping[str, Vector]
    generator: torch.Generator
    shared_random: random.Random
    attached: Any
    loss_scale: Tensor | float
    optimizer_name: str

    def optimizer_state(self, *names: str) -> Vector | None:
        """The first of the states `names` that the optimizer keeps for every perturbed parameter, or None."""

    def hessian_product(self, vector: Vector) -> Vector:
        """The Hessian-vector product at `w`, over all trainable parameters; only with `Needs.HVP`."""

    def record(self, **values: Tensor | float) -> None:
        """Log scalars under names that are listed in `Telemetry`."""


@dataclass(frozen=True)
class Ascent:
    """Where to perturb. Subclass it, write `eps`, and declare what `eps` needs.

    Class attributes:
        needs (`Needs`): `GRADIENT` by default; without it, `eps` gets `g=None` and the step has one pass.
        memory (`tuple[str, ...]`): Names under which `step.memory` keeps Vectors from step to step. They are saved in
            checkpoints, and each counts as a copy of the perturbed weights.
        scalars (`tuple[str, ...]`): The same for 0-dim tensors.
        ascent_steps (`int`): How often `eps` is called; each additional call costs a pass at the perturbed weights.
        may_skip (`bool`): `eps` may return None in some steps, and not on every rank in the same ones.
        perturbs_between (`bool`): Under `interval`, also perturb the steps in between, without an ascent pass.
        after_warmup (`bool`): Do not perturb while the learning rate warms up.
        logs_cosine (`bool`): Keep a copy of `g` in steps that log, unless `gradient_in` can recover it.
    """

    needs: ClassVar[Needs] = Needs.GRADIENT
    memory: ClassVar[tuple[str, ...]] = ()
    scalars: ClassVar[tuple[str, ...]] = ()
    ascent_steps: ClassVar[int] = 1
    may_skip: ClassVar[bool] = False
    perturbs_between: ClassVar[bool] = False
    after_warmup: ClassVar[bool] = False
    logs_cosine: ClassVar[bool] = True

    def __post_init__(self):
        check_fields(self)

    def eps(self, g: Vector | None, step: Step) -> Vector | None:
        """The perturbation, over the perturbed parameters or some of them.

        Args:
            g (`Vector`, *optional*): The gradient at `w` over the perturbed parameters, unscaled. You may overwrite it.
                None without `Needs.GRADIENT`, and in a step between two due ones.
            step (`Step`): The current step; `step.rho` is the requested size.

        Returns:
            `Vector`, or None to skip the perturbation in this step. If `g` or the result is not finite, nothing is
            perturbed.
        """
        raise NotImplementedError(f"{type(self).__name__} must define eps(g, step).")

    def after(self, gradient: Vector, step: Step) -> None:
        """Update `step.memory` from the gradient that the optimizer will step along; called before clipping."""

    def radius(self, step: Step) -> float:
        """The size of the perturbation, for the log: `step.rho` unless the method changes it."""
        return step.rho

    def ready(self, step: Step) -> bool:
        """Whether this step's perturbation is known without an ascent pass; called in steps between two due ones."""
        return not self.needs & Needs.GRADIENT

    def parameters(self, names: Sequence[str], step: Step) -> Sequence[str]:
        """Of the perturbed parameters' `names`, those whose gradient the ascent pass must compute."""
        return names

    def examples(self, inputs: Mapping[str, Any], step: Step) -> Tensor | None:
        """Indices, shape `(k,)`, of the examples that the ascent pass sees; None for all of them."""
        return None

    def perturbed_examples(self, inputs: Mapping[str, Any], step: Step) -> Tensor | None:
        """Indices of the examples whose loss is taken at `w + eps`; that of the others is taken at `w`. None for all.

        A class that overrides this is perturbed in each micro-batch, along the gradient of those examples alone. It
        needs two fields: `tail_weight`, which multiplies their loss, and `part`, the name of a batch entry that is not
        an argument of the model, or None.
        """
        return None

    def resolved(self, train_dataset: Any) -> Ascent:
        """Return the ascent, completed with what it needs from the training data; called once when a run starts."""
        return self

    def attach(self, model: nn.Module, seed: int) -> Any:
        """Attach extra modules to the model for one run.

        The returned object needs the methods `state_dict`, `load_state_dict` and `remove`.
        """
        return None

    def applied(self, step: Step) -> AbstractContextManager:
        """A context around the passes at the perturbed weights, for a perturbation that is not a Vector."""
        return contextlib.nullcontext()

    def gradient_in(self, displacement: Tensor) -> Tensor | None:
        """Recover `g` up to a factor from the actual displacement of one tensor, which saves a copy of `g`."""
        return None


@dataclass(frozen=True)
class Descent:
    """What the optimizer gets: by default `g_s`, the gradient at `w + eps`.

    Class attributes:
        needs (`Needs`): `CLEAN_GRADIENT` to see `g` in `gradient`.
        memory (`tuple[str, ...]`): As in `Ascent`.
    """

    needs: ClassVar[Needs] = Needs.NOTHING
    memory: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self):
        check_fields(self)

    @property
    def extra_passes(self) -> float:
        """Forward-backward passes over the batch in addition to the one at the perturbed weights; may be negative."""
        return 0.0

    def gradient(self, g: Vector | None, g_s: Vector, step: Step) -> Vector:
        """The gradient for the optimizer, over all trainable parameters, from `g` at `w` and `g_s` at `w + eps`.

        Both are unscaled, and you may overwrite them. `g` is None without `Needs.CLEAN_GRADIENT`. If each rank has its
        own perturbation, they are this rank's gradients, and the package averages the results over ranks.
        """
        return g_s

    def between(self, g: Vector, step: Step) -> Vector:
        """The gradient for the optimizer in a step between two due ones, given the gradient of its only pass."""
        return g

    def examples(self, before: Tensor, after: Tensor) -> Tensor | None:
        """Indices of the examples to descend on, given the loss of each at `w` and at `w + eps`, shape `(batch,)`.

        Only with `Needs.SUBSET`; None for all.
        """
        return None

    def keep(self, loss: Tensor, logits: Tensor) -> Any:
        """Return what `loss` needs from the clean pass; only with `Needs.LOGITS`."""
        return None

    def loss(self, loss: Tensor, logits: Tensor, kept: Any) -> Tensor:
        """The loss to descend on, at `w + eps`; only with `Needs.LOGITS`."""
        return loss


@dataclass(frozen=True)
class Method:
    """One row of the table: a published method as an ascent, a descent, and defaults.

    Args:
        name (`str`): The name in `SAMConfig(method=...)`.
        paper (`str`): Authors, year and arXiv number.
        summary (`str`): The update in one sentence.
        ascent (`type[Ascent]`): Where to perturb.
        descent (`type[Descent]`): What the optimizer gets.
        defaults (`Mapping[str, Any]`): `SAMConfig` fields with a different default for this method.
        rho_is_from_scratch (`bool`): Whether the paper chose the default rho for training from scratch.
    """

    name: str
    paper: str
    summary: str
    ascent: type[Ascent]
    descent: type[Descent] = Descent
    defaults: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    rho_is_from_scratch: bool = False

    @property
    def classes(self) -> tuple[type[Ascent], type[Descent]]:
        """The ascent and the descent."""
        return self.ascent, self.descent


def overrides(part: Ascent | Descent | type, name: str) -> bool:
    """Whether a class overrides the attribute `name` of `Ascent` or `Descent`."""
    return _overrides(part if isinstance(part, type) else type(part), name)


@functools.cache
def _overrides(kind: type, name: str) -> bool:
    base = Ascent if issubclass(kind, Ascent) else Descent
    return getattr(kind, name) is not getattr(base, name)


def needs_of(ascent: Ascent | type, descent: Descent | type) -> Needs:
    """What a method needs: what it declares, and what follows from what it overrides."""
    needs = ascent.needs | descent.needs
    if combines(descent) or overrides(descent, "between") or descent.needs:
        needs |= Needs.GRADIENT  # a pass at w, even for an ascent that does not need one
    if overrides(ascent, "after"):
        needs |= Needs.STEP_GRADIENT
    if overrides(ascent, "attach"):
        needs |= Needs.ATTACHMENT
    if overrides(descent, "between"):
        needs |= Needs.WHOLE_STEP
    if overrides(descent, "gradient") or overrides(descent, "between") or ascent.may_skip:
        needs |= Needs.OWN_GRADIENT
    if overrides(ascent, "perturbed_examples"):
        needs |= Needs.UNEVEN_PASSES
    return needs


def combines(descent: Descent | type) -> bool:
    """Whether the descent builds its own gradient from `g_s`."""
    return overrides(descent, "gradient")


def copies_for_cosine(ascent: Ascent) -> bool:
    """Whether a step that logs copies `g` for its cosine with `g_s`, because `g` cannot be recovered from `eps`."""
    return ascent.logs_cosine and bool(ascent.needs & Needs.GRADIENT) and ascent.gradient_in(torch.ones(1)) is None


def copies_of(ascent: Ascent, descent: Descent) -> int:
    """Copies of the perturbed weights beyond what the stock Trainer holds, at the peak of a step that logs.

    One copy holds the weights to restore, and each name in `memory` adds one. Another holds `g` if it is kept for the
    descent or for the cosine between `g` and `g_s`.
    """
    if needs_of(ascent, descent) & Needs.ATTACHMENT:
        return 0
    keeps_gradient = bool(descent.needs & Needs.CLEAN_GRADIENT) or copies_for_cosine(ascent)
    return 1 + len(ascent.memory) + len(descent.memory) + keeps_gradient
