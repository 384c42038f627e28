"""Ascents of later papers, each with its own formula."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..suggestions import did_you_mean
from .ascents import Geometry
from .base import Ascent, Needs, Step
from .fields import number, whole
from .geometry import steepest

if TYPE_CHECKING:
    from ..update.vector import Vector


@dataclass(frozen=True)
class LossBudget(Ascent):
    """The radius at which the linearized loss rises by sigma, at most rho (LE-SAM, Wang et al. 2026, arXiv 2605.10183).

    `eps = min(sigma_t / ||g||, rho) g / ||g||`, since the linearized loss rises by `rho ||g||`.

    Args:
        sigma (`float`): The budget of a whole step, in units of the loss; each part of a step has its share of it.
        decay_start (`float`): Fraction of the run after which sigma decays to 0 along a cosine; 1 for never.
    """

    sigma: float = number(0.1, 0, above=True)
    decay_start: float = number(0.8, 0, 1)

    def eps(self, g: Vector, step: Step) -> Vector:
        sigma = self.sigma * step.share
        if step.progress > self.decay_start:
            elapsed = (step.progress - self.decay_start) / (1 - self.decay_start)
            sigma *= (1 + math.cos(math.pi * elapsed)) / 2
        return steepest(g, step.rho, sigma=sigma)

    def gradient_in(self, displacement: Tensor) -> Tensor:
        return displacement


@dataclass(frozen=True)
class Preconditioned(Ascent):
    """Perturb along `D^-1 g`, with `D = sqrt(exp_avg_sq) + floor`: AdamW's own geometry.

    After Singh et al. 2025, arXiv 2502.02407. The Euclidean norm of `eps` is rho, as in the other methods. D is 1
    before the optimizer's first step.

    Args:
        floor (`float`): Added to `sqrt(exp_avg_sq)`, relative to its root mean square, so that weights that rarely get
            a gradient do not take up the whole perturbation.

    Raises:
        ValueError: The optimizer has stepped, but has no readable `exp_avg_sq`.
    """

    needs: ClassVar = Needs.GRADIENT | Needs.OPTIMIZER_STATE

    floor: float = number(1e-3, 0, above=True)

    def eps(self, g: Vector, step: Step) -> Vector:
        squares = step.optimizer_state("exp_avg_sq")
        if squares is None and not step.is_first:
            raise ValueError(
                "method='precond' scales the perturbation by the optimizer's second moments, but "
                f"{step.optimizer_name} has no readable ones. Use an optimizer with `exp_avg_sq` (optim='adamw_torch')."
            )
        if squares is not None:
            scale = squares.over(g).sqrt()
            scale += self.floor * scale.norm() / math.sqrt(scale.size())
            g = g.over(scale)
            g /= scale
        return steepest(g, step.rho)


@dataclass(frozen=True)
class AboveAverage(Geometry):
    """SAM in steps whose ||g||^2 exceeds its running mean by c_t standard deviations (AE-SAM).

    Jiang et al. 2023, arXiv 2304.14647. The running mean and variance are updated with `n = ||g||^2`, and the step is
    perturbed if `n >= mean + c_t sd`. c_t goes linearly from `lambda_2` to `lambda_1`, so few steps are perturbed at
    first and most at the end. All other steps take one pass and step along g. The decision reads one number from the
    device.

    Args:
        decay (`float`): Decay of the running mean and variance, which start at the first n and at 0.
        lambda_1 (`float`): c at the end of the run.
        lambda_2 (`float`): c at the start of the run.
    """

    needs: ClassVar = Needs.GRADIENT | Needs.WHOLE_STEP
    scalars: ClassVar = ("mean", "variance")
    may_skip: ClassVar = True

    decay: float = number(0.9, 0, 1, below=True)
    lambda_1: float = number(-1.0)
    lambda_2: float = number(1.0)

    def eps(self, g: Vector, step: Step) -> Vector | None:
        n = g.norm() ** 2
        mean, variance = step.memory.get("mean", n), step.memory.get("variance", torch.zeros_like(n))
        mean = self.decay * mean + (1 - self.decay) * n
        variance = self.decay * variance + (1 - self.decay) * (n - mean) ** 2
        step.memory["mean"], step.memory["variance"] = mean, variance
        c = step.progress * self.lambda_1 + (1 - step.progress) * self.lambda_2
        return self.steepest(g, step) if n >= mean + c * variance.sqrt() else None


@dataclass(frozen=True)
class Centred(Geometry):
    """Perturb along the centered gradient (GCSAM, Hassan et al. 2025, arXiv 2501.11584).

    The mean over all dimensions but the first is subtracted; tensors with one dimension stay as they are. The authors'
    code divides by the norm before centering; here `||eps||` is rho.
    """

    needs: ClassVar = Needs.GRADIENT | Needs.WHOLE_TENSORS

    def eps(self, g: Vector, step: Step) -> Vector:
        return self.steepest(g.map_lists_(_centre_), step)

    def gradient_in(self, displacement: Tensor) -> None:
        return None


@dataclass(frozen=True)
class SparseByScore(Geometry):
    """Perturb the coordinates of each tensor whose |z-score| exceeds a quantile (ZSharp, Yun 2025, arXiv 2505.02369).

    z is computed within each tensor with more than one dimension; other tensors are not filtered. `||eps||` is rho over
    all tensors together; in the author's code, it is rho for each tensor.

    Args:
        quantile (`float`): Fraction of each tensor's coordinates to leave out.
    """

    needs: ClassVar = Needs.GRADIENT | Needs.WHOLE_TENSORS

    quantile: float = number(0.95, 0, 1, below=True)

    def eps(self, g: Vector, step: Step) -> Vector:
        return self.steepest(g.map_lists_(self._keep_outliers_), step)

    def _keep_outliers_(self, tensors: list[Tensor]) -> None:
        for stack in _stacks(tensors):
            exact = stack.flatten(1).float()  # (tensors, numbers)
            score = (exact - exact.mean(1, keepdim=True)).abs()  # |z| times the tensor's deviation: the same order
            rank = max(1, math.ceil(self.quantile * score.shape[1]))
            stack *= (score > score.kthvalue(rank, dim=1, keepdim=True).values).view(stack.shape)

    def gradient_in(self, displacement: Tensor) -> None:
        return None


@dataclass(frozen=True)
class TailClasses(Geometry):
    """Perturb only for examples of rare classes (ImbSAM, Zhou et al. 2023, arXiv 2308.07815).

    The step uses the gradient of the common examples at `w` plus `tail_weight` times that of the rare examples at
    `w + eps`, with eps along the gradient of the rare examples. Which examples are rare is given by `tail_classes`, by
    the class counts of the training labels, or by an entry of the batch.

    Args:
        tail_classes (`list[int]`, *optional*): The rare classes.
        tail_below (`int`): Without `tail_classes`, classes with fewer training examples than this are rare.
        part (`str`, *optional*): Name of a batch entry that is 1 for rare examples and 0 for the others, instead of
            classes; needs `remove_unused_columns=False`.
        tail_weight (`float`): Weight of the rare examples' loss. The authors' code uses 2.
    """

    may_skip: ClassVar = True

    tail_classes: Any = field(default=None, metadata={"check": lambda name, value: _class_list(name, value)})
    tail_below: int = whole(20, 0)
    part: str | None = None
    tail_weight: float = number(1.0, 0, above=True)

    def eps(self, g: Vector, step: Step) -> Vector:
        return self.steepest(g, step)

    def resolved(self, train_dataset: Any) -> TailClasses:
        """Return the ascent with the rare classes, from the class counts of the training labels."""
        if self.part is not None or self.tail_classes is not None:
            return self
        counts = Counter(_labels_of(train_dataset))
        return replace(self, tail_classes=sorted(c for c, count in counts.items() if count < self.tail_below))

    def perturbed_examples(self, inputs: Mapping[str, Any], step: Step) -> Tensor:
        if self.part is not None:
            if not isinstance(inputs.get(self.part), Tensor):
                raise ValueError(
                    f"part={self.part!r} is not a tensor in the batch.{did_you_mean(self.part, inputs)} The batch has: "
                    f"{', '.join(map(str, inputs))}. Set remove_unused_columns=False so that the Trainer keeps the column."
                )
            return inputs[self.part].flatten().nonzero().flatten().cpu()
        labels = inputs.get("labels")
        if not isinstance(labels, Tensor) or labels.dim() != 1 or labels.is_floating_point():
            raise ValueError(
                "method='imbsam' needs one class per example in `labels`. Without classes, name a batch entry that is 1 for the "
                "rare examples: options={'part': 'is_rare'}."
            )
        return torch.isin(labels, torch.tensor(self.tail_classes, device=labels.device)).nonzero().flatten().cpu()


def _stacks(tensors: list[Tensor]) -> Iterator[Tensor]:
    """Tensors with more than one dimension, stacked by shape as `(tensors, ...)`. You may change the stacks in place.

    There is one stack per shape, so their number does not grow with the depth of the model.
    """
    groups: dict[torch.Size, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.dim() > 1 and tensor.numel() > 1:
            groups.setdefault(tensor.shape, []).append(tensor)
    for alike in groups.values():
        if len(alike) == 1:
            yield alike[0].unsqueeze(0)
            continue
        stack = torch.stack(alike)
        yield stack
        torch._foreach_copy_(alike, list(stack.unbind()))


def _centre_(tensors: list[Tensor]) -> None:
    for stack in _stacks(tensors):  # (tensors, outputs, ...)
        # On the CPU, the mean of a 16-bit tensor copies it to float32: in parts, the copy is small.
        parts = 16 if stack.device.type == "cpu" and stack.dtype.itemsize == 2 else 1
        for rows in stack.split(max(1, stack.shape[1] // parts), dim=1):
            rows -= rows.mean(dim=tuple(range(2, stack.dim())), keepdim=True)


def _class_list(name: str, value: Any) -> list[int] | None:
    if value is None:
        return None
    if not isinstance(value, list | tuple) or not all(isinstance(c, int) and not isinstance(c, bool) for c in value):
        raise ValueError(f"{name}={value!r} must be a list of class numbers.")
    return list(value)


def _labels_of(train_dataset: Any) -> list[int]:
    """The class of every training example."""
    try:
        names = getattr(train_dataset, "column_names", None)
        if names is not None:
            return [int(label) for label in train_dataset[next(n for n in ("labels", "label") if n in names)]]
        rows = (train_dataset[i] for i in range(len(train_dataset)))
        return [int(row["labels"] if "labels" in row else row["label"]) for row in rows]
    except (TypeError, KeyError, StopIteration, ValueError, AttributeError) as error:
        raise ValueError(
            "method='imbsam' counts the training labels to find the rare classes, but this data set has no usable column `labels` "
            "or `label`. Name the classes: options={'tail_classes': [3, 7]}."
        ) from error
