"""Where to perturb: the ascents of the published methods."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from .auxiliary_lora import AuxiliaryLora
from .base import Ascent, Needs, Step
from .fields import flag, number, number_or_none, whole
from .geometry import steepest

if TYPE_CHECKING:
    from ..update.vector import Vector


@dataclass(frozen=True)
class Geometry(Ascent):
    """The norm in which a perturbation is measured.

    Args:
        p (`float`): Order of the norm, in [1, inf] (Foret et al. 2021, Equation 2).
        adaptive (`bool`): Scale each coordinate by `T = |w| + eta` (Kwon et al. 2021, Equation 3). Every perturbed
            tensor is scaled, as in the paper; the authors' code keeps T = 1 for tensors not named `weight`.
        eta (`float`): Added to `|w|`, so that weights at zero move too.
    """

    p: float = number(2.0, 1, inf=True)
    adaptive: bool = flag(False)
    eta: float = number(0.01, 0)

    def steepest(self, direction: Vector, step: Step, rho: float | None = None, sigma: float | None = None) -> Vector:
        """
        The steepest perturbation of size `rho` (by default `step.rho`) along `direction`, which is overwritten; smaller
        where the linearised rise of the loss would exceed `sigma`.
        """
        scale = step.weights.abs() if self.adaptive else None
        if scale is not None:
            scale += self.eta
        return steepest(direction, step.rho if rho is None else rho, self.p, scale, sigma)

    def gradient_in(self, displacement: Tensor) -> Tensor | None:
        """Invert `eps = sign(g) |g|^(q-1)`, by (q - 1)(p - 1) = 1."""
        has_moved_on = getattr(self, "weight_decay_in_ascent", False) or self.ascent_steps > 1
        if self.adaptive or has_moved_on or not 1 < self.p < float("inf"):
            return None
        return displacement if self.p == 2 else displacement.sign() * displacement.abs() ** (self.p - 1)


@dataclass(frozen=True)
class Steepest(Geometry):
    """`eps = rho g / ||g||`, or the maximiser under another norm (Foret et al. 2021, arXiv 2010.01412, Algorithm 1).

    Args:
        ascent_steps (`int`): Inner steps K, each of size rho / K.
        weight_decay_in_ascent (`bool`): Perturb along `g + weight_decay * w`, the paper's L2 term.
        sigma (`float`, *optional*): Upper bound of the linearised rise of the step's loss, in its units; rho is smaller
            where `rho ||g||` would exceed it. Of the parts of a step, each may cause its share.
    """

    ascent_steps: int = whole(1)
    weight_decay_in_ascent: bool = flag(False)
    sigma: float | None = number_or_none(0, above=True)

    @property
    def logs_cosine(self) -> bool:
        """False if `g` can be recovered from the displacement: plain SAM holds one copy even in steps that log."""
        return self.adaptive

    def eps(self, g: Vector, step: Step) -> Vector:
        return self.steepest(g, step, sigma=None if self.sigma is None else self.sigma * step.share / self.ascent_steps)


@dataclass(frozen=True)
class Friendly(Geometry):
    """Perturb along the batch-specific part of the gradient, `g - sigma m`, with m a running average of g.

    Li et al. 2024, arXiv 2403.12350, Equation 10. `m` starts at zero, so the first step is plain SAM.

    Args:
        sigma (`float`): Weight of the average that is subtracted.
        ema_decay (`float`): Decay of the average.
    """

    memory: ClassVar = ("mean",)

    sigma: float = number(1.0, 0)
    ema_decay: float = number(0.9, 0, 1, below=True)
    weight_decay_in_ascent: bool = flag(False)

    def eps(self, g: Vector, step: Step) -> Vector:
        mean = step.memory.get("mean")
        update = g * (1 - self.ema_decay)
        step.memory["mean"] = update.clone() if mean is None else mean * self.ema_decay + update
        if mean is not None:
            g -= mean * self.sigma
        return self.steepest(g, step)

    def gradient_in(self, displacement: Tensor) -> None:
        return None


@dataclass(frozen=True)
class RandomTensors(Geometry):
    """Perturb a random choice of tensors by `eps / beta` (Du et al. 2022, arXiv 2110.03141, Section 3.1).

    Args:
        beta (`float`): Probability that a tensor is perturbed. Whole tensors are drawn, as in the authors' code.
    """

    beta: float = number(0.6, 0, 1, above=True)
    weight_decay_in_ascent: bool = flag(False)

    def parameters(self, names: Sequence[str], step: Step) -> Sequence[str]:
        if self.beta == 1:
            return names
        dice = step.shared_random
        return [name for name in names if dice.random() < self.beta] or [dice.choice(names)]

    def eps(self, g: Vector, step: Step) -> Vector:
        return self.steepest(g, step) / self.beta


@dataclass(frozen=True)
class Carried(Geometry):
    """Perturb along the gradient of the last due step until the next due step (this project).

    Args:
        alpha (`float`): Factor by which the perturbation shrinks in each step after the one that computed its
            direction.
    """

    needs: ClassVar = Needs.GRADIENT | Needs.WHOLE_STEP
    memory: ClassVar = ("gradient",)
    perturbs_between: ClassVar = True

    alpha: float = number(1.0, 0)

    def radius(self, step: Step) -> float:
        return step.rho * self.alpha**step.age

    def ready(self, step: Step) -> bool:
        return "gradient" in step.memory

    def eps(self, g: Vector | None, step: Step) -> Vector:
        if g is None:
            return self.steepest(step.memory["gradient"], step, self.radius(step))
        step.memory["gradient"] = g.clone()
        return self.steepest(g, step)


@dataclass(frozen=True)
class Previous(Ascent):
    """Perturb along the gradient of the previous optimizer step; one pass (S2-SAM, Ji et al. 2024, NeurIPS)."""

    needs: ClassVar = Needs.NOTHING
    memory: ClassVar = ("gradient",)

    def eps(self, g: None, step: Step) -> Vector | None:
        gradient = step.memory.get("gradient")
        return None if gradient is None else steepest(gradient, step.rho)

    def after(self, gradient: Vector, step: Step) -> None:
        step.memory["gradient"] = gradient.clone()


@dataclass(frozen=True)
class Momentum(Ascent):
    """`eps = -rho v / ||v||`, with v the optimizer's momentum: a look ahead in the direction of the next update.

    One pass; no perturbation while the learning rate warms up (Becker et al. 2024, arXiv 2401.12033, Algorithm 1).

    Raises:
        ValueError: The optimizer has stepped, but has no readable momentum.
    """

    needs: ClassVar = Needs.OPTIMIZER_STATE
    after_warmup: ClassVar = True

    def eps(self, g: None, step: Step) -> Vector | None:
        momentum = step.optimizer_state("exp_avg", "momentum_buffer")
        if momentum is None and not step.is_first:
            raise ValueError(
                f"method='msam' perturbs along the optimizer's momentum, but {step.optimizer_name} has no readable momentum. "
                "Use an optimizer with `exp_avg` (optim='adamw_torch') or `momentum_buffer` (SGD with momentum=0.9)."
            )
        return None if momentum is None else -steepest(momentum, step.rho)


@dataclass(frozen=True)
class Noise(Ascent):
    """`eps = rho z / ||z||`, with z standard normal: uniform on the sphere, a control for every other direction."""

    needs: ClassVar = Needs.NOISE

    def eps(self, g: None, step: Step) -> Vector:
        def draw(weights: list[Tensor]) -> list[Tensor]:
            sizes, device, dtype = [w.numel() for w in weights], weights[0].device, weights[0].dtype
            numbers = torch.randn(sum(sizes), generator=step.generator, device=device, dtype=dtype)
            return [z.view(w.shape) for z, w in zip(numbers.split(sizes), weights, strict=True)]

        return steepest(step.weights.map_lists(draw), step.rho)


@dataclass(frozen=True)
class AuxiliaryPair(Ascent):
    """A second LoRA pair that ascends at the base learning rate while the adapter descends, in one pass.

    `||s B2 A2||` is clipped to rho (Bi-LoRA, Liu et al. 2025, arXiv 2508.19564).
    """

    needs: ClassVar = Needs.NOTHING

    def eps(self, g: None, step: Step) -> None:
        return None

    def attach(self, model: nn.Module, seed: int) -> AuxiliaryLora:
        return AuxiliaryLora(model, seed)

    def applied(self, step: Step) -> AbstractContextManager:
        return step.attached.active()

    def after(self, gradient: Vector, step: Step) -> None:
        norm = step.attached.ascend(step.rho, step.lr, step.loss_scale)
        step.record(sam_rho=step.rho, sam_perturbation_norm=norm)


__all__ = [
    "AuxiliaryPair",
    "Carried",
    "Friendly",
    "Geometry",
    "Momentum",
    "Noise",
    "Previous",
    "RandomTensors",
    "Steepest",
]
