"""A micro-batch or a part of one: inputs, loss normalisation and the state in which its pass starts."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .contents import is_strided
from .replay import Snapshot

# How the losses of parts combine to the loss of the batch: as a sum, or as a mean weighted by the number of examples or
# of labelled items.
LOSS_COMBINATIONS = ("sum", "examples", "labelled")


@dataclass
class MicroBatch:
    """The arguments of one `training_step`, kept so that the pass can be repeated.

    Args:
        inputs (`Mapping[str, Any]`): The data collator's output.
        num_items_in_batch (`Tensor` or `int`, *optional*): Labelled items in the whole window; the divisor of the loss
            for models that accept it.
        accumulation_steps (`float`): The divisor of the loss for all other models.
        before (`Snapshot`, *optional*): The state in which the clean pass started.
        fraction (`float`, *optional*, defaults to 1.0): The share of the Trainer's micro-batch.
        weights (`Mapping[str, float | Tensor]`, *optional*): The factor of the loss of this part for each of
            `LOSS_COMBINATIONS`.
        kept (`Any`): Output of the clean pass for the descent: the loss of each example, or the result of
            `Descent.keep`.
    """

    inputs: Mapping[str, Any]
    num_items_in_batch: Tensor | int | None
    accumulation_steps: float
    before: Snapshot | None = None
    fraction: float = 1.0
    weights: Mapping[str, float | Tensor] = field(default_factory=lambda: dict.fromkeys(LOSS_COMBINATIONS, 1.0))
    kept: Any = field(default=None, repr=False)

    def fresh_inputs(self) -> Any:
        """A copy of the containers with the same tensors, so that a pass may pop labels."""
        return _copied(self.inputs)

    def without(self, name: str | None) -> MicroBatch:
        """The batch without the input `name`, which the model does not accept."""
        if name is None:
            return self
        return dataclasses.replace(self, inputs={key: value for key, value in self.inputs.items() if key != name})

    @property
    def size(self) -> int | None:
        """Number of examples: the most common length of tensors, or else of lists; None if there are neither."""
        return batch_size(self.inputs)

    @property
    def share(self) -> float:
        """Fraction of the optimizer step's examples on this process, if all micro-batches of the step are of one size."""
        return self.fraction / self.accumulation_steps

    def chunks(self, m: int) -> list[Tensor]:
        """Indices of consecutive parts of `m` examples; the last may be smaller."""
        return list(torch.arange(self.size or 0).split(m))

    def part(self, indices: Tensor) -> MicroBatch:
        """The examples at `indices`, shape `(k,)`, weighted so that the losses of all parts sum to the batch's."""
        return self._select(indices, lambda share, labelled: {"sum": 1.0, "examples": share, "labelled": labelled})

    def sample(self, indices: Tensor) -> MicroBatch:
        """The examples at `indices`, weighted so that the loss estimates that of the whole batch."""
        return self._select(indices, lambda share, labelled: {"sum": 1 / labelled, "examples": 1.0, "labelled": 1.0})

    def _select(self, indices: Tensor, weights: Callable[[float, Any], dict[str, Any]]) -> MicroBatch:
        inputs = self.fresh_inputs()
        _take(inputs, indices, self.size)
        share = len(indices) / self.size
        factors = weights(share, labelled_share(self.inputs, inputs, share))
        weights = {way: self.weights[way] * factor for way, factor in factors.items()}
        return dataclasses.replace(self, inputs=inputs, fraction=self.fraction * share, weights=weights)

    def times(self, factor: float) -> MicroBatch:
        """The batch with its loss multiplied by `factor`."""
        weights = {way: weight * factor for way, weight in self.weights.items()}
        return dataclasses.replace(self, weights=weights)


def checked_indices(indices: Any, method: object, name: str) -> Tensor:
    """The indices of examples that a method has chosen.

    Raises:
        ValueError: They are not a 1-dim tensor of whole numbers; the message names the method.
    """
    is_valid = isinstance(indices, Tensor) and indices.dim() == 1 and not indices.is_floating_point()
    if not is_valid or indices.dtype == torch.bool:
        raise ValueError(
            f"{type(method).__name__}.{name} must return a 1-dim tensor of the examples' indices, or None, not {indices!r}. Use "
            "torch.tensor(list_of_indices), or mask.nonzero().flatten()."
        )
    return indices


class ChangedInputs:
    """Protect batches from passes that change them in place, for example by normalising pixels.

    The first batch of each layout is copied and compared after its pass. From then on, batches of layouts that passes
    change are always copied, others never. For the latter, version counters of tensors reveal later changes.
    """

    def __init__(self):
        self._changes: dict[tuple, bool] = {}

    def protect(self, batch: MicroBatch) -> Callable[[], bool]:
        """Call before the clean pass and its result afterwards, which restores the inputs, or returns False."""
        layout, tensors = _layout(batch.inputs), list(_tensors(batch.inputs))
        kept = _deep_copy(batch.inputs) if self._changes.get(layout, True) else None
        fingerprints = [_fingerprint(t) for t in tensors]

        def restore_inputs() -> bool:
            changed = [_fingerprint(t) for t in tensors] != fingerprints
            if layout not in self._changes:
                changed = changed or not _same(batch.inputs, kept)
            self._changes[layout] = self._changes.get(layout, False) or changed
            if self._changes[layout] and kept is not None:
                batch.inputs = kept
                return True
            return not changed

        return restore_inputs

    def protected(self, batch: MicroBatch) -> Any:
        """Inputs for a pass that other passes follow."""
        return _deep_copy(batch.inputs) if self._changes.get(_layout(batch.inputs)) else batch.fresh_inputs()


def _layout(inputs: Any) -> tuple:
    names = tuple(map(str, inputs)) if isinstance(inputs, Mapping) else ()
    return names, tuple((t.dtype, t.dim()) for t in _tensors(inputs))


def _fingerprint(tensor: Tensor) -> tuple:
    """A value that most in-place changes of the tensor change."""
    return tensor._version if not tensor.is_inference() else 0, tensor.requires_grad, tensor.grad is None


def _deep_copy(inputs: Any) -> Any:
    """A deep copy that preserves shared memory; entries that cannot be copied are kept."""
    memo: dict = {}

    def copied(value: Any) -> Any:
        if type(value) in (list, tuple):
            return type(value)(map(copied, value))
        if isinstance(value, MutableMapping):
            new = copy.copy(value)
            for key, entry in value.items():
                new[key] = copied(entry)
            return new
        try:
            return copy.deepcopy(value, memo)
        except Exception:  # an open file, a lock, a tensor with a graph
            return value.detach().clone() if isinstance(value, Tensor) else value

    return copied(inputs)


def _same(value: Any, other: Any) -> bool:
    """Whether two entries are equal, as far as this can be checked."""
    if isinstance(value, Tensor):
        is_equal = not is_strided(value) or torch.equal(value.detach(), other.detach())
        return value.requires_grad == other.requires_grad and is_equal
    if isinstance(value, Mapping):
        return value.keys() == other.keys() and all(_same(v, other[key]) for key, v in value.items())
    if isinstance(value, list | tuple):
        return len(value) == len(other) and all(map(_same, value, other))
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return value == other or value != value  # NaN
    if isinstance(value, np.ndarray):
        return bool(np.array_equal(value, other))
    return hasattr(value, "__dict__") and _same(vars(value), vars(other))


def batch_size(inputs: Any) -> int | None:
    """The most common first dimension of tensors at any depth; without tensors, the most common length of lists."""
    lengths = [len(t) for t in _tensors(inputs) if t.dim() > 0]
    if not lengths and isinstance(inputs, Mapping):
        lengths = [len(v) for v in inputs.values() if isinstance(v, list | tuple)]
    return max(dict.fromkeys(lengths), key=lengths.count) if lengths else None


def labelled_share(whole: Mapping[str, Any], part: Mapping[str, Any], share: float) -> Tensor | float:
    """The part's share of the labelled items, or `share` (of the examples) if labels are not a tensor."""
    labels, own = (inputs.get("labels") if isinstance(inputs, Mapping) else None for inputs in (whole, part))
    if not isinstance(labels, Tensor) or not isinstance(own, Tensor) or labels.dim() < 1:
        return share
    return own.ne(-100).sum().double() / labels.ne(-100).sum()


def infer_loss_combination(
    whole: float, parts: list[float], shares: Mapping[str, list[float]], tolerance: float
) -> str | None:
    """The entry of `LOSS_COMBINATIONS` that gives the loss of the batch from those of its parts; None if none does.

    Args:
        whole (`float`): The loss of the batch.
        parts (`list[float]`): The loss of each part.
        shares (`Mapping[str, list[float]]`): The weight of each part, for each combination to try.
        tolerance (`float`): Maximum relative difference, for rounding.
    """
    errors = {
        way: abs(sum(w * loss for w, loss in zip(weights, parts, strict=True)) - whole)
        for way, weights in shares.items()
    }
    best = min(errors, key=errors.get)
    scale = max(abs(whole), *(abs(loss) for loss in parts), 1e-8)
    return best if errors[best] <= tolerance * scale and not math.isnan(errors[best]) else None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _tensors(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _tensors(entry)


def _copied(value: Any) -> Any:
    """Copy containers, but not their entries."""
    if isinstance(value, MutableMapping):
        new = copy.copy(value)
        for key, entry in value.items():
            new[key] = _copied(entry)
        return new
    if type(value) in (list, tuple):
        return type(value)(_copied(entry) for entry in value)
    return value


def _take(inputs: Any, indices: Tensor, size: int) -> None:
    """Keep only the examples at `indices` in every entry of length `size`, in place."""
    for name, value in list(inputs.items()) if isinstance(inputs, MutableMapping) else []:
        inputs[name] = _taken(value, indices, size)


def _taken(value: Any, indices: Tensor, size: int) -> Any:
    if isinstance(value, Tensor):
        return value[indices.to(value.device)] if value.dim() > 0 and len(value) == size else value
    if isinstance(value, MutableMapping):
        _take(value, indices, size)
    elif isinstance(value, list | tuple):
        if any(isinstance(entry, Tensor) and entry.dim() > 0 and len(entry) == size for entry in value):
            return type(value)(_taken(entry, indices, size) for entry in value)
        if len(value) == size:
            return [value[i] for i in indices.tolist()]
    elif isinstance(value, np.ndarray) and value.ndim > 0 and len(value) == size:
        return value[indices.numpy()]
    return value
