"""Merging of checkpoints fine-tuned from the same start: linear interpolation, averaging, task arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..update.roles import head_parameters

State = Mapping[str, Tensor]


def mergeable_state(model: nn.Module) -> dict[str, Tensor]:
    """
    The tensors that are merged, by name: all floating-point parameters and buffers except a classification head.

    The head of a classifier or regressor was newly initialized for each fine-tuning run, so it does not fit another
    model. The output embeddings of a language model belong to the common start and are merged.
    """
    has_output = getattr(model, "get_output_embeddings", lambda: None)() is not None
    left_out = set() if has_output else head_parameters(model)
    named: Iterable[tuple[str, Any]] = [*model.named_parameters(), *model.named_buffers()]
    return {name: value.detach() for name, value in named if value.is_floating_point() and name not in left_out}


def check_same_shapes(first: State, second: State, name: str = "the other checkpoint") -> None:
    """
    Check that two checkpoints have tensors of the same names and shapes.

    Raises:
        ValueError: They do not, so they cannot come from the same start.
    """
    if first.keys() != second.keys():
        differing = sorted(first.keys() ^ second.keys())
        raise ValueError(f"{name} has a different architecture: its tensors differ ({', '.join(differing[:3])}).")
    for key, value in first.items():
        if value.shape != second[key].shape:
            raise ValueError(f"{name}: {key} has the shape {tuple(second[key].shape)} instead of {tuple(value.shape)}.")


def interpolate(first: State, second: State, t: float) -> dict[str, Tensor]:
    """`(1 - t) first + t second`, tensor by tensor; `t = 0.5` is the average."""
    return {name: value.lerp(second[name].to(value), t) for name, value in first.items()}


def task_arithmetic(start: State, tuned: Sequence[State], scale: float) -> dict[str, Tensor]:
    """`start + scale * sum_k (tuned_k - start)` (Ilharco et al. 2023, arXiv 2212.04089); `scale = 1/k` averages."""
    return {
        name: value + scale * sum(state[name].to(value) - value for state in tuned) for name, value in start.items()
    }
