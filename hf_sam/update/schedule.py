"""Which optimizer steps are perturbed, and by how much."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from ..config import SAMConfig

# Number of steps at which a learning rate schedule is evaluated to find its peak.
_LR_SAMPLES = 1000


class Kind(Enum):
    """The kinds of optimizer steps."""

    PLAIN = "the stock step"
    BETWEEN = "one pass at w; the descent modifies its gradient"
    ONE_PASS = "one pass, at w + eps"
    TWO_PASSES = "a pass at w, then one at w + eps"


@dataclass(frozen=True)
class Schedule:
    """The schedule of a `SAMConfig` (`interval`, `start`, `end`, `rho_schedule`) for a given number of steps.

    Args:
        config (`SAMConfig`): The user's choices.
        start (`int`): First step that may be perturbed.
        end (`int`): End of the perturbed range, exclusive.
    """

    config: SAMConfig
    start: int
    end: int

    @classmethod
    def resolve(cls, config: SAMConfig, max_steps: int, warmup_steps: int = 0) -> Schedule:
        """Convert fractions to steps of a run of `max_steps`; ascents with `after_warmup` start after `warmup_steps`.

        Raises:
            ValueError: No step of this run would be perturbed.
        """
        start, end = (
            moment if isinstance(moment, int) else round(moment * max_steps) for moment in (config.start, config.end)
        )
        if config.parts.ascent.after_warmup:
            start = max(start, warmup_steps)
        if config.rho > 0 and not start < min(end, max_steps):
            raise ValueError(
                f"start={config.start} and end={config.end} leave no step to perturb in a run of {max_steps} steps "
                f"(from step {start} to {min(end, max_steps)}). Lower start, raise end, or train longer."
            )
        return cls(config, start, end)

    def perturbs(self, step: int) -> bool:
        """Whether optimizer step `step`, counted from 0, takes the sharpness-aware update."""
        return self.is_due(step) or (self.is_inside(step) and self.config.parts.ascent.perturbs_between)

    def is_due(self, step: int) -> bool:
        """Whether `step` lies between start and end and is a multiple of `interval` after start."""
        return self.is_inside(step) and self.age(step) == 0

    def next_perturbed(self, step: int) -> int | None:
        """The first perturbed step at or after `step`; None if there is none."""
        step = max(step, self.start)
        if not self.config.parts.ascent.perturbs_between:
            step += -(step - self.start) % (self.config.interval or 1)
        return step if self.is_inside(step) else None

    def age(self, step: int) -> int:
        """Number of steps since the last due step; 0 if this one is due."""
        return (step - self.start) % (self.config.interval or 1)

    def passes(self, step: int) -> float:
        """Number of forward-backward passes over the batch in optimizer step `step`."""
        return self.config.passes_per_step if self.is_due(step) else 1.0

    def is_inside(self, step: int) -> bool:
        """Whether `step` lies between start and end."""
        return self.config.rho > 0 and self.start <= step < self.end

    def rho(self, step: int, lr_fraction: float = 1.0) -> float:
        """The perturbation size at `step`, in [rho_min, rho].

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


def peak_lr(optimizer: torch.optim.Optimizer, scheduler: Any, max_steps: int) -> float:
    """The highest learning rate of any parameter group in a run of `max_steps`.

    For each group: `max_lr` of a cyclic schedule; the base rate times the largest factor, if the schedule is a function
    of the step; otherwise the initial rate.
    """
    scheduler = getattr(scheduler, "scheduler", scheduler)  # inside Accelerate's wrapper
    peaks = list(getattr(scheduler, "max_lrs", None) or ())  # of CyclicLR
    factors = getattr(scheduler, "lr_lambdas", None) or [None] * len(optimizer.param_groups)
    default = getattr(optimizer, "defaults", {}).get("lr")
    for group, factor in zip(optimizer.param_groups, factors, strict=False):
        base = group.get("initial_lr", default if default is not None else group["lr"])
        if factor is not None:
            every = max(1, max_steps // _LR_SAMPLES)
            base *= max(factor(step) for step in {*range(0, max_steps, every), max_steps - 1})
        peaks.append(float(group.get("max_lr", base)))
    return max(peaks)


def lr_fraction(optimizer: torch.optim.Optimizer, peak: float) -> float:
    """The largest current learning rate of any group, relative to the peak."""
    return max(float(group["lr"]) for group in optimizer.param_groups) / peak if peak > 0 else 0.0
