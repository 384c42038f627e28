"""Build the gradient that the optimizer steps along from the gradients of the passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ..methods.base import Descent, Step
from .batches import MicroBatch
from .buckets import buckets
from .parameters import (
    Gradients,
    TrainedParameters,
    are_plain_tensors,
    local,
    parts_of_gradients,
    put_gradients,
    take_gradients,
)
from .runner import PassRunner
from .vector import Space, Vector

if TYPE_CHECKING:
    from ..engines.base import Engine


class OptimizerGradient:
    """Turn gradients into Vectors, call the descent, and put its result into `p.grad`.

    Args:
        descent (`Descent`): Computes the gradient for the optimizer.
        engine (`Engine`): Scales and averages gradients.
        parameters (`TrainedParameters`): The trained parameters.
        space (`Space`): The space of the Vectors.
        runner (`PassRunner`): Runs Hessian-vector products.
        scope (`str`): Unless it is `"global"`, each rank computes its own result, and the results are averaged.
        device (`torch.device`): The device of the parameters.
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
        """The unscaled gradients as a Vector that shares their memory."""
        over = self._parameters.trainable if over is None else over
        is_all = over is self._parameters.trainable and len(gradients) == len(over)
        parameters = list(gradients) if is_all else [p for p in over if p in gradients]
        scale = self._engine.loss_scale(self._device)
        factor = 1 / scale if isinstance(scale, Tensor) else None
        return Vector(parameters, parts_of_gradients(gradients, parameters), self._space, factor=factor)

    def combine(self, clean: Vector | None, accumulated: Gradients, step: Step, is_last: bool) -> None:
        """Combine `g` and `g_s`, and add the result to the gradients `accumulated` by earlier micro-batches."""
        perturbed = take_gradients(self._parameters.trainable)
        g_s = self.vector(perturbed)
        if clean is not None:  # a parameter may have a gradient in only one of the passes
            clean, g_s = clean.widened(g_s), g_s.widened(clean)
        gradient = self._checked(self._descent.gradient(clean, g_s, step), "gradient")
        self.assign(gradient, perturbed, accumulated, is_last)

    def between(self, step: Step, is_last: bool) -> None:
        """Set the gradient of a step between two perturbed ones, from the gradient of its only pass."""
        gradients = self._engine.take_gradients(self._parameters.trainable)
        g = self._descent.between(self.vector(gradients), step)
        self.assign(self._checked(g, "between"), gradients, {}, is_last)

    def _checked(self, gradient: Any, method: str) -> Vector:
        """Check the type of the descent's result; the error names the descent."""
        if not isinstance(gradient, Vector):
            raise ValueError(
                f"{type(self._descent).__name__}.{method} must return a Vector over the trainable parameters, not "
                f"{type(gradient).__name__}."
            )
        return gradient

    def assign(self, gradient: Vector, like: Gradients, accumulated: Gradients, is_last: bool) -> None:
        """Put `gradient` into `p.grad`, with the scale and memory layout of the gradients `like`."""
        scale = self._engine.loss_scale(self._device)
        if isinstance(scale, Tensor):
            gradient *= scale
        given: Gradients = dict(zip(gradient.parameters, gradient.materialise(), strict=True))
        if not are_plain_tensors(like.values()) or not all(map(like.__contains__, given)):
            self._match_layout(given, like)
        if both := [p for p in given if p in accumulated]:
            sums, terms = ([local(gradients[p]) for p in both] for gradients in (accumulated, given))
            for left, right in buckets(sums, terms) if self._space.in_buckets else [(sums, terms)]:
                torch._foreach_add_(left, right)
        put_gradients(given | accumulated)
        self.average(is_last)

    @staticmethod
    def _match_layout(parts: Gradients, like: Gradients) -> None:
        """Replace each local part by a gradient of the type of `like` (such as a DTensor) that holds it."""
        for p, part in parts.items():
            whole = like[p] if p in like else torch.zeros_like(p)
            if whole is not part and local(whole).data_ptr() != part.data_ptr():
                if type(whole) is Tensor:
                    whole = part
                else:
                    local(whole).copy_(part)
            parts[p] = whole

    def average(self, is_last: bool) -> None:
        """Average gradients over ranks before the optimizer steps, unless the scope is global."""
        if is_last and self._scope != "global":
            self._engine.average_gradients(self._parameters.in_model)

    def hessian_product(self, window: list[MicroBatch], vector: Vector) -> Vector:
        """`H v` at `w`, for the loss of the window in its clean passes."""
        product = {p: torch.zeros_like(p) for p in self._parameters.trainable}
        direction = dict(zip(vector.parameters, vector.numbers(), strict=True))
        self._runner.add_hessian_products(window, direction, product)
        if self._scope == "global":  # g and g_s are averaged over ranks, so the product must be, too
            put_gradients(product)
            self._engine.average_gradients(self._parameters.trainable)
            product = take_gradients(self._parameters.trainable)
        parameters = [p for p in self._parameters.trainable if p in product]
        parts = [local(product[p]) for p in parameters]
        return Vector(parameters, parts, self._space)  # this loss was not scaled
