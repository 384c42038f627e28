"""Interleaved timing: all variants take turns in one run, so that fluctuations of the machine affect all of them alike.

Each variant has its own model, optimizer and data loader with the same initial state, as in an ordinary run. To limit
the number of models in memory, variants run in groups; the stock Trainer, the reference for all ratios, is in every
group.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from transformers import Trainer

from .counting import ByteCounter, PassCounter, PeakMemory
from .variants import STOCK, Variant

# Builds a trainer from `stepping.py`, not yet prepared, for a variant and a number of steps.
Build = Callable[[Variant, int], Trainer]
RESAMPLES = 2_000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Counted:
    """
    Counts per step of one variant, averaged over a run.

    Args:
        forward, backward, passes (`float`): Number of examples in forward, backward and whole passes, in units of the
            batch.
        bytes (`float`): Bytes that this process passed to collectives.
        peak_memory (`int`, *optional*): Peak over all steps, in bytes; see [`~hf_sam.benchmark.counting.PeakMemory`].
    """

    forward: float
    backward: float
    passes: float
    bytes: float
    peak_memory: int | None


@dataclass(frozen=True)
class Measurement:
    """
    The measurement of one variant.

    Args:
        variant (`Variant`): The variant.
        counted (`Counted`, *optional*): None if the variant cannot run.
        seconds (`list[float]`): Time of each step after the warm-up.
        perturbed (`list[bool]`): Whether each of these steps was perturbed.
        stock_seconds (`list[float]`): Time of the stock Trainer's corresponding steps, in the same rounds of turns.
        reason (`str`, *optional*): Why the variant cannot run with this model.
    """

    variant: Variant
    counted: Counted | None = None
    seconds: list[float] = field(default_factory=list)
    perturbed: list[bool] = field(default_factory=list)
    stock_seconds: list[float] = field(default_factory=list)
    reason: str | None = None

    def step_seconds(self, quantile: float = 0.5) -> float:
        """A quantile of the step time: the average of those of perturbed and plain steps, weighted by their fractions."""
        values = np.array(self.seconds)
        return sum(weight * float(np.quantile(values[rows], quantile)) for weight, rows in self._kinds())

    def ratio(self) -> float:
        """Median step time relative to that of the stock Trainer's corresponding steps, for each kind of step."""
        return float(self._ratio([rows for _, rows in self._kinds()]))

    def ratio_interval(self, rng: np.random.Generator) -> tuple[float, float]:
        """Percentile bootstrap interval of `ratio`; a step and the corresponding stock step are resampled together."""
        kinds = [rows for _, rows in self._kinds()]
        drawn = [rng.choice(rows, (RESAMPLES, len(rows))) for rows in kinds]
        tail = (1 - CONFIDENCE) / 2
        low, high = np.quantile(self._ratio(drawn), [tail, 1 - tail])
        return float(low), float(high)

    def _ratio(self, kinds: Sequence[np.ndarray]) -> np.ndarray:
        """The ratio over the last axis of each kind's rows, shape `(..., n)`."""
        own, stock = np.array(self.seconds), np.array(self.stock_seconds)
        weights = [weight for weight, _ in self._kinds()]
        return sum(
            weight * np.median(own[rows], axis=-1) / np.median(stock[rows], axis=-1)
            for weight, rows in zip(weights, kinds, strict=True)
        )

    def _kinds(self) -> list[tuple[float, np.ndarray]]:
        """Weights and indices of perturbed and plain steps, for each kind that occurs in a long run."""
        share, perturbed = self.variant.share_perturbed, np.array(self.perturbed)
        kinds = [(share, np.flatnonzero(perturbed)), (1 - share, np.flatnonzero(~perturbed))]
        return [(weight, rows) for weight, rows in kinds if weight > 0]


def measure(
    variants: Sequence[Variant],
    build: Build,
    *,
    steps: int = 40,
    warmup: int = 5,
    block: int = 5,
    at_once: int = 6,
    seed: int = 0,
    progress: Callable[[str, int], None] = lambda what, steps: None,
) -> list[Measurement]:
    """
    Count the passes, bytes and memory of every variant, then time the variants in turns.

    Args:
        variants (`Sequence[Variant]`): The variants; the stock Trainer is always put first.
        build (`Callable`): Builds a variant's trainer for a number of steps, each time with the same model and data.
        steps (`int`, *optional*, defaults to 40): Timed steps of every variant.
        warmup (`int`, *optional*, defaults to 5): Untimed steps before them.
        block (`int`, *optional*, defaults to 5): Steps per turn.
        at_once (`int`, *optional*, defaults to 6): Variants in memory at the same time, including the stock Trainer.
        seed (`int`, *optional*, defaults to 0): Seed of the order of turns.
        progress (`Callable[[str, int], None]`, *optional*): Called after each turn with the variant's name and its
            steps.

    Returns:
        `list[Measurement]`: In the order of `variants`, the stock Trainer first.

    Raises:
        ValueError: A variant would have no timed step of one kind, perturbed or plain, or the stock Trainer cannot
            train this model.
    """
    variants = [STOCK, *(variant for variant in variants if variant != STOCK)]
    for variant in variants:
        _check_kinds(variant, steps, warmup)
    found: dict[str, Counted | str] = {}
    for variant in variants:
        found[variant.name] = count(variant, build)
        progress(variant.name, 1)
        if variant == STOCK and isinstance(found[STOCK.name], str):
            raise ValueError(found[STOCK.name])
    possible = [c for c in variants[1:] if isinstance(found[c.name], Counted)]
    measured: dict[str, Measurement] = {}
    for group in _groups(possible, at_once - 1):
        seconds = _timed([STOCK, *group], build, steps + warmup, block, seed, progress)
        for variant in (STOCK, *group):
            measured.setdefault(
                variant.name,
                Measurement(
                    variant,
                    found[variant.name],
                    seconds[variant.name][warmup:],
                    variant.perturbs(steps + warmup)[warmup:],
                    seconds[STOCK.name][warmup:],
                ),
            )
    return [measured.get(c.name) or Measurement(c, reason=found[c.name]) for c in variants]


def turns(names: Sequence[str], steps: int, block: int, seed: int) -> Iterator[tuple[str, int]]:
    """
    The order of turns, with their numbers of steps: in every round, each variant has one turn, in a new random order.

    The last round takes the remaining steps.
    """
    rng = random.Random(seed)
    for first in range(0, steps, block):
        order = list(names)
        rng.shuffle(order)
        yield from ((name, min(block, steps - first)) for name in order)


def count(variant: Variant, build: Build) -> Counted | str:
    """
    Run a few steps of one variant alone, after one uncounted step, and count their passes, bytes and memory.

    Returns:
        `Counted`, or the reason why the variant cannot run with this model.
    """
    steps = 1 + max(5, (variant.sam.interval or 1) if variant.sam else 1)
    kinds, counts = variant.perturbs(steps)[1:], []
    try:
        with PeakMemory() as memory:
            trainer = build(variant, steps)
            trainer.prepare()
            trainer.take_steps(1)
            memory.from_here(trainer.args.device)
            with PassCounter(trainer) as passes:
                for _ in kinds:
                    before, moved = passes.totals(), ByteCounter()
                    with moved if trainer.args.world_size > 1 else contextlib.nullcontext():
                        trainer.take_steps(1)
                    counts.append([*(passes.totals() - before), moved.bytes])
        trainer.close()
    except ValueError as error:
        return " ".join(str(error).split())
    args = trainer.args
    examples = args.per_device_train_batch_size * args.gradient_accumulation_steps
    table, share = np.array(counts, dtype=float), variant.share_perturbed
    means = sum(
        weight * table[np.array(kinds) == kind].mean(0)
        for weight, kind in ((share, True), (1 - share, False))
        if weight
    )
    return Counted(*(float(value) for value in means[:3] / examples), bytes=float(means[3]), peak_memory=memory.bytes())


def _timed(
    group: Sequence[Variant],
    build: Build,
    steps: int,
    block: int,
    seed: int,
    progress: Callable[[str, int], None],
) -> dict[str, list[float]]:
    """Seconds of every step of the variants in a group, which take turns; the stock Trainer is first."""
    trainers = {variant.name: build(variant, steps) for variant in group}
    for trainer in trainers.values():
        trainer.prepare()
    for name, count in turns(list(trainers), steps, block, seed):
        trainers[name].take_steps(count)
        progress(name, count)
    for trainer in trainers.values():
        trainer.close()
    return {name: trainer.clock.seconds for name, trainer in trainers.items()}


def _groups(variants: Sequence[Variant], size: int) -> Iterator[Sequence[Variant]]:
    """Groups of at most `size` variants and nearly equal size; one empty group if there is only the stock Trainer."""
    number = max(1, -(-len(variants) // size))
    for index in range(number):
        yield variants[index::number]


def _check_kinds(variant: Variant, steps: int, warmup: int) -> None:
    kinds = set(variant.perturbs(steps + warmup)[warmup:])
    share = variant.share_perturbed
    if (share > 0 and True not in kinds) or (share < 1 and False not in kinds):
        raise ValueError(
            f"steps={steps} after warmup={warmup} include no {'perturbed' if True not in kinds else 'plain'} step of "
            f"{variant.name}. Give more steps, or remove {variant.name} from methods."
        )
