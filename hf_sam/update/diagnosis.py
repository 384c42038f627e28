"""What a running job's own numbers say is wrong with its perturbation: one warning of a kind and run, with the remedy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from transformers.utils import logging

from ..config import SAMConfig

logger = logging.get_logger(__name__)

# How large a difference of two losses is, relative to the loss, that rounding alone could make. Losses are means over
# examples, whose rounding errors cancel in part.
_ROUNDING = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 1e-4, torch.bfloat16: 5e-4}
# Realised over intended norm of the perturbation, either way.
_ROUNDED_AWAY = 0.1
# Share of ||eps||^2, and the share of the perturbed weights up to which that much of it is no matter of size.
_NEARLY_ALL, _MINORITY = 0.9, 0.75
# What is no passing state has been seen in every entry of as many steps.
_STEPS = 10
# Sharpness relative to the loss, and the perturbed loss relative to the one that the run began with. DINOv2-S, which loses
# twenty points of accuracy at rho 0.05, has 0.6 and 1.5 there, and 0.1 and 1.0 at the harmless default.
_MANY_TIMES, _LOST = 1 / 3, 1.25
# Of the loss that the run began with: at this share a model has learned all that its training data ask.
_LEARNED = 0.01


@dataclass
class Diagnosis:
    """Reads the entries that a run logs, and warns of what they show; nothing is computed or waited for that is not logged.

    Args:
        config (`SAMConfig`): The user's choices.
        max_steps (`int`): Optimizer steps of the whole run.
        computed_in (`torch.dtype`): The type that losses are computed in, autocast included.
        stored_in (`Iterable[torch.dtype]`): The types of the perturbed weights.
        group_sizes (`dict[str, float]`): The share of the perturbed weights that each group of modules has.
        first_loss (`float`, *optional*): The loss that the run began with, of one that is resumed.
    """

    config: SAMConfig
    max_steps: int
    computed_in: torch.dtype
    stored_in: Iterable[torch.dtype] = (torch.float32,)
    group_sizes: dict[str, float] = field(default_factory=dict)
    first_loss: float | None = None

    def __post_init__(self):
        self._told: set[str] = set()
        self._since: dict[str, int] = {}
        self._step = 0  # of the entry before

    def look(self, means: dict[str, float], loss: float, step: int) -> None:
        """Take in one entry.

        Args:
            means (`dict[str, float]`): The means of `Telemetry`.
            loss (`float`): The training loss of the entry.
            step (`int`): Optimizer steps so far.
        """
        if self.first_loss is None:
            self.first_loss = loss
        self._look_at_rounding(means)
        self._look_at_groups(means, step)
        sharpness = means.get("sam_sharpness")
        if sharpness is not None:
            # Over perturbed steps alone, and not rounded for the log.
            self._look_at_sharpness(sharpness, means["sam_perturbed_loss"] - sharpness, means, step)
        self._step = step

    def end(self, steps: int, has_perturbed: bool) -> None:
        """The run is over after `steps`."""
        if steps and not has_perturbed:
            self._warn(
                "never perturbed",
                f"None of the {steps} steps of this run was perturbed (start={self.config.start}, end={self.config.end}, "
                f"interval={self.config.interval}, method={self.config.label}; {self.max_steps} steps were planned). A run "
                "that stops early does not reach a late start: lower start, or give it as a number of steps; msam waits for "
                "the end of the warm-up.",
            )

    def _look_at_rounding(self, means: dict[str, float]) -> None:
        intended, realised = means.get("_intended_norm", 0.0), means.get("sam_perturbation_norm", 0.0)
        if not (intended > 0 and abs(realised / intended - 1) > _ROUNDED_AWAY):
            return
        is_lost = realised < intended
        types = " and ".join(sorted({str(dtype).removeprefix("torch.") for dtype in self.stored_in}))
        self._warn(
            "rounded away",
            f"Rounding to weights stored in {types} {'loses' if is_lost else 'adds'} more than a tenth of the perturbation's "
            f"norm: sam_perturbation_norm={realised:.3g} was realised of {intended:.3g}. Keep the weights in float32 "
            f"(bf16=True trains float32 weights under autocast), "
            f"{'set stochastic_rounding=True, ' if is_lost else ''}or choose a larger rho.",
        )

    def _look_at_groups(self, means: dict[str, float], step: int) -> None:
        for group, selector in (("embeddings", "no-embeddings"), ("head", "no-embeddings-no-head")):
            share = means.get(f"sam_share/{group}")
            if share is None:
                continue
            takes_all = share > _NEARLY_ALL and self.group_sizes.get(group, 1.0) < _MINORITY
            if self._lasts(group, takes_all, step):
                self._warn(
                    group,
                    f"{share:.0%} of the perturbation's squared norm lies in the {group}, which "
                    f"{'has' if group == 'head' else 'have'} {self.group_sizes[group]:.0%} of the perturbed weights: the rest "
                    f"of the model is hardly perturbed. perturb={selector!r} leaves them out (log_shares=True logs "
                    "sam_share/...)" + ("; a fresh head settles with start=0.1." if group == "head" else "."),
                )

    def _look_at_sharpness(self, sharpness: float, loss: float, means: dict[str, float], step: int) -> None:
        rho, perturbed = means.get("sam_rho", self.config.rho), means["sam_perturbed_loss"]
        # A model that has learned much has a small loss, of which any sharpness is a multiple: the perturbed one counts, too.
        is_lost = sharpness > _MANY_TIMES * loss > 0 and perturbed > _LOST * self.first_loss
        if self._lasts("too large", is_lost, step):
            self._warn(
                "too large",
                f"sam_sharpness={sharpness:.3g} is {sharpness / loss:.2g} times the loss ({loss:.3g}), and the loss at the "
                f"perturbed weights ({perturbed:.3g}) is above the one that the run began with ({self.first_loss:.3g}): the "
                f"gradient is that of a model which has lost what it knew. rho={rho:.3g} is too large: try "
                f"rho={self._better_rho(rho, sharpness, loss)}.",
            )
        rounding = _ROUNDING.get(self.computed_in, _ROUNDING[torch.float32])
        # A direction along which the loss does not change to first order shows nothing here.
        if self._lasts("too small", loss > 0 and abs(sharpness) < rounding * loss, step):
            name = str(self.computed_in).removeprefix("torch.")
            self._warn(
                "too small",
                f"sam_sharpness={sharpness:.3g} is no more than rounding in {name} makes of a loss of {loss:.3g}: rho={rho:.3g} "
                "is too small to matter, for the cost of a second pass. Raise rho by factors of three until sam_sharpness is a "
                "few hundredths of the loss.",
            )
        has_learned = min(loss, perturbed) >= 0 and max(loss, perturbed) < _LEARNED * self.first_loss
        if self._lasts("learned", has_learned, step) and step < self.max_steps:
            self._warn(
                "learned",
                f"The training loss ({loss:.3g}) and the one at the perturbed weights ({perturbed:.3g}) are below a hundredth of "
                f"the loss that the run began with ({self.first_loss:.3g}): second passes from here on (step {step} of "
                f"{self.max_steps}) change little. Set end={_rounded(step / self.max_steps)}, train for fewer epochs, or "
                "choose a larger rho.",
            )

    def _better_rho(self, rho: float, sharpness: float, loss: float) -> str:
        """By how much the loss rises grows at least in proportion to rho: aim at a tenth of the loss."""
        return f"{rho * max(0.1 * loss / sharpness, 0.01):.1g}"

    def _lasts(self, kind: str, holds: bool, step: int) -> bool:
        """Whether it holds, and has held in every entry for some steps."""
        if not holds:
            self._since.pop(kind, None)
            return False
        return step - self._since.setdefault(kind, self._step) >= _STEPS

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._told:
            self._told.add(kind)
            logger.warning(message)


def _rounded(share: float) -> str:
    return f"{max(share, 0.01):.2f}"
