"""From the gradient at `w` to the perturbation: asked of the method, checked, applied, and measured."""

from __future__ import annotations

import math
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from ..config import Parts, SAMConfig
from ..methods.base import Needs, Step, copies_for_cosine
from .observation import record_displacement
from .parameters import Gradients, TrainedParameters, local
from .perturbation import Perturbation
from .roles import GROUPS, groups_of
from .telemetry import Telemetry
from .vector import Space, Vector

if TYPE_CHECKING:
    from ..engines.base import Engine


class AscentStep:
    """What becomes of an ascent's `eps`.

    Args:
        parts (`Parts`): The ascent and descent, as resolved for the run.
        config (`SAMConfig`): The user's choices.
        engine (`Engine`): What lies in memory how, and whether steps may be skipped.
        parameters (`TrainedParameters`): Who is perturbed.
        space (`Space`): Of the Vectors.
        optimizer (`torch.optim.Optimizer`): Whose weight decay may take part.
        telemetry (`Telemetry`): Where sizes are recorded.
        model (`nn.Module`): Whose modules are told apart.

    Attributes:
        is_measured (`bool`): Whether the present step's values are about to be logged.
        has_overflowed (`Tensor`, *optional*): Whether an ascent pass of this step has, under fp16.
    """

    def __init__(
        self,
        parts: Parts,
        config: SAMConfig,
        engine: Engine,
        parameters: TrainedParameters,
        space: Space,
        optimizer: torch.optim.Optimizer,
        telemetry: Telemetry,
        model: nn.Module,
    ):
        self._ascent, self._needs, self._config, self._engine = parts.ascent, parts.needs, config, engine
        self._parameters, self._space, self._optimizer, self._telemetry = parameters, space, optimizer, telemetry
        self._model = model
        self.is_measured = False
        self.has_overflowed: Tensor | None = None
        self._notes_overflows = engine.may_skip_steps and parts.carries_on
        self._observed: Vector | None = None
        self._has_checked_shapes = False

    def weights(self, step: Step) -> Perturbation:
        """A context in which weights can be moved, and after which they are bitwise what they were."""
        generator = step.generator if self._config.stochastic_rounding else None
        is_on_cpu = self._parameters.trainable[0].device.type == "cpu"
        swaps_memory = is_on_cpu and not self._engine.parameters_are_views and not self._space.in_buckets
        return Perturbation(generator, self._engine.renew_copies, swaps_memory, self._space.in_buckets)

    def eps(self, g: Vector, step: Step, rho: float, is_first: bool = True) -> Vector | None:
        """The perturbation that the method makes of `g`, which it consumes.

        Args:
            step (`Step`): Of this inner ascent step.
            rho (`float`): Of all of them together.
            is_first (`bool`): Whether `g` is the gradient at `w`.
        """
        if not len(g):  # nothing that is perturbed took part in this pass
            return None
        ascent = self._ascent
        norm = g.norm()
        if self._notes_overflows:
            overflows = ~(norm < math.inf)
            self.has_overflowed = overflows if self.has_overflowed is None else self.has_overflowed | overflows
        if is_first and self.is_measured and self._wants_copy:
            self._observed = g.clone()
        if getattr(ascent, "weight_decay_in_ascent", False):
            self._add_weight_decay(g, step)
        eps = self.checked(ascent.eps(g if ascent.needs & Needs.GRADIENT else None, step), norm)
        if eps is not None and is_first:
            self._telemetry.record(sam_rho=rho, sam_ascent_grad_norm=norm)
            if self.is_measured and ascent.ascent_steps == 1:
                self._telemetry.record(_intended_norm=eps.norm())
        return eps

    def checked(self, eps: Vector | None, norm: Tensor | None = None) -> Vector | None:
        """`eps` over perturbed parameters only, and 0 where it or the gradient is not finite.

        Raises:
            ValueError: It is no Vector, or has not the shape of the weights.
        """
        if eps is None:
            return None
        name = f"{type(self._ascent).__name__}.eps"
        if not isinstance(eps, Vector):
            raise ValueError(
                f"{name} must return a Vector over the perturbed parameters, or None, not {type(eps).__name__}."
            )
        eps = eps.over(self._parameters.selected)
        if not self._has_checked_shapes:
            self._has_checked_shapes = True
            for p, part in zip(eps.parameters, eps.tensors, strict=True):
                if part.shape != local(p).shape:
                    raise ValueError(
                        f"{name} must have the shape of the weights: for {self._parameters.names[p]} its shape is "
                        f"{list(part.shape)} instead of {list(local(p).shape)}."
                    )
        if not len(eps):
            return None
        size = eps.norm()
        is_usable = (size > 0) & (size < math.inf)
        if norm is not None and norm is not size:
            is_usable &= norm < math.inf
        return eps.where(is_usable)

    def _add_weight_decay(self, g: Vector, step: Step) -> None:
        decay = {p: group.get("weight_decay", 0.0) for group in self._optimizer.param_groups for p in group["params"]}
        for factor in dict.fromkeys(decay.get(p, 0.0) for p in g.parameters):
            if factor:
                g += step.weights.over([p for p in g.parameters if decay.get(p) == factor]) * factor

    @property
    def _wants_copy(self) -> bool:
        """Whether `g` has to be copied for the cosine: neither the descent keeps it nor does eps show it."""
        return not (self._needs & Needs.CLEAN_GRADIENT) and copies_for_cosine(self._ascent)

    @cached_property
    def _groups(self) -> dict[Parameter, str]:
        by_name = groups_of(self._model)
        return {p: by_name.get(name, "other") for p, name in self._parameters.names.items()}

    def observe(self, weights: Perturbation, clean: Vector | None, perturbed: Gradients) -> None:
        """Record the realised size of the perturbation, and the cosine between `g` and `g_s` where `g` is at hand."""
        g = self._observed if clean is None else clean
        self._observed = None
        shares_of = GROUPS if self._config.log_shares else ("embeddings", "head")  # the two that a diagnosis looks at
        gradient_in = self._ascent.gradient_in
        record_displacement(self._telemetry, self._space, weights, perturbed, g, gradient_in, self._groups, shares_of)

    def group_sizes(self) -> dict[str, float]:
        """The share of the perturbed weights that each group of modules has."""
        sizes = dict.fromkeys(GROUPS, 0)
        for p in self._parameters.selected:
            sizes[self._groups[p]] += p.numel()
        return {group: size / max(1, sum(sizes.values())) for group, size in sizes.items()}
