"""Evaluation of a checkpoint after post-training changes: quantization, pruning, weight noise, merging."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Generic, TypeVar

from torch import nn

from .libraries import LIBRARIES, loaded_by_library
from .merging import State, check_same_shapes, interpolate, mergeable_state, task_arithmetic
from .noise import noisy
from .pruning import pruned
from .quantization import dynamic_int8, quantized
from .weights import replaced, weight_matrices

NONE = "none"
FAMILIES = ("quantize", "dynamic_int8", "prune", "noise")
T = TypeVar("T")


@dataclass
class SurvivalConfig:
    """
    The changes to apply to a checkpoint before it is evaluated again.

    Args:
        treatments (`list[str]`, *optional*):
            Any of `"quantize"`, `"dynamic_int8"`, `"prune"`, `"noise"`; all of them by default.
        bits (`list[int]`, *optional*, defaults to `[8, 4, 3, 2]`):
            Bit widths of round-to-nearest weight quantization.
        group_sizes (`list[int]`, *optional*, defaults to `[0, 64]`):
            Number of inputs that share a scale; 0 means one scale per output channel.
        pruned_shares (`list[float]`, *optional*):
            Fractions of each weight matrix to set to zero, smallest magnitudes first.
        noise_sizes (`list[float]`, *optional*):
            Standard deviations of Gaussian noise, relative to that of each weight matrix.
        noise_draws (`int`, *optional*, defaults to 3):
            Number of noise draws at each size.
        libraries (`list[str]`, *optional*):
            Any of `"torchao-int8"`, `"torchao-int4"`, `"bitsandbytes-nf4"`, through transformers' quantization
            configurations.
        merge_with (`list[str]`, *optional*):
            Checkpoints fine-tuned from the same start; each evaluated checkpoint is merged with each of them.
        merge_start (`str`, *optional*):
            The checkpoint that all of them were fine-tuned from, for task arithmetic.
        merge_points (`list[float]`, *optional*, defaults to `[0.25, 0.5, 0.75]`):
            Interpolation weights of the other checkpoint; 0.5 is the average.
        merge_scales (`list[float]`, *optional*, defaults to `[0.3, 0.7, 1.0]`):
            Scaling factors of the summed task vectors.
        alter_embeddings, alter_head (`bool`, *optional*, default to `False`):
            Also quantize, prune and add noise to these.
        weight_noise_seed (`int`, *optional*, defaults to 0):
            Seed of the noise.
        max_examples (`int`, *optional*, defaults to 1000):
            Maximum number of test examples of each evaluation, sampled once; 0 means all.

    Raises:
        ValueError: A treatment is unknown, or a number is out of range.
    """

    treatments: list[str] = field(default_factory=lambda: list(FAMILIES))
    bits: list[int] = field(default_factory=lambda: [8, 4, 3, 2])
    group_sizes: list[int] = field(default_factory=lambda: [0, 64])
    pruned_shares: list[float] = field(default_factory=lambda: [0.3, 0.4, 0.5, 0.6, 0.7])
    noise_sizes: list[float] = field(default_factory=lambda: [0.1, 0.2, 0.3, 0.5])
    noise_draws: int = 3
    libraries: list[str] = field(default_factory=list)
    merge_with: list[str] = field(default_factory=list)
    merge_start: str | None = None
    merge_points: list[float] = field(default_factory=lambda: [0.25, 0.5, 0.75])
    merge_scales: list[float] = field(default_factory=lambda: [0.3, 0.7, 1.0])
    alter_embeddings: bool = False
    alter_head: bool = False
    weight_noise_seed: int = 0
    max_examples: int = 1000

    def __post_init__(self):
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.default_factory is not MISSING and not isinstance(value, list):
                raise ValueError(f"{entry.name}={value!r} must be a list.")
        for name, allowed in (("treatments", FAMILIES), ("libraries", tuple(LIBRARIES))):
            unknown = [value for value in getattr(self, name) if value not in allowed]
            if unknown:
                raise ValueError(f"{name}: {unknown[0]!r} is unknown. Allowed: {', '.join(allowed)}.")
        for name, accepts, words in (
            ("bits", lambda value: type(value) is int and 1 <= value <= 16, "a whole number from 1 to 16"),
            (
                "group_sizes",
                lambda value: type(value) is int and value >= 0,
                "a whole number, at least 0 (0: one scale per output channel)",
            ),
            ("pruned_shares", lambda value: 0 < value < 1, "in (0, 1)"),
            ("noise_sizes", lambda value: value > 0, "above 0"),
            ("merge_points", lambda value: 0 <= value <= 1, "in [0, 1]"),
        ):
            wrong = [value for value in getattr(self, name) if not isinstance(value, int | float) or not accepts(value)]
            if wrong:
                raise ValueError(f"{name}: {wrong[0]!r} must be {words}.")
        for name, least, words in (("noise_draws", 1, "at least 1"), ("max_examples", 0, "at least 0 (0: all)")):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name}={value!r} must be a whole number, {words}.")
        if self.merge_start is not None and not self.merge_with:
            raise ValueError("merge_start is used only with merge_with.")


@dataclass(frozen=True)
class Treatment:
    """
    One change to a checkpoint, such as quantization to 4 bits.

    Args:
        kind (`str`): The kind of change, such as `"bits per channel"`; treatments of one kind form one curve.
        level (`float`, *optional*): Its strength; `None` if it has no levels.
        draw (`int`, *optional*, defaults to 0): Index of the random draw.
    """

    kind: str
    level: float | None = None
    draw: int = 0

    @property
    def label(self) -> str:
        """A description for reports, without the draw."""
        if self.level is None:
            return {NONE: "as trained", "dynamic int8": "dynamic int8"}.get(self.kind, self.kind)
        if self.kind.startswith("bits"):
            return f"{self.level:g} {self.kind}"
        if self.kind == "pruned":
            return f"{100 * self.level:g} % pruned"
        if self.kind == "noise":
            return f"noise of {self.level:g} sd"
        if self.kind.startswith("merged with") and self.level == 0.5:
            return f"{self.kind}, average"
        return f"{self.kind}, {self.level:g}"


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """The result of `evaluate` under a treatment, or the reason why the treatment is not available."""

    treatment: Treatment
    result: T | None
    problem: str | None = None


def evaluate_treatments(
    model: nn.Module,
    evaluate: Callable[[nn.Module], T],
    config: SurvivalConfig,
    others: Mapping[str, State] | None = None,
    start: State | None = None,
) -> Iterator[Outcome[T]]:
    """
    Evaluate the model as trained, then under each treatment. The weights are restored bit for bit after each one.

    Args:
        model (`nn.Module`): A model in evaluation mode, with adapters merged.
        evaluate (`Callable[[nn.Module], T]`): The evaluation of the altered model.
        config (`SurvivalConfig`): The treatments.
        others (`Mapping[str, State]`, *optional*): The `mergeable_state` of each checkpoint to merge with, by name.
        start (`State`, *optional*): The `mergeable_state` of the checkpoint that all were fine-tuned from.

    Yields:
        `Outcome`: As trained first. A quantization that this machine or model does not support yields a `problem`.

    Raises:
        ValueError: A checkpoint to merge with has a different architecture.
    """
    own = mergeable_state(model) if others else {}
    for name, other in (others or {}).items():
        check_same_shapes(own, other, name)
    if start is not None:
        check_same_shapes(own, start, "merge_start")
    yield Outcome(Treatment(NONE), evaluate(model))
    for treatment, altered in _treatments(model, config, others or {}, start):
        try:
            with altered() as other_model:
                result = evaluate(other_model)
        except Exception as error:  # a missing kernel, or a layer that torch cannot quantize
            if not _is_optional(treatment):
                raise
            yield Outcome(treatment, None, f"{type(error).__name__}: {' '.join(str(error).split())}"[:200])
        else:
            yield Outcome(treatment, result)


def _is_optional(treatment: Treatment) -> bool:
    return treatment.kind in LIBRARIES or treatment.kind == "dynamic int8"


def _treatments(
    model: nn.Module, config: SurvivalConfig, others: Mapping[str, State], start: State | None
) -> Iterator[tuple[Treatment, Callable[[], AbstractContextManager[nn.Module]]]]:
    """Each treatment, with a function that returns a context manager of the altered model."""
    matrices = weight_matrices(model, config.alter_embeddings, config.alter_head)

    def inside(values: Callable[[], Any]) -> Callable[[], AbstractContextManager[nn.Module]]:
        return lambda: replaced(model, values())

    if "quantize" in config.treatments:
        for size in config.group_sizes:
            kind = f"bits per group of {size}" if size else "bits per channel"
            for bits in config.bits:
                yield (
                    Treatment(kind, bits),
                    inside(lambda bits=bits, size=size: quantized(matrices, bits, size or None)),
                )
    if "dynamic_int8" in config.treatments:
        yield Treatment("dynamic int8"), lambda: nullcontext(dynamic_int8(model, matrices))
    for name in config.libraries:
        yield Treatment(name), lambda name=name: loaded_by_library(model, name, matrices)
    if "prune" in config.treatments:
        for share in config.pruned_shares:
            yield Treatment("pruned", share), inside(lambda share=share: pruned(matrices, share))
    if "noise" in config.treatments:
        for size in config.noise_sizes:
            for draw in range(config.noise_draws):
                seed = config.weight_noise_seed + draw
                yield (
                    Treatment("noise", size, draw),
                    inside(lambda size=size, seed=seed: noisy(matrices, size, seed)),
                )
    for name, other in others.items():
        for point in config.merge_points:
            yield (
                Treatment(f"merged with {name}", point),
                inside(lambda other=other, point=point: interpolate(mergeable_state(model), other, point)),
            )
        for scale in config.merge_scales if start is not None else ():
            yield (
                Treatment(f"task arithmetic with {name}", scale),
                inside(lambda other=other, scale=scale: task_arithmetic(start, [mergeable_state(model), other], scale)),
            )
