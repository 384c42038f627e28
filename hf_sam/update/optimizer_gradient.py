"""From the gradients that passes leave to the one that the optimizer steps along."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ..methods.base import Descent, Step
from .batches import MicroBatch
from .buckets import buckets
from .parameters import Gradients, TrainedParameters, local, parts_of_gradients, put_gradients, take_gradients
from .runner import PassRunner
from .vector import Space, Vector

if TYPE_CHECKING:
    from ..engines.base import Engine


class OptimizerGradient:
    """Makes Vectors of gradients, has the descent work on them, and puts what it returns into `p.grad`.

    Args:
        descent (`Descent`): What the optimizer gets.
        engine (`Engine`): How gradients are scaled and averaged.
        parameters (`TrainedParameters`): Who trains.
        space (`Space`): Of the Vectors.
        runner (`PassRunner`): For Hessian products.
        scope (`str`): Where it is not `"global"`, gradients are a rank's own, and so is what is made of them: the ranks' mean
            is taken at the end.
        device (`torch.device`): Of the parameters.
    """

    def __init__(
        self,
        descent: Descent,
        engine: Engine,
        parameters: TrainedParameters,
        space: Space,
        runner: PassRunner,
        scope: str,
        device: torch.device,
    ):
        self._descent, self._engine, self._parameters, self._space = descent, engine, parameters, space
        self._runner, self._scope, self._device = runner, scope, device

    def vector(self, gradients: Gradients, over: Sequence[Parameter] | None = None) -> Vector:
        """Gradients, unscaled, as a Vector that shares their memory."""
        over = self._parameters.trainable if over is None else over
        is_all = over is self._parameters.trainable and len(gradients) == len(over)
        parameters = list(gradients) if is_all else [p for p in over if p in gradients]
        scale = self._engine.loss_scale(self._device)
        factor = 1 / scale if isinstance(scale, Tensor) else None
        return Vector(parameters, parts_of_gradients(gradients, parameters), self._space, factor=factor)

    def combine(self, clean: Vector | None, accumulated: Gradients, step: Step, is_last: bool) -> None:
        """From `g` and `g_s` to what the optimizer steps along, added to what earlier micro-batches `accumulated`."""
        perturbed = take_gradients(self._parameters.trainable)
        g_s = self.vector(perturbed)
        if clean is not None:  # a parameter may take part in one of the passes only
            clean, g_s = clean.widened(g_s), g_s.widened(clean)
        gradient = self._returned(self._descent.gradient(clean, g_s, step), "gradient")
        self.hand_over(gradient, perturbed, accumulated, is_last)

    def between(self, step: Step, is_last: bool) -> None:
        """The same in a step between two due ones, from the gradient of its one pass."""
        gradients = self._engine.take_gradients(self._parameters.trainable)
        g = self._descent.between(self.vector(gradients), step)
        self.hand_over(self._returned(g, "between"), gradients, {}, is_last)

    def _returned(self, gradient: Any, method: str) -> Vector:
        """What the descent has returned; an error that names it where that is no Vector."""
        if not isinstance(gradient, Vector):
            raise ValueError(
                f"{type(self._descent).__name__}.{method} must return a Vector over the trainable parameters, not "
                f"{type(gradient).__name__}."
            )
        return gradient

    def hand_over(self, gradient: Vector, like: Gradients, accumulated: Gradients, is_last: bool) -> None:
        """Put `gradient` into `p.grad`, scaled and laid out as the gradients `like`."""
        scale = self._engine.loss_scale(self._device)
        if isinstance(scale, Tensor):
            gradient *= scale
        given: Gradients = {}
        for p, part in zip(gradient.parameters, gradient.materialise(), strict=True):
            whole = like[p] if p in like else torch.zeros_like(p)
            if whole is not part and local(whole).data_ptr() != part.data_ptr():
                if type(whole) is Tensor:
                    whole = part
                else:
                    local(whole).copy_(part)
            given[p] = whole
        if both := [p for p in given if p in accumulated]:
            sums, terms = ([local(gradients[p]) for p in both] for gradients in (accumulated, given))
            for left, right in buckets(sums, terms) if self._space.in_buckets else [(sums, terms)]:
                torch._foreach_add_(left, right)
        put_gradients(given | accumulated)
        self.average(is_last)

    def average(self, is_last: bool) -> None:
        """Take the ranks' mean, where that is not done yet and the optimizer is about to step."""
        if is_last and self._scope != "global":
            self._engine.average_gradients(self._parameters.in_model)

    def hessian_product(self, window: list[MicroBatch], vector: Vector) -> Vector:
        """`H v` at `w`, of the loss of the window as the clean pass saw it."""
        product = {p: torch.zeros_like(p) for p in self._parameters.trainable}
        direction = dict(zip(vector.parameters, vector.numbers(), strict=True))
        self._runner.add_hessian_products(window, direction, product)
        if self._scope == "global":  # g and g_s are the ranks' means: so has the product to be
            put_gradients(product)
            self._engine.average_gradients(self._parameters.trainable)
            product = take_gradients(self._parameters.trainable)
        parameters = [p for p in self._parameters.trainable if p in product]
        parts = [local(product[p]) for p in parameters]
        return Vector(parameters, parts, self._space)  # of a loss that nobody has scaled
