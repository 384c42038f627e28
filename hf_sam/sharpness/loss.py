"""The loss on a fixed subset as a pure function of one flat vector of weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from ..update.parameters import TrainedParameters
from .subset import Batch, Subset, forward_arguments
from .undisturbed import check_whole, undisturbed

# Relative difference above which the loss of a batch is not the mean over its labels.
MEAN_TOLERANCE = 1e-4
# Smaller differences come from padding and the order of summation.
ROUNDING = 1e-5


class SubsetLoss:
    r"""
    `L(w)`: the mean loss over all labels of a fixed subset, as a function of the flat vector `w` of shape `(P,)`.

    The loss is the model's own, in evaluation mode and without label smoothing, weighted by labels (tokens for language
    models), so that the batch size and the number of processes change only the rounding. Every evaluation passes its
    own weights to the model (`torch.func.functional_call`): the model's weights, buffers, gradients, modes and random
    state do not change. Under `torch.distributed`, every process takes a share of the batches and all get the same
    result.

    Args:
        model (`nn.Module`):
            Any transformers model that returns a loss for labelled inputs, not wrapped for distributed training. A
            PEFT model is measured in the space of its trainable factors; merge it first to measure the full weights.
        subset ([`Subset`]):
            The examples.
        perturb (`str` or `list[str]`, *optional*, defaults to `"all"`):
            The trainable parameters that make up `w`, as in [`SAMConfig`].
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            The dtype of all computation, whatever the dtype of the model.
        progress (`Callable[[int], Any]`, *optional*):
            Called with 1 after each batch, such as the `update` of a tqdm bar.

    Attributes:
        weights (`Tensor`): The model's own `w`, shape `(P,)`.
        num_labels (`int`): Number of labels (tokens) in the mean.
        passes (`dict[str, float]`): Passes over the subset made so far, by kind.

    Raises:
        ValueError: The model is sharded or quantised, or its loss is missing or not a mean over its labels.
    """

    def __init__(
        self,
        model: nn.Module,
        subset: Subset,
        *,
        perturb: str | Sequence[str] = "all",
        dtype: torch.dtype = torch.float32,
        progress: Callable[[int], Any] | None = None,
    ):
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"dtype={dtype} is too coarse for differences between losses: use torch.float32 or torch.float64."
            )
        check_whole(model)
        self.model, self.subset, self.dtype, self.progress = model, subset, dtype, progress
        parameters = TrainedParameters(model, perturb)
        selected = {parameters.names[p]: p for p in parameters.selected}
        self.shapes = {name: p.shape for name, p in selected.items()}
        self.weights = torch.cat([p.detach().to(dtype).flatten() for p in selected.values()])
        # Everything outside `w`. Buffers are copied because a forward pass may write into them.
        self._frozen = {name: _cast(p.detach(), dtype) for name, p in model.named_parameters() if name not in selected}
        self.buffers = {name: _cast(buffer.clone(), dtype) for name, buffer in model.named_buffers()}
        self.device = self.weights.device
        self.passes = {"forward": 0.0, "gradient": 0.0, "curvature": 0.0}
        self._options = {"use_cache": False} if "use_cache" in forward_arguments(model) else {}
        self._distributed = True
        self._whole = len(subset)
        self._shifted = self._labels_are_shifted()
        self._set_subset(subset)
        if self.num_labels == 0:
            raise ValueError(
                "The subset has no labels to count: all are -100, which the loss ignores. Choose other examples."
            )
        self.passes = dict.fromkeys(self.passes, 0.0)

    # --- the function ----------------------------------------------------------------------------------------------

    def __call__(self, weights: Tensor | None = None) -> float:
        """`L(w)`, at the model's own weights by default."""
        self.count("forward")
        weights = self.weights if weights is None else weights
        (loss,) = self.mean_over_batches(lambda batch: [self.batch_loss(weights, batch)[0].double()], grad=False)
        return loss.item()

    def gradient(self, weights: Tensor | None = None) -> tuple[float, Tensor]:
        """`L(w)` and its gradient, shape `(P,)`."""
        self.count("gradient")
        leaf = self.leaf(weights)

        def loss_and_gradient(batch: Batch) -> list[Tensor]:
            loss, _ = self.batch_loss(leaf, batch)
            (gradient,) = torch.autograd.grad(loss, leaf)
            return [loss.detach().double(), gradient]

        loss, gradient = self.mean_over_batches(loss_and_gradient)
        return loss.item(), gradient

    # --- the same function on other examples or buffers --------------------------------------------------------------

    def on(self, subset: Subset) -> SubsetLoss:
        """The same function over other examples, computed by this process alone; passes are counted together."""
        other = copy.copy(self)
        other._distributed = False
        other._set_subset(subset)
        return other

    def with_buffers(self, buffers: dict[str, Tensor]) -> SubsetLoss:
        """The same function with other buffers, such as running statistics."""
        other = copy.copy(self)
        other.buffers = buffers
        return other

    def views(self, vector: Tensor) -> dict[str, Tensor]:
        """Split a flat vector of shape `(P,)` into views by parameter name, in the parameters' shapes."""
        parts = vector.split([shape.numel() for shape in self.shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    @property
    def rank_and_world(self) -> tuple[int, int]:
        """The rank of this process and the number of processes that share the work."""
        if self._distributed and dist.is_available() and dist.is_initialized():
            return dist.get_rank(), dist.get_world_size()
        return 0, 1

    # --- building blocks of operators ------------------------------------------------------------------------------

    @property
    def first_batch(self) -> Batch:
        """A batch for checks."""
        return self._batches[0]

    def leaf(self, weights: Tensor | None = None) -> Tensor:
        """A flat vector of weights to differentiate with respect to."""
        return (self.weights if weights is None else weights).detach().requires_grad_()

    def batch_loss(self, weights: Tensor, batch: Batch) -> tuple[Tensor, Any]:
        """The sum of the losses over the labels of one batch, and the model's outputs."""
        outputs = functional_call(
            self.model,
            {**self._frozen, **self.buffers, **self.views(weights)},
            kwargs={
                **{name: _cast(value.to(self.device), self.dtype) for name, value in batch.items()},
                **self._options,
            },
        )
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs[0]
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ValueError(
                "The model returned no loss. Use examples with a 'labels' (or 'label') column and a model with a head "
                f"for the task; this batch has {', '.join(batch)}."
            )
        return loss.squeeze() * _count_labels(batch, self._shifted), outputs

    def mean_over_batches(self, parts: Callable[[Batch], list[Tensor]], *, grad: bool = True) -> list[Tensor]:
        """Add up what `parts` returns for each batch, over all processes, and divide by the number of labels."""
        rank, world = self.rank_and_world
        totals: list[Tensor] | None = None
        with undisturbed(self.model), torch.set_grad_enabled(grad):
            for index, batch in enumerate(self._batches):
                if index % world != rank:
                    continue
                values = parts(batch)
                totals = values if totals is None else [a.add_(b) for a, b in zip(totals, values, strict=True)]
                if self.progress is not None:
                    self.progress(1)
            if totals is None:  # more processes than batches: this one adds nothing, in the right shapes
                totals = [torch.zeros_like(value) for value in parts(self._batches[0])]
        if world > 1:
            for total in totals:
                dist.all_reduce(total)
        return [total / self.num_labels for total in totals]

    def count(self, kind: str, number: int = 1) -> None:
        """Count `number` passes over the examples of this function, in units of passes over the whole subset."""
        self.passes[kind] += number * len(self.subset) / self._whole

    # --- labels ----------------------------------------------------------------------------------------------------

    def _set_subset(self, subset: Subset) -> None:
        self.subset = subset
        # A batch without labels has no mean loss (0 / 0) and adds nothing to the sum.
        self._batches = [batch for batch in subset if _count_labels(batch, self._shifted)]
        self.num_labels = sum(_count_labels(batch, self._shifted) for batch in self._batches)

    def _labels_are_shifted(self) -> bool:
        """Whether the model predicts the label at the next position, so that the first label of a row does not count.

        Models do not declare this, so it is tested: the loss of several examples together must be the mean over their
        labels. The examples with the fewest and the most labels show it; if all have the same number, it does not
        matter.
        """
        by_length = sorted(self.subset.examples, key=_length)
        examples = by_length if len(by_length) < 4 else [*by_length[:2], *by_length[-2:]]
        together = Subset(examples, self.subset.data_collator, batch_size=len(examples))
        errors = {}
        for self._shifted in (False, True):
            loss = self.on(together)
            alone = [self.on(one) for one in together.chunks(1)]
            if loss.num_labels:
                mean = sum(one() * one.num_labels for one in alone if one.num_labels) / loss.num_labels
                errors[self._shifted] = abs(loss() - mean) / max(abs(mean), 1e-3)
        likely = "CausalLM" in str(getattr(self.model, "loss_type", None))
        shifted = min(errors, key=lambda key: (errors[key] > ROUNDING, key != likely, errors[key]), default=likely)
        if errors.get(shifted, 0.0) < MEAN_TOLERANCE:
            return shifted
        if not np.isfinite(list(errors.values())).all():
            raise ValueError("The loss is NaN or infinite, as after training that diverged.")
        raise ValueError(
            "The loss of a batch is not the mean over its labels, so sharpness would depend on the batch size. Contrastive and "
            "auxiliary losses, which depend on which examples share a batch, are not supported."
        )


def _count_labels(batch: Batch, shifted: bool) -> int:
    """The number of labels in the mean over one batch: all except -100, and all elements of real-valued targets."""
    labels = next((value for name, value in batch.items() if name in ("labels", "label")), None)
    if labels is None:
        return len(next(iter(batch.values())))  # one loss per example, as in question answering
    if labels.is_floating_point():
        return labels.numel()
    return int(((labels[..., 1:] if shifted and labels.ndim > 1 else labels) != -100).sum())


def _length(example: Mapping[str, Any]) -> int:
    return sum(int((np.asarray(value) != -100).sum()) for value in example.values())


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
