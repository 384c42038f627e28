"""Warn about problems with the perturbation that the logged values show: once per run and problem, with the fix."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from transformers.utils import logging

from ..config import SAMConfig

logger = logging.get_logger(__name__)

# Largest relative difference between two losses that rounding alone can cause. Losses are means over examples, so their
# rounding errors partly cancel.
_ROUNDING = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 1e-4, torch.bfloat16: 5e-4}
# Relative deviation of the realised norm of the perturbation from the intended one, in either direction.
_ROUNDED_AWAY = 0.1
# Share of ||eps||^2 in one module group, and the share of weights below which the group's size does not explain it.
_NEARLY_ALL, _MINORITY = 0.9, 0.75
# A condition persists if every log entry over this many steps shows it.
_STEPS = 10
# Sharpness relative to the loss, and perturbed loss relative to the first loss of the run. For DINOv2-S they are 0.6
# and 1.5 at rho 0.05, where it loses twenty points of accuracy, and 0.1 and 1.0 at the harmless default.
_LARGE_SHARPNESS, _LOST = 1 / 3, 1.25
# Loss relative to the first loss of the run, below which the model has fitted its training data.
_LEARNED = 0.01


@dataclass
class Diagnosis:
    """Check the log entries of a run and warn about problems. Needs no computation or synchronisation beyond logging.

    Args:
        config (`SAMConfig`): The user's choices.
        max_steps (`int`): Optimizer steps of the whole run.
        computed_in (`torch.dtype`): The dtype in which losses are computed, autocast included.
        stored_in (`Iterable[torch.dtype]`): The dtypes of the perturbed weights.
        group_sizes (`dict[str, float]`): Each module group's share of the perturbed weights.
        first_loss (`float`, *optional*): The first loss of the run, if it is resumed.
    """

    config: SAMConfig
    max_steps: int
    computed_in: torch.dtype
    stored_in: Iterable[torch.dtype] = (torch.float32,)
    group_sizes: dict[str, float] = field(default_factory=dict)
    first_loss: float | None = None

    def __post_init__(self):
        self._warned: set[str] = set()
        self._since: dict[str, int] = {}
        self._step = 0  # step of the previous entry

    def check(self, means: dict[str, float], loss: float, step: int) -> None:
        """Check one log entry.

        Args:
            means (`dict[str, float]`): The means of `Telemetry`.
            loss (`float`): The logged training loss.
            step (`int`): Optimizer steps taken so far.
        """
        if self.first_loss is None:
            self.first_loss = loss
        self._check_rounding(means)
        self._check_groups(means, step)
        sharpness = means.get("sam_sharpness")
        if sharpness is not None:
            # The clean loss: over perturbed steps only, and without the rounding of the log.
            self._check_sharpness(sharpness, means["sam_perturbed_loss"] - sharpness, means, step)
        self._step = step

    def end(self, steps: int, has_perturbed: bool) -> None:
        """Check the whole run when it ends after `steps` optimizer steps."""
        if steps and not has_perturbed:
            self._warn(
                "never perturbed",
                f"None of the {steps} steps of this run was perturbed (start={self.config.start}, end={self.config.end}, "
                f"interval={self.config.interval}, {self.config.label}; {self.max_steps} steps were planned). Lower start, "
                "or give it as a number of steps: a run that stops early may never reach a late start, and msam perturbs only "
                "after the warm-up.",
            )

    def _check_rounding(self, means: dict[str, float]) -> None:
        intended, realised = means.get("_intended_norm", 0.0), means.get("sam_perturbation_norm", 0.0)
        if not (intended > 0 and abs(realised / intended - 1) > _ROUNDED_AWAY):
            return
        is_lost = realised < intended
        types = " and ".join(sorted({str(dtype).removeprefix("torch.") for dtype in self.stored_in}))
        self._warn(
            "rounded away",
            f"Rounding to weights stored in {types} {'loses' if is_lost else 'adds'} more than a tenth of the perturbation's "
            f"norm: sam_perturbation_norm={realised:.3g} instead of {intended:.3g}. Keep the weights in float32 "
            f"(bf16=True trains float32 weights under autocast), "
            f"{'set stochastic_rounding=True, ' if is_lost else ''}or choose a larger rho.",
        )

    def _check_groups(self, means: dict[str, float], step: int) -> None:
        for group, selector in (("embeddings", "no-embeddings"), ("head", "no-embeddings-no-head")):
            share = means.get(f"sam_share/{group}")
            if share is None:
                continue
            takes_all = share > _NEARLY_ALL and self.group_sizes.get(group, 1.0) < _MINORITY
            if self._persists(group, takes_all, step):
                self._warn(
                    group,
                    f"{share:.0%} of the perturbation's squared norm lies in the {group}, which "
                    f"{'has' if group == 'head' else 'have'} only {self.group_sizes[group]:.0%} of the perturbed weights, so the rest of "
                    f"the model is hardly perturbed. Set perturb={selector!r} to leave "
                    + ("it out, or start=0.1 to let a new head settle first" if group == "head" else "them out")
                    + "; log_shares=True logs sam_share/... for every group.",
                )

    def _check_sharpness(self, sharpness: float, loss: float, means: dict[str, float], step: int) -> None:
        rho, perturbed = means.get("sam_rho", self.config.rho), means["sam_perturbed_loss"]
        # A well-trained model has a tiny loss, which any sharpness exceeds: require a large perturbed loss, too.
        is_lost = sharpness > _LARGE_SHARPNESS * loss > 0 and perturbed > _LOST * self.first_loss
        if self._persists("too large", is_lost, step):
            self._warn(
                "too large",
                f"sam_sharpness={sharpness:.3g} is {sharpness / loss:.2g} times the loss ({loss:.3g}), and the loss at the "
                f"perturbed weights ({perturbed:.3g}) is above the first loss of the run ({self.first_loss:.3g}): gradients are "
                f"taken where the model has lost what it learned. rho={rho:.3g} is too large: try "
                f"rho={self._better_rho(rho, sharpness, loss)}.",
            )
        rounding = _ROUNDING.get(self.computed_in, _ROUNDING[torch.float32])
        # The sharpness says nothing about rho if the loss is flat to first order.
        if self._persists("too small", loss > 0 and abs(sharpness) < rounding * loss, step):
            name = str(self.computed_in).removeprefix("torch.")
            self._warn(
                "too small",
                f"sam_sharpness={sharpness:.3g} is within the rounding error in {name} of a loss of {loss:.3g}: rho={rho:.3g} is "
                "too small to matter, and the second pass is wasted. Raise rho by factors of three until sam_sharpness is a "
                "few hundredths of the loss.",
            )
        has_learned = min(loss, perturbed) >= 0 and max(loss, perturbed) < _LEARNED * self.first_loss
        if self._persists("learned", has_learned, step) and step < self.max_steps:
            self._warn(
                "learned",
                f"The training loss ({loss:.3g}) and the loss at the perturbed weights ({perturbed:.3g}) are below a hundredth of "
                f"the first loss of the run ({self.first_loss:.3g}): second passes from here on (step {step} of "
                f"{self.max_steps}) change little. Set end={_rounded(step / self.max_steps)}, train for fewer epochs, or "
                "choose a larger rho.",
            )

    def _better_rho(self, rho: float, sharpness: float, loss: float) -> str:
        """A rho that aims at a sharpness of a tenth of the loss; sharpness grows at least in proportion to rho."""
        return f"{rho * max(0.1 * loss / sharpness, 0.01):.1g}"

    def _persists(self, kind: str, holds: bool, step: int) -> bool:
        """Whether the condition has held in every entry of the last `_STEPS` steps, including this one."""
        if not holds:
            self._since.pop(kind, None)
            return False
        return step - self._since.setdefault(kind, self._step) >= _STEPS

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning(message)


def _rounded(share: float) -> str:
    return f"{max(share, 0.01):.2f}"
