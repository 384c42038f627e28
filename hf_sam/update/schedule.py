"""When and how far: which optimizer steps perturb, and by how much."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..config import SAMConfig


@dataclass(frozen=True)
class Schedule:
    """`SAMConfig`'s `interval`, `start`, `end`, `rho_schedule` resolved against the steps that are really run.

    Args:
        config (`SAMConfig`): The user's choices.
        start (`int`): First step that may perturb.
        end (`int`): First step that no longer does.
    """

    config: SAMConfig
    start: int
    end: int

    @classmethod
    def resolve(cls, config: SAMConfig, max_steps: int, warmup_steps: int = 0) -> Schedule:
        """Fractions become steps of a run of `max_steps`; momentum is trusted only after `warmup_steps`.

        Raises:
            ValueError: No step of this run would perturb.
        """
        start, end = (
            moment if isinstance(moment, int) else round(moment * max_steps) for moment in (config.start, config.end)
        )
        if config.row.ascent == "momentum":
            start = max(start, warmup_steps)
        if config.rho > 0 and not start < min(end, max_steps):
            raise ValueError(
                f"start={config.start} and end={config.end} leave no step to perturb in a run of {max_steps} steps "
                f"(from step {start} to {min(end, max_steps)}). Lower start, raise end, or train for longer."
            )
        return cls(config, start, end)

    def perturbs(self, step: int) -> bool:
        """Whether optimizer step `step`, counted from 0, takes the sharpness-aware update."""
        return self.is_inside(step) and (self.age(step) == 0 or self.config.row.ascent == "carried")

    def age(self, step: int) -> int:
        """Steps since the last one in which the method looked where to climb; 0 in such a step."""
        return (step - self.start) % (self.config.interval or 1)

    def passes(self, step: int) -> float:
        """Forward-backward passes over the batch in optimizer step `step`."""
        looks = self.perturbs(step) and self.age(step) == 0
        return self.config.passes_per_step if looks else 1.0

    def is_inside(self, step: int) -> bool:
        """Whether `step` lies between start and end, perturbed or between two steps that are."""
        return self.config.rho > 0 and self.start <= step < self.end

    def rho(self, step: int, lr_fraction: float = 1.0) -> float:
        """Size of the perturbation at `step`, always in [rho_min, rho].

        Args:
            step (`int`): Optimizer step, counted from 0.
            lr_fraction (`float`): Learning rate relative to its peak, for `rho_schedule="lr"` (Zhuang et al. 2022,
                arXiv 2203.08065, Section 4.3).
        """
        config = self.config
        if config.rho_schedule == "constant":
            return config.rho
        progress = (step - self.start) / max(1, self.end - 1 - self.start)
        share = {
            "linear": progress,
            "cosine": (1 - math.cos(math.pi * progress)) / 2,
            "lr": lr_fraction,
        }[config.rho_schedule]
        return config.rho_min + (config.rho - config.rho_min) * min(max(share, 0.0), 1.0)
