"""The contenders: the stock Trainer, `SAMTrainer` without perturbation, hand-written loops, every method, combinations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

from ..config import SAMConfig
from ..methods.table import METHODS
from ..update.schedule import Schedule
from .reference_loop import PytorchOptimizerLoop, TwoPassLoop

LONG_RUN = 10_000  # steps; long enough that a schedule's share of perturbed steps has converged


@dataclass(frozen=True)
class Contender:
    """
    One way to take an optimizer step.

    Args:
        name (`str`): Its name in tables and on the command line.
        sam (`SAMConfig`, *optional*): For `SAMTrainer`; None is the stock Trainer.
        loop (`type`, *optional*): A plain PyTorch loop with the update of `sam` instead of `SAMTrainer`.
    """

    name: str
    sam: SAMConfig | None = None
    loop: type[TwoPassLoop] | None = None

    @cached_property
    def share_perturbed(self) -> float:
        """The share of steps that compute a perturbation, in a long run."""
        return sum(self.perturbs(LONG_RUN)) / LONG_RUN

    @property
    def claimed_passes(self) -> float:
        """Forward-backward passes per step according to the configuration, averaged over a long run."""
        schedule = self._schedule(LONG_RUN)
        return sum(schedule.passes(step) for step in range(LONG_RUN)) / LONG_RUN if schedule else 1.0

    def perturbs(self, steps: int, warmup_steps: int = 0) -> list[bool]:
        """Which steps of a run compute a perturbation and so cost `passes_per_step`; carrying one on is free."""
        schedule = self._schedule(steps, warmup_steps)
        return [bool(schedule) and schedule.perturbs(step) and schedule.age(step) == 0 for step in range(steps)]

    def _schedule(self, steps: int, warmup_steps: int = 0) -> Schedule | None:
        return Schedule.resolve(self.sam, steps, warmup_steps) if self.sam and self.sam.rho > 0 else None


STOCK = Contender("trainer")

_COMBINATIONS: dict[str, SAMConfig] = {
    "subset-5": SAMConfig(method="subset", interval=5),  # a quarter of the batch, on every fifth step
    "late-5": SAMConfig(method="late", interval=5),
    "late-subset": SAMConfig(method="late", ascent_fraction=0.25),
    "norm-only-subset": SAMConfig(method="norm-only", ascent_fraction=0.25),
    "late-norm-only-subset": SAMConfig(method="norm-only", ascent_fraction=0.25, start=0.75),
}

CONTENDERS: Mapping[str, Contender] = MappingProxyType(
    {
        contender.name: contender
        for contender in (
            STOCK,
            Contender("rho-0", SAMConfig(rho=0)),
            Contender("hand-loop", SAMConfig(), TwoPassLoop),
            Contender("pytorch-optimizer", SAMConfig(), PytorchOptimizerLoop),
            *(Contender(method, SAMConfig(method=method)) for method in METHODS),
            *(Contender(name, config) for name, config in _COMBINATIONS.items()),
        )
    }
)
