"""One pass of a Trainer: its own `training_step`, whose loss is observed or changed if the method needs that."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .engines.base import loss_instead_of_backward
from .losses_of_parts import TOLERANCE_16_BITS, LossesOfParts, per_example_losses
from .methods.base import Needs
from .update.batches import MicroBatch
from .update.parameters import Gradients
from .update.second_order import add_hessian_vector_product, twice_differentiable_attention

if TYPE_CHECKING:
    from .trainer import SAMTrainerMixin
    from .update.replay import Snapshot
    from .update.step import SharpnessAwareUpdate


class TrainerPasses:
    """The implementation of `hf_sam.update.runner.Passes` for a trainer.

    Args:
        trainer (`SAMTrainerMixin`): The trainer.
        training_step (`Callable`): The base trainer's `training_step`.
    """

    def __init__(self, trainer: SAMTrainerMixin, training_step: Callable[..., Tensor]):
        self._trainer, self._training_step = trainer, training_step
        self._outputs: Any = None
        self._hook = None
        self._has_checked_logits = False
        self._compute_loss: Callable[..., Any] | None = None

    def start(self, update: SharpnessAwareUpdate) -> None:
        """Prepare for the update of a run."""
        self._update = update
        self._needs_logits = bool(update.needs & Needs.LOGITS)
        self._changes_losses = self._needs_logits or bool(update.needs & Needs.SUBSET)
        self._parts = LossesOfParts(self._trainer, update, lambda: self._compute_loss or self._trainer.compute_loss)
        if update.runner.takes_parts or update.needs & Needs.LOGITS:
            self._hook = self._trainer.model.register_forward_hook(self._output_hook())

    def end(self) -> None:
        """Remove the hook from the model."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def was_skipped(self) -> bool:
        """Whether the optimizer skipped its last step because of an fp16 overflow."""
        return bool(self._trainer.accelerator.optimizer_step_was_skipped)

    # --- one pass ----------------------------------------------------------------------------------------------------

    def run(self, model: nn.Module, batch: MicroBatch, *, synced: bool, is_ascent: bool) -> Tensor:
        """Run one forward and backward of the base trainer, accumulating gradients in `p.grad`, and return the loss.

        Args:
            model (`nn.Module`): The model as wrapped by the trainer.
            batch (`MicroBatch`): The micro-batch.
            synced (`bool`): Synchronise gradients if the Trainer would for this micro-batch; otherwise never.
            is_ascent (`bool`): The gradients determine the perturbation; otherwise the optimizer steps along them.
        """
        trainer, update = self._trainer, self._update
        is_clean = is_ascent and not update.runner.is_repeating
        # Through DDP's wrapper the loss does not depend on the logits, so their gradients need the bare model.
        reaches_logits = is_clean and self._needs_logits
        module = trainer.model if reaches_logits else model
        change = self._loss_hook(batch, is_clean)
        trainer.current_gradient_accumulation_steps = batch.accumulation_steps
        context = update.engine.ascent_pass if is_ascent else update.engine.descent_pass
        inputs = update.runner.changed_inputs.protected(batch) if update.runner.is_repeating else batch.fresh_inputs()
        before = batch.before if is_clean else None
        with (
            context(module, synced) as wrapped,
            self._loss_changed(batch, change, before),
            self._no_generation(),
        ):
            loss = self._training_step(wrapped, inputs, batch.num_items_in_batch)
        if synced and reaches_logits:
            update.engine.average_gradients(update.parameters.in_model)
        return loss

    def _loss_hook(self, batch: MicroBatch, is_clean: bool) -> Callable[[Tensor, Any], Tensor] | None:
        """The hook for the loss of a pass: observe it in the clean pass, change it in the others; None for no hook."""
        if not self._changes_losses:
            return None
        needs, descent = self._update.needs, self._update.parts.descent

        def keep(loss: Tensor, labels: Any) -> Tensor:
            if needs & Needs.SUBSET:
                batch.kept = self._example_losses(labels)
            else:
                logits = self._logits()
                self._check_logits(loss, logits, labels, batch)
                batch.kept = descent.keep(loss, logits)
            return loss

        def change(loss: Tensor, labels: Any) -> Tensor:
            return loss if batch.kept is None else descent.loss(loss, self._logits(), batch.kept)

        if is_clean and needs & (Needs.SUBSET | Needs.LOGITS):
            return keep
        return change if needs & Needs.LOGITS and not is_clean else None

    @contextlib.contextmanager
    def _loss_changed(
        self,
        batch: MicroBatch,
        change: Callable[[Tensor, Any], Tensor] | None,
        before: Snapshot | None = None,
        is_weighted: bool = True,
    ) -> Iterator[None]:
        """A context in which the loss of the trainer's `compute_loss` is passed to `change` and weighted.

        Args:
            batch (`MicroBatch`): The micro-batch, whose weights are used.
            change (`Callable`, *optional*): Maps loss and labels to the new loss.
            before (`Snapshot`, *optional*): The initial state of a clean pass, completed just before the forward.
            is_weighted (`bool`): Whether to weight the loss.
        """
        trainer, update = self._trainer, self._update
        if change is None and before is None and not update.runner.takes_parts:
            yield
            return
        own = vars(trainer).get("compute_loss")
        compute_loss = trainer.compute_loss

        def changed(model: nn.Module, inputs: Any, *args, **kwargs) -> Any:
            labels = inputs.get("labels") if isinstance(inputs, Mapping) else None
            if before is not None:
                update.runner.refresh_snapshot(before)
            result = compute_loss(model, inputs, *args, **kwargs)
            loss, rest = (result[0], result[1:]) if isinstance(result, tuple) else (result, None)
            if self._parts.is_unverified:
                outputs = self._outputs
                self._parts.verify(loss, self._logits(is_needed=False), labels, batch)
                self._outputs = outputs
            loss = loss if change is None else change(loss, labels)
            self._outputs = None
            weight = (
                batch.weights[update.runner.loss_combination]
                if is_weighted and update.runner.loss_combination is not None
                else 1.0
            )
            if isinstance(weight, Tensor):
                loss = loss * weight.to(loss)
            elif weight != 1:
                loss = loss * weight
            return loss if rest is None else (loss, *rest)

        trainer.compute_loss, self._compute_loss = changed, compute_loss
        try:
            yield
        finally:
            self._compute_loss = None
            if own is None:
                del trainer.compute_loss
            else:
                trainer.compute_loss = own

    @contextlib.contextmanager
    def _no_generation(self) -> Iterator[None]:
        """A context in which `model.generate` raises an error, because both passes must see the same inputs."""
        model = self._trainer.model
        attributes = vars(model)
        if not hasattr(model, "generate") or "generate" in attributes:
            yield
            return

        def refuse(module: nn.Module, *args, **kwargs) -> Any:
            if module is not model:  # a copy made in a pass, such as a teacher
                del module.generate
                return module.generate(*args, **kwargs)
            raise ValueError(
                f"SAMTrainer: {type(self._trainer).__name__} generates inside its training step, so the second pass would see "
                "different completions from the first. Generate before training, or override SAMTrainer's `training_step`, "
                "generate there and then call it."
            )

        attributes["generate"] = MethodType(refuse, model)
        try:
            yield
        finally:
            attributes.pop("generate", None)

    # --- logits and per-example losses -------------------------------------------------------------------------------

    def _output_hook(self) -> Callable[[nn.Module, Any, Any], None]:
        """A hook that stores the model's output. A function, so that `copy.deepcopy(model)` does not copy the trainer."""
        model = self._trainer.model

        def store(module: nn.Module, inputs: Any, output: Any) -> None:
            if module is model:  # not a copy of it, such as a teacher
                self._outputs = output

        return store

    def _logits(self, is_needed: bool = True) -> Tensor | None:
        """The model's logits in the current pass.

        Raises:
            ValueError: The model's output has no logits.
        """
        outputs, self._outputs = self._outputs, None
        logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
        if logits is None and isinstance(outputs, tuple):  # (loss, logits, ...) or (logits, ...)
            logits = next((o for o in outputs if isinstance(o, Tensor) and o.dim() >= 2), None)
        if not isinstance(logits, Tensor):
            if not is_needed:
                return None
            raise ValueError(
                f"{self._update.config.label} needs a model whose output has `logits`, and this model returned none. Choose another "
                "method."
            )
        return logits

    def _check_logits(self, loss: Tensor, logits: Tensor, labels: Any, batch: MicroBatch) -> None:
        """Check once that the loss depends on the parameters only through the logits.

        Raises:
            ValueError: It does not.
        """
        if self._has_checked_logits:
            return
        self._has_checked_logits = True
        if self._parts.as_cross_entropy(loss, logits, labels, batch) is not None:
            return
        label = self._update.config.label
        reason = (
            f"{label} needs a loss that depends on the parameters only through the logits. Turn off auxiliary losses (router, "
            "boxes, regularisers), or choose another method."
        )
        parameters = self._update.parameters.trainable
        (outer,) = torch.autograd.grad(loss, logits, retain_graph=True, allow_unused=True)
        if outer is None:
            raise ValueError(reason)
        whole = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        through = torch.autograd.grad(logits, parameters, outer, retain_graph=True, allow_unused=True)
        difference, size = 0.0, 0.0
        for a, b in zip(whole, through, strict=True):
            if a is not None or b is not None:
                a, b = (torch.zeros_like(a if b is None else b) if g is None else g for g in (a, b))
                difference += (a - b).double().square().sum().item()
                size += a.double().square().sum().item()
        if difference > (10 * TOLERANCE_16_BITS if loss.dtype.itemsize == 2 else TOLERANCE_16_BITS) ** 2 * size:
            raise ValueError(reason)

    def losses_of_examples(self, batch: MicroBatch) -> Tensor:
        """Run one forward at the current weights and return the loss of every example, shape `(batch,)`."""
        trainer, found = self._trainer, []

        def record(loss: Tensor, labels: Any) -> Tensor:
            found.append(self._example_losses(labels))
            return loss

        with (
            torch.no_grad(),
            self._loss_changed(batch, record, is_weighted=False),
            trainer.compute_loss_context_manager(),
        ):
            inputs = trainer._prepare_inputs(self._update.runner.changed_inputs.protected(batch))
            trainer.compute_loss(trainer.model, inputs, num_items_in_batch=batch.num_items_in_batch)
        return found[0]

    def _example_losses(self, labels: Any) -> Tensor:
        logits = self._logits().detach()
        try:
            return per_example_losses(logits, labels, getattr(self._trainer, "_loss_shifts_labels", False))
        except (RuntimeError, AttributeError, IndexError, TypeError, ValueError) as error:
            shapes = (
                f"logits {list(logits.shape)}, labels {list(labels.shape) if isinstance(labels, Tensor) else labels}"
            )
            raise ValueError(
                f"{self._update.config.label} needs the loss of each example, computed from the `logits` and `labels` of a "
                f"classification or language model; here their shapes do not match ({shapes}). Choose another method."
            ) from error

    # --- other computations ------------------------------------------------------------------------------------------

    def find_loss_combination(self, batch: MicroBatch, size: int) -> str:
        """How the losses of parts of `size` examples combine to the loss of the batch; see `LossesOfParts`."""
        return self._parts.find_loss_combination(batch, size)

    def add_hessian_product(self, batch: MicroBatch, vector: Gradients, product: Gradients) -> None:
        """Add `H vector` of the batch's loss at the current weights to `product`."""
        trainer = self._trainer
        with (
            twice_differentiable_attention(trainer.model),
            loss_instead_of_backward(trainer.accelerator) as losses,
        ):
            self.run(trainer.model, batch, synced=False, is_ascent=False)
            add_hessian_vector_product(losses[0], vector, product)
