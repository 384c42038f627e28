"""A micro-batch as a pass needs it: inputs, loss normalisation and random states, whole or in parts."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import find_batch_size
from torch import Tensor

from .replay import RandomStates


@dataclass
class MicroBatch:
    """What the Trainer hands to one `training_step`, kept so that the pass can be run again.

    Args:
        inputs (`Mapping[str, Any]`): What the data collator returned.
        num_items_in_batch (`Tensor` or `int`, *optional*): Labelled items in the whole window; divides the loss of
            models that accept it.
        accumulation_steps (`float`): Divides the loss of all other models. For a part of a micro-batch it is larger by
            as much as the part is smaller, so that the losses of the parts add up to the whole one's.
        random_states (`RandomStates`, *optional*): To run under; None draws fresh random numbers.
        fraction (`float`, *optional*, defaults to 1.0): Share of the Trainer's micro-batch that this is.
    """

    inputs: Mapping[str, Any]
    num_items_in_batch: Tensor | int | None
    accumulation_steps: float
    random_states: RandomStates | None = None
    fraction: float = 1.0
    # What the clean pass leaves for a descent pass with a changed loss: the loss of each example, or the gradient at
    # the logits.
    clean: Tensor | None = None

    def fresh_inputs(self) -> Mapping[str, Any]:
        """A shallow copy, so that a `compute_loss` that pops labels leaves them to the next pass."""
        return copy.copy(self.inputs)

    def split(self, m: int | None) -> list[MicroBatch]:
        """Parts of `m` examples each, the last one smaller where `m` does not divide; one part where `m` is None."""
        size = find_batch_size(self.inputs)
        if m is None or size is None or size <= m:
            return [self]
        return [self._part(slice(first, min(first + m, size)), size) for first in range(0, size, m)]

    def share(self, fraction: float) -> MicroBatch:
        """The first `fraction` of the examples, with the loss scaled to estimate the whole one's."""
        size = find_batch_size(self.inputs)
        if fraction == 1 or not size:
            return self
        return self.sample(torch.arange(math.ceil(fraction * size)))

    def sample(self, indices: Tensor) -> MicroBatch:
        """The examples at `indices`, shape `(k,)`, with the loss scaled to estimate the whole one's."""
        size = find_batch_size(self.inputs)
        part = self._part(indices, size)
        part.accumulation_steps, part.random_states = self.accumulation_steps, self.random_states
        if self.num_items_in_batch is not None:
            part.num_items_in_batch = self.num_items_in_batch * _labelled_share(self.inputs, part.inputs)
        return part

    def _part(self, index: slice | Tensor, size: int) -> MicroBatch:
        inputs = self.fresh_inputs()
        for name, value in inputs.items():
            if isinstance(value, Tensor) and value.dim() > 0 and len(value) == size:
                inputs[name] = value[index if isinstance(index, slice) else index.to(value.device)]
            elif isinstance(value, list | tuple) and len(value) == size:
                inputs[name] = value[index] if isinstance(index, slice) else [value[i] for i in index.tolist()]
        count = len(range(size)[index]) if isinstance(index, slice) else len(index)
        fraction = count / size
        steps = self.accumulation_steps / fraction
        return MicroBatch(inputs, self.num_items_in_batch, steps, fraction=self.fraction * fraction)


def _labelled_share(whole: Mapping[str, Any], part: Mapping[str, Any]) -> Tensor | float:
    if not isinstance(whole.get("labels"), Tensor):
        return find_batch_size(part) / find_batch_size(whole)
    return part["labels"].ne(-100).sum() / whole["labels"].ne(-100).sum()
