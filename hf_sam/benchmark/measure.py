"""Interleaved timing: all contenders take turns in one run, so that a machine that slows down slows all of them.

Each contender has its own model, optimizer and data loader with the same initial state, as in an ordinary run. So that
twenty copies of a large model need not be in memory at once, contenders run in groups, and the stock Trainer, against
which all are measured, is in every group.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from transformers import Trainer

from .counting import ByteCounter, PassCounter, PeakMemory
from .variants import STOCK, Contender

# From a contender and its number of steps to a trainer of `stepping.py` that is not yet prepared.
Build = Callable[[Contender, int], Trainer]
RESAMPLES = 2_000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Counted:
    """
    What one contender does per step, averaged over a run.

    Args:
        forward, backward, passes (`float`): Examples that went through the model in this way, in units of the step's batch.
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
    The measurement of one contender.

    Args:
        contender (`Contender`): The contender.
        counted (`Counted`, *optional*): None if the contender cannot run.
        seconds (`list[float]`): Time of each step after the warm-up.
        perturbed (`list[bool]`): Whether each of these steps was perturbed.
        stock_seconds (`list[float]`): Time of the stock Trainer's corresponding step, in the same turns.
        reason (`str`, *optional*): Why the contender cannot run with this model.
    """

    contender: Contender
    counted: Counted | None = None
    seconds: list[float] = field(default_factory=list)
    perturbed: list[bool] = field(default_factory=list)
    stock_seconds: list[float] = field(default_factory=list)
    reason: str | None = None

    def step_seconds(self, quantile: float = 0.5) -> float:
        """A quantile of the step time, over perturbed and plain steps weighted by the schedule."""
        values = np.array(self.seconds)
        return sum(weight * float(np.quantile(values[rows], quantile)) for weight, rows in self._kinds())

    def ratio(self) -> float:
        """Step time relative to the stock Trainer: medians, each kind of step against the stock Trainer in the same turns."""
        return float(self._ratio([rows for _, rows in self._kinds()]))

    def ratio_interval(self, rng: np.random.Generator) -> tuple[float, float]:
        """Percentile bootstrap interval of `ratio`; the times of a step and of its stock counterpart are drawn together."""
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
        """Weights and rows of perturbed and of plain steps, for each kind that a long run has."""
        share, perturbed = self.contender.share_perturbed, np.array(self.perturbed)
        kinds = [(share, np.flatnonzero(perturbed)), (1 - share, np.flatnonzero(~perturbed))]
        return [(weight, rows) for weight, rows in kinds if weight > 0]


def measure(
    contenders: Sequence[Contender],
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
    Count what every contender does, then time the contenders in turns.

    Args:
        contenders (`Sequence[Contender]`): The contenders; the stock Trainer is always added as the first.
        build (`Callable`): Builds a contender's trainer for a number of steps, with the same model and data each time.
        steps (`int`, *optional*, defaults to 40): Timed steps of every contender.
        warmup (`int`, *optional*, defaults to 5): Earlier steps that are not timed.
        block (`int`, *optional*, defaults to 5): Steps per turn.
        at_once (`int`, *optional*, defaults to 6): Contenders in memory at the same time, including the stock Trainer.
        seed (`int`, *optional*, defaults to 0): Seed of the order of turns.
        progress (`Callable[[str, int], None]`, *optional*): Called after each turn with the contender's name and its steps.

    Returns:
        `list[Measurement]`: In the order of `contenders`, the stock Trainer first.

    Raises:
        ValueError: A contender would have no timed step of a kind in its schedule, or the stock Trainer cannot train
            this model.
    """
    contenders = [STOCK, *(contender for contender in contenders if contender != STOCK)]
    for contender in contenders:
        _check_kinds(contender, steps, warmup)
    found: dict[str, Counted | str] = {}
    for contender in contenders:
        found[contender.name] = count(contender, build)
        progress(contender.name, 1)
        if contender == STOCK and isinstance(found[STOCK.name], str):
            raise ValueError(found[STOCK.name])
    possible = [c for c in contenders[1:] if isinstance(found[c.name], Counted)]
    measured: dict[str, Measurement] = {}
    for group in _groups(possible, at_once - 1):
        seconds = _timed([STOCK, *group], build, steps + warmup, block, seed, progress)
        for contender in (STOCK, *group):
            measured.setdefault(
                contender.name,
                Measurement(
                    contender,
                    found[contender.name],
                    seconds[contender.name][warmup:],
                    contender.perturbs(steps + warmup)[warmup:],
                    seconds[STOCK.name][warmup:],
                ),
            )
    return [measured.get(c.name) or Measurement(c, reason=found[c.name]) for c in contenders]


def turns(names: Sequence[str], steps: int, block: int, seed: int) -> Iterator[tuple[str, int]]:
    """
    The turns and their numbers of steps: every contender has one turn per round, in a new random order.

    The last round takes the remaining steps.
    """
    rng = random.Random(seed)
    for first in range(0, steps, block):
        order = list(names)
        rng.shuffle(order)
        yield from ((name, min(block, steps - first)) for name in order)


def count(contender: Contender, build: Build) -> Counted | str:
    """
    Run a few steps of one contender alone, after one uncounted step, and count what they do.

    Returns:
        `Counted`, or the reason why the contender cannot run with this model.
    """
    steps = 1 + max(5, (contender.sam.interval or 1) if contender.sam else 1)
    kinds, counts = contender.perturbs(steps)[1:], []
    try:
        with PeakMemory() as memory:
            trainer = build(contender, steps)
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
    table, share = np.array(counts, dtype=float), contender.share_perturbed
    means = sum(
        weight * table[np.array(kinds) == kind].mean(0)
        for weight, kind in ((share, True), (1 - share, False))
        if weight
    )
    return Counted(*(float(value) for value in means[:3] / examples), bytes=float(means[3]), peak_memory=memory.bytes())


def _timed(
    group: Sequence[Contender],
    build: Build,
    steps: int,
    block: int,
    seed: int,
    progress: Callable[[str, int], None],
) -> dict[str, list[float]]:
    """Seconds of every step of every contender in a group, which take turns; the stock Trainer is first."""
    trainers = {contender.name: build(contender, steps) for contender in group}
    for trainer in trainers.values():
        trainer.prepare()
    for name, count in turns(list(trainers), steps, block, seed):
        trainers[name].take_steps(count)
        progress(name, count)
    for trainer in trainers.values():
        trainer.close()
    return {name: trainer.clock.seconds for name, trainer in trainers.items()}


def _groups(contenders: Sequence[Contender], size: int) -> Iterator[Sequence[Contender]]:
    """Parts of at most `size` and nearly equal size; one empty part if there is only the stock Trainer."""
    number = max(1, -(-len(contenders) // size))
    for index in range(number):
        yield contenders[index::number]


def _check_kinds(contender: Contender, steps: int, warmup: int) -> None:
    kinds = set(contender.perturbs(steps + warmup)[warmup:])
    share = contender.share_perturbed
    if (share > 0 and True not in kinds) or (share < 1 and False not in kinds):
        raise ValueError(
            f"steps={steps} after warmup={warmup} hold no {'perturbed' if True not in kinds else 'plain'} step of "
            f"{contender.name}: give more steps, or remove {contender.name} from methods."
        )
