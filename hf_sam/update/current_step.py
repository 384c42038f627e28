"""The implementation of `hf_sam.methods.Step`: the view that a method has of the current optimizer step."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .memory import Memory
from .parameters import local
from .telemetry import Telemetry
from .vector import Space, Vector


class CurrentStep:
    """One optimizer step, or one inner ascent step of it, as a method sees it.

    Args:
        index (`int`), progress (`float`), rho (`float`), share (`float`), age (`int`), is_first (`bool`): As in `Step`.
        selected (`list[Parameter]`): The perturbed parameters.
        optimizer (`torch.optim.Optimizer`): Read only.
        space (`Space`): The space of the Vectors.
        memory (`Memory`): The method's state.
        seed (`tuple`): Seed of the run, rank and micro-batch; with `index`, these determine all random numbers.
        telemetry (`Telemetry`): The target of `record`.
        attached (`Any`): What `Ascent.attach` returned.
        loss_scale (`Tensor` or `float`): The fp16 loss scale, by which gradients outside Vectors are multiplied.
        hessian_product (`Callable`, *optional*): Hessian-vector product, for descents that need it.
    """

    def __init__(
        self,
        *,
        index: int,
        progress: float,
        rho: float,
        share: float,
        age: int,
        is_first: bool,
        selected: list[Parameter],
        optimizer: torch.optim.Optimizer,
        space: Space,
        memory: Memory,
        seed: tuple[int, int, int],
        telemetry: Telemetry,
        attached: Any,
        loss_scale: Tensor | float,
        hessian_product: Callable[[Vector], Vector] | None = None,
    ):
        self.index, self.progress, self.rho, self.share = index, progress, rho, share
        self.age, self.is_first = age, is_first
        self.memory, self.attached, self.loss_scale = memory, attached, loss_scale
        self.record = telemetry.record
        self._selected, self._optimizer, self._space, self._seed = selected, optimizer, space, seed
        self._hessian_product = hessian_product

    @property
    def lr(self) -> float:
        """The largest learning rate of the optimizer's groups."""
        return max(float(group["lr"]) for group in self._optimizer.param_groups)

    @property
    def weights(self) -> Vector:
        """`w` over the perturbed parameters, at their current values."""
        weights = list(self._space.layout(self._selected).weights)
        return Vector(self._selected, weights, self._space, is_shared=True)

    @cached_property
    def generator(self) -> torch.Generator:
        """A generator that depends only on seed, step, rank and micro-batch: a resumed run draws the same numbers."""
        return self._generator()

    @cached_property
    def rounding_generator(self) -> torch.Generator:
        """Another such generator, so that rounding does not depend on the method's own random numbers."""
        return self._generator(" rounding")

    def _generator(self, purpose: str = "") -> torch.Generator:
        seed, rank, micro = self._seed
        key = f"{seed} {self.index} {rank}" + (f" {micro}" if micro else "") + purpose
        return torch.Generator(self._selected[0].device).manual_seed(random.Random(key).getrandbits(63))

    @cached_property
    def shared_random(self) -> random.Random:
        """A generator that is the same on every rank and in every micro-batch of the step."""
        return random.Random(f"{self._seed[0]} {self.index}")

    @property
    def optimizer_name(self) -> str:
        """The class of the base optimizer, inside Accelerate's wrapper."""
        return type(getattr(self._optimizer, "optimizer", self._optimizer)).__name__

    def optimizer_state(self, *names: str) -> Vector | None:
        """The first existing optimizer state among `names`, over the perturbed parameters that the optimizer has stepped.

        None if there are none, or if the optimizer keeps other states for some of them: Adafactor, for example, has
        `exp_avg_sq` for vectors only. A quantized state (torchao's 8-bit and 4-bit optimizers) is returned dequantized.
        """
        found: dict[Parameter, Tensor] = {}
        states = self._optimizer.state
        for p in self._selected:
            state = states.get(p, {})
            value = next((state[name] for name in names if state.get(name) is not None), None)
            if value is None and any(isinstance(other, Tensor) and other.dim() for other in state.values()):
                return None
            if value is not None:
                value = local(value)
                found[p] = value if type(value) in (Tensor, Parameter) else value.dequantize()
        return Vector(list(found), list(found.values()), self._space, is_shared=True) if found else None

    def hessian_product(self, vector: Vector) -> Vector:
        """`H vector` at `w`, over all trainable parameters."""
        if self._hessian_product is None:
            raise ValueError(
                "step.hessian_product is available only to descents that declare Needs.HVP: add it to their needs."
            )
        return self._hessian_product(vector)
