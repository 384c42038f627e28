"""How the losses of parts of a batch combine to the loss of the batch, and per-example losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Trainer

from .update.batches import MicroBatch, infer_loss_combination

if TYPE_CHECKING:
    from .trainer import SAMTrainerMixin
    from .update.step import SharpnessAwareUpdate

# Maximum relative difference between the combined losses of parts and that of the batch, in float32 and in 16 bits.
TOLERANCE, TOLERANCE_16_BITS = 1e-3, 3e-2


class LossesOfParts:
    """Find out, once per run, how the losses of parts combine to the loss of the batch.

    Args:
        trainer (`SAMTrainerMixin`): The trainer.
        update (`SharpnessAwareUpdate`): The update of the run.
        compute_loss (`Callable`): Returns the trainer's `compute_loss`, without the hook of the current pass.
    """

    def __init__(
        self, trainer: SAMTrainerMixin, update: SharpnessAwareUpdate, compute_loss: Callable[[], Callable[..., Any]]
    ):
        self._trainer, self._update, self._compute_loss = trainer, update, compute_loss
        self._unverified: tuple[MicroBatch, int] | None = None

    @property
    def is_unverified(self) -> bool:
        """Whether the combination is assumed and must be verified with the loss of the next pass."""
        return self._unverified is not None

    def find_loss_combination(self, batch: MicroBatch, size: int, must_compute: bool = False) -> str:
        """Find how the losses of parts of `size` examples combine to the loss of the batch, by computing them.

        If every example has one label and the loss is the stock Trainer's, no extra pass is needed: the combination is
        assumed here and verified with the loss of the first pass, unless `must_compute`.

        Raises:
            ValueError: No combination fits, because the loss compares examples with each other (such as in-batch
                negatives), or the size of the batch is unknown.
        """
        config = self._update.config
        fields = "m, ascent_fraction and methods that choose examples"
        if not batch.size:
            raise ValueError(
                f"{fields} split batches, but the number of examples in this one is unknown: it has no tensor or list with one entry "
                "per example. Leave m and ascent_fraction out."
            )
        trainer, update = self._trainer, self._update
        default = "sum" if self._normalises_by_items(batch) else "examples"
        chunks = batch.chunks(size)
        if len(chunks) < 2:
            return default
        if not must_compute and self._has_stock_loss and _has_one_label_each(batch):
            self._unverified = (batch, size)  # very likely; verified in the first pass
            return default
        parts = [batch.part(indices) for indices in chunks]
        shares = {
            "sum": [1.0] * len(parts),
            "examples": [len(indices) / batch.size for indices in chunks],
            "labelled": [float(part.weights["labelled"]) for part in parts],
        }
        # The first of equally good combinations wins. If labels are spread evenly, a later batch must decide.
        default = "labelled" if default == "examples" and _has_several_labels_each(batch) else default
        shares = {default: shares[default], **shares}
        is_even = default == "labelled" and np.allclose(shares["labelled"], shares["examples"])
        if is_even and self._update.runner.loss_combination is not None:
            return default
        self._update.runner.is_loss_combination_known = not is_even
        with update.runner.preserving_state() as state:
            trainer.model.eval()
            try:
                whole, *losses = [self._loss_of(part, state) for part in [batch, *parts]]
                again = self._loss_of(batch, None)  # with other random numbers
            finally:
                trainer.model.train()
        is_rounded = (
            any(p.dtype.itemsize == 2 for p in update.parameters.trainable) or trainer.args.bf16 or trainer.args.fp16
        )
        tolerance = TOLERANCE_16_BITS if is_rounded else TOLERANCE
        way = infer_loss_combination(whole, losses, shares, tolerance)
        if way is not None:
            return way
        if abs(whole - again) > tolerance * abs(whole):  # the loss is random even in eval mode
            return default
        setting = (
            f"m={config.m}"
            if config.m
            else config.label
            if config.ascent_fraction in (None, 1)
            else (f"ascent_fraction={config.ascent_fraction}")
        )
        raise ValueError(
            f"{setting} splits batches, but the losses of the parts ({', '.join(f'{loss:.4g}' for loss in losses[:4])}) do not combine "
            f"to that of the batch ({whole:.4g}): the loss compares examples with each other, such as in-batch negatives, or has "
            "terms of the whole batch. Leave m and ascent_fraction out, and choose a method that uses whole batches."
        )

    def verify(self, loss: Tensor, logits: Tensor | None, labels: Any, batch: MicroBatch) -> None:
        """Verify the assumed combination with the loss of a pass; compute it if the loss is not a cross entropy."""
        (whole, size), self._unverified = self._unverified, None
        way = self.as_cross_entropy(loss, logits, labels, batch)
        self._update.runner.loss_combination = way or self.find_loss_combination(whole, size, must_compute=True)

    @torch.no_grad()
    def as_cross_entropy(self, loss: Tensor, logits: Tensor | None, labels: Any, batch: MicroBatch) -> str | None:
        """The combination for a loss that equals the cross entropy of examples or tokens; None for other losses."""
        if logits is None or not isinstance(labels, Tensor) or loss == 0 or logits.shape == (len(labels),) * 2:
            return None  # nothing to compare with, or possibly a loss between pairs of examples
        shifted = getattr(self._trainer, "_loss_shifts_labels", False)
        try:
            candidates = [("examples", per_example_losses(logits, labels, shifted).mean())]
            if not labels.is_floating_point():
                z, y = (logits[:, :-1], labels[:, 1:]) if shifted else (logits, labels)
                total = F.cross_entropy(z.float().flatten(0, -2), y.flatten(), reduction="sum", ignore_index=-100)
                candidates.append(("labelled", total / y.ne(-100).sum()))
                if batch.num_items_in_batch is not None:
                    candidates.insert(0, ("sum", total / batch.num_items_in_batch))
        except (RuntimeError, IndexError, TypeError, ValueError):
            return None
        tolerance = TOLERANCE_16_BITS / 10
        found = (way for way, own in candidates if bool((loss.float() - own).abs() <= tolerance * own.abs()))
        return next(found, None)

    @property
    def _has_stock_loss(self) -> bool:
        """Whether the loss is that of the stock Trainer."""
        return type(self._trainer).compute_loss is Trainer.compute_loss and self._trainer.compute_loss_func is None

    def _loss_of(self, batch: MicroBatch, state: Any) -> float:
        trainer = self._trainer
        if state is not None:
            self._update.runner.state.restore(state)
        with torch.no_grad(), trainer.compute_loss_context_manager():
            inputs = trainer._prepare_inputs(self._update.runner.changed_inputs.protected(batch))
            loss = self._compute_loss()(trainer.model, inputs, num_items_in_batch=batch.num_items_in_batch)
        return (loss[0] if isinstance(loss, tuple) else loss).item()

    def _normalises_by_items(self, batch: MicroBatch) -> bool:
        trainer = self._trainer
        takes_count = trainer.model_accepts_loss_kwargs and trainer.compute_loss_func is None
        return takes_count and batch.num_items_in_batch is not None


def _has_one_label_each(batch: MicroBatch) -> bool:
    labels = batch.inputs.get("labels")
    is_labelled = isinstance(labels, Tensor) and labels.dim() == 1 and len(labels) == batch.size
    return is_labelled and not batch.inputs.get("return_loss")


def _has_several_labels_each(batch: MicroBatch) -> bool:
    labels = batch.inputs.get("labels")
    return isinstance(labels, Tensor) and labels.dim() > 1 and not labels.is_floating_point()


def per_example_losses(logits: Tensor, labels: Tensor, shifted: bool = False) -> Tensor:
    """The loss of each example, shape `(batch,)`, to choose those that the perturbation increases most.

    Args:
        logits (`Tensor`): `(batch, classes)`, or `(batch, tokens, vocabulary)`.
        labels (`Tensor`): Class indices with -100 ignored, or floats of the shape of `logits`: several 0/1 labels per
            example, or one regression target.
        shifted (`bool`, *optional*, defaults to `False`): Token t is predicted at position t - 1 (causal models).
    """
    if labels.is_floating_point():
        targets = labels.reshape(logits.shape)
        loss = F.binary_cross_entropy_with_logits if logits.shape[-1] > 1 else F.mse_loss
        return loss(logits.float(), targets.float(), reduction="none").flatten(1).mean(1)
    if shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    losses = F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), reduction="none", ignore_index=-100)
    losses, counted = losses.reshape(len(labels), -1), labels.ne(-100).reshape(len(labels), -1)
    return losses.sum(1) / counted.sum(1).clamp(min=1)
