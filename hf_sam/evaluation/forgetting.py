"""Forgetting in a second fine-tuning: the loss on the first task at matched training loss on the second."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

Point = tuple[float, float]  # training loss of the second task, test loss of the first


@dataclass(frozen=True)
class Matched:
    """
    The first-task loss of each replicate at one training loss of the second task.

    Args:
        target (`float`, *optional*): That training loss; `None` if there is none that all replicates reach.
        losses (`dict[str, dict[int, float]]`): First-task loss by start and replicate.
        unreached (`dict[str, list[int]]`): Replicates that never reach the target, by start.
    """

    target: float | None
    losses: dict[str, dict[int, float]]
    unreached: dict[str, list[int]]


def loss_at(points: Sequence[Point], target: float) -> float | None:
    """
    The lowest first-task loss at which a path of fine-tuning runs has the training loss `target`.

    Args:
        points (`Sequence[Point]`): By increasing learning rate, linearly interpolated.
        target (`float`): Training loss of the second task.

    Returns:
        `float` or `None`: `None` if the path never has that training loss.
    """
    found = [y for x, y in points if x == target]
    for (x0, y0), (x1, y1) in pairwise(points):
        if min(x0, x1) < target < max(x0, x1):
            found.append(y0 + (y1 - y0) * (target - x0) / (x1 - x0))
    return min(found, default=None)


def common_loss(paths: Sequence[Sequence[Point]]) -> float | None:
    """The lowest training loss that every path reaches; `None` if their ranges do not overlap."""
    lowest = max(min(x for x, _ in path) for path in paths)
    return lowest if all(max(x for x, _ in path) >= lowest for path in paths) else None


def match(paths: Mapping[str, Mapping[int, Sequence[Point]]], target: float | None = None) -> Matched:
    """
    First-task loss at matched training loss of the second task.

    Args:
        paths (`Mapping[str, Mapping[int, Sequence[Point]]]`): By start and replicate, one point per learning rate.
        target (`float`, *optional*): The training loss; by default the lowest that every replicate of every start
            reaches.
    """
    if target is None:
        target = common_loss([path for replicates in paths.values() for path in replicates.values()])
    losses: dict[str, dict[int, float]] = {name: {} for name in paths}
    unreached: dict[str, list[int]] = {}
    for name, replicates in paths.items():
        for replicate, path in replicates.items():
            loss = loss_at(path, target) if target is not None else None
            if loss is None:
                unreached.setdefault(name, []).append(replicate)
            else:
                losses[name][replicate] = loss
    return Matched(target, losses, unreached)
