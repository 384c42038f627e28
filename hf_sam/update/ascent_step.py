"""The ascent step: compute eps from the gradient at `w`, check it, apply it and measure it."""

from __future__ import annotations

import math
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from ..config import Parts, SAMConfig
from ..methods.base import Needs, Step, copies_for_cosine
from .current_step import CurrentStep
from .observation import record_displacement
from .parameters import Gradients, TrainedParameters, local
from .perturbation import Perturbation
from .roles import GROUPS, groups_of
from .telemetry import Telemetry
from .vector import Space, Vector

if TYPE_CHECKING:
    from ..engines.base import Engine


class AscentStep:
    """Compute, check and record an ascent's `eps`.

    Args:
        parts (`Parts`): The ascent and descent, as resolved for the run.
        config (`SAMConfig`): The user's choices.
        engine (`Engine`): Knows the memory layout and whether steps may be skipped.
        parameters (`TrainedParameters`): The perturbed parameters.
        space (`Space`): The space of the Vectors.
        optimizer (`torch.optim.Optimizer`): The optimizer, whose weight decay may be added.
        telemetry (`Telemetry`): Records norms.
        model (`nn.Module`): The model, whose parameters are grouped by the role of their module.

    Attributes:
        is_measured (`bool`): Whether the values of the current step are about to be logged.
        has_overflowed (`Tensor`, *optional*): Whether an ascent pass of this step overflowed in fp16.
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
        self._tracks_overflows = engine.may_skip_steps and parts.carries_on
        self._observed: Vector | None = None
        self._has_checked_shapes = False

    def weights(self, step: CurrentStep) -> Perturbation:
        """A context that perturbs weights and restores them bitwise on exit."""
        generator = step.rounding_generator if self._config.stochastic_rounding else None
        is_on_cpu = self._parameters.trainable[0].device.type == "cpu"
        swaps_memory = is_on_cpu and not self._engine.parameters_are_views and not self._space.in_buckets
        return Perturbation(generator, self._engine.renew_copies, swaps_memory, self._space.in_buckets)

    def eps(self, g: Vector, step: Step, rho: float, is_first: bool = True) -> Vector | None:
        """Compute the method's perturbation.

        Args:
            g (`Vector`): The ascent gradient; it is consumed.
            step (`Step`): The current inner ascent step.
            rho (`float`): The total size of all inner steps.
            is_first (`bool`): Whether `g` is the gradient at `w`.
        """
        if not len(g):  # no perturbed parameter has a gradient
            return None
        ascent = self._ascent
        norm = g.norm()
        if self._tracks_overflows:
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
        """Restrict `eps` to the perturbed parameters, and set it to 0 if it or the gradient is not finite.

        Raises:
            ValueError: `eps` is not a Vector, or does not have the shape of the weights.
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
        """Whether `g` must be copied for the cosine: the descent does not keep it, and it does not follow from eps."""
        return not (self._needs & Needs.CLEAN_GRADIENT) and copies_for_cosine(self._ascent)

    @cached_property
    def _groups(self) -> dict[Parameter, str]:
        by_name = groups_of(self._model)
        return {p: by_name.get(name, "other") for p, name in self._parameters.names.items()}

    def observe(self, weights: Perturbation, clean: Vector | None, perturbed: Gradients) -> None:
        """Record the realised norm of the perturbation, and `cos(g, g_s)` if `g` is available."""
        g = self._observed if clean is None else clean
        self._observed = None
        shares_of = (
            GROUPS if self._config.log_shares else ("embeddings", "head")
        )  # the two groups that the diagnosis needs
        gradient_in = self._ascent.gradient_in
        record_displacement(self._telemetry, self._space, weights, perturbed, g, gradient_in, self._groups, shares_of)

    def group_sizes(self) -> dict[str, float]:
        """Each module group's share of the perturbed weights."""
        sizes = dict.fromkeys(GROUPS, 0)
        for p in self._parameters.selected:
            sizes[self._groups[p]] += p.numel()
        return {group: size / max(1, sum(sizes.values())) for group, size in sizes.items()}
