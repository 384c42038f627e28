"""The variants to compare: the stock Trainer, `SAMTrainer` with rho=0, hand-written loops, all methods, combinations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

from ..config import SAMConfig
from ..methods.table import METHODS
from ..update.schedule import Schedule
from .reference_loop import PytorchOptimizerLoop, TwoPassLoop

LONG_RUN = 10_000  # steps; long enough for a schedule's fraction of perturbed steps to converge


@dataclass(frozen=True)
class Variant:
    """
    One way to take an optimizer step.

    Args:
        name (`str`): The name in tables and on the command line.
        sam (`SAMConfig`, *optional*): Configuration of `SAMTrainer`; None is the stock Trainer.
        loop (`type`, *optional*): A plain PyTorch loop that performs the update of `sam`, instead of `SAMTrainer`.
    """

    name: str
    sam: SAMConfig | None = None
    loop: type[TwoPassLoop] | None = None

    @cached_property
    def share_perturbed(self) -> float:
        """The fraction of steps that compute a perturbation, in a long run."""
        return sum(self.perturbs(LONG_RUN)) / LONG_RUN

    @property
    def expected_passes(self) -> float:
        """Forward-backward passes per step according to the configuration, on average over a long run."""
        schedule = self._schedule(LONG_RUN)
        return sum(schedule.passes(step) for step in range(LONG_RUN)) / LONG_RUN if schedule else 1.0

    def perturbs(self, steps: int, warmup_steps: int = 0) -> list[bool]:
        """Which steps of a run compute a perturbation, and so cost `passes_per_step`; reusing one is free."""
        schedule = self._schedule(steps, warmup_steps)
        return [bool(schedule) and schedule.perturbs(step) and schedule.age(step) == 0 for step in range(steps)]

    def _schedule(self, steps: int, warmup_steps: int = 0) -> Schedule | None:
        return Schedule.resolve(self.sam, steps, warmup_steps) if self.sam and self.sam.rho > 0 else None


STOCK = Variant("trainer")

_COMBINATIONS: dict[str, SAMConfig] = {
    "subset-5": SAMConfig(method="subset", interval=5),  # on a quarter of the batch, every 5 steps
    "late-5": SAMConfig(method="late", interval=5),
    "late-subset": SAMConfig(method="late", ascent_fraction=0.25),
    "norm-only-subset": SAMConfig(method="norm-only", ascent_fraction=0.25),
    "late-norm-only-subset": SAMConfig(method="norm-only", ascent_fraction=0.25, start=0.75),
}

VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {
        variant.name: variant
        for variant in (
            STOCK,
            Variant("rho-0", SAMConfig(rho=0)),
            Variant("hand-loop", SAMConfig(), TwoPassLoop),
            Variant("pytorch-optimizer", SAMConfig(), PytorchOptimizerLoop),
            *(Variant(method, SAMConfig(method=method)) for method in METHODS),
            *(Variant(name, config) for name, config in _COMBINATIONS.items()),
        )
    }
)
