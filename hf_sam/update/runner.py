"""Run the passes of a step: clean passes, and passes that repeat them from the same state without side effects."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from ..config import Parts, SAMConfig
from ..methods.base import FORWARD_SHARE, HESSIAN_PASSES, Needs, Step, overrides
from .batches import ChangedInputs, MicroBatch, checked_indices
from .parameters import Gradients, TrainedParameters
from .random_states import RandomStates
from .replay import PassState, Snapshot
from .telemetry import Cost, Telemetry

if TYPE_CHECKING:
    from ..engines.base import Engine


class Passes(Protocol):
    """The trainer's implementation of one pass: forward, loss, backward."""

    def run(self, model: nn.Module, batch: MicroBatch, *, synced: bool, is_ascent: bool) -> Tensor:
        """Run one forward and backward, accumulating gradients in `p.grad`; return the detached loss."""

    def losses_of_examples(self, batch: MicroBatch) -> Tensor:
        """Run one forward; return the loss of every example, shape `(batch,)`."""

    def add_hessian_product(self, batch: MicroBatch, vector: Gradients, product: Gradients) -> None:
        """Add `H vector` of the batch's loss to `product`."""

    def find_loss_combination(self, batch: MicroBatch, size: int) -> str:
        """How the losses of parts of `size` examples combine to the loss of the batch: one of `LOSS_COMBINATIONS`."""

    def was_skipped(self) -> bool:
        """Whether the optimizer skipped its last step because of an fp16 overflow."""


class PassRunner:
    """Run passes; every repetition starts from the state in which the clean pass of its micro-batch started.

    Args:
        passes (`Passes`): Runs one pass of the trainer.
        config (`SAMConfig`): The user's choices.
        parts (`Parts`): The ascent and descent, as resolved for the run.
        engine (`Engine`): Decides which gradients are computed and synchronised.
        parameters (`TrainedParameters`): The trained parameters.
        state (`PassState`): The state that passes read and write, apart from weights.
        telemetry (`Telemetry`): Records losses.
        cost (`Cost`): Counts passes.

    Attributes:
        index (`int`): The current optimizer step.
        is_repeating (`bool`): Whether the current pass follows the clean one, so that its logs and counts are dropped.
        loss_combination (`str`, *optional*): How losses of parts combine to the batch's; None until parts are used.
    """

    def __init__(
        self,
        passes: Passes,
        config: SAMConfig,
        parts: Parts,
        engine: Engine,
        parameters: TrainedParameters,
        state: PassState,
        telemetry: Telemetry,
        cost: Cost,
    ):
        self.parts, self.state, self.changed_inputs = parts, state, ChangedInputs()
        self._needs = parts.needs
        self.index, self.is_repeating = 0, False
        self.loss_combination: str | None = None
        self.is_loss_combination_known = False
        self._passes, self._config, self._engine, self._parameters = passes, config, engine, parameters
        self._telemetry, self._cost = telemetry, cost
        self._devices = list(dict.fromkeys(p.device for p in parameters.names))
        self.parameters_changed()

    def parameters_changed(self) -> None:
        """React to a change of the trained parameters."""
        # Copies of frozen parameters may take as much memory as the gradients.
        self._snapshot_budget = sum(p.nbytes for p in self._parameters.trainable)

    @property
    def sees_all(self) -> bool:
        """Whether the ascent pass sees every example of the batch."""
        return (self._config.ascent_fraction or 1.0) == 1 and not overrides(self.parts.ascent, "examples")

    @property
    def descends_on_part(self) -> bool:
        """Whether the descent pass leaves examples out."""
        chooses = bool(self._needs & Needs.SUBSET)
        return chooses and self.parts.descent.examples(torch.zeros(2), torch.zeros(2)) is not None

    @property
    def takes_parts(self) -> bool:
        """Whether passes may see parts of a batch."""
        chooses = bool(self._needs & (Needs.SUBSET | Needs.UNEVEN_PASSES))
        return not self.sees_all or self._config.m is not None or chooses

    def ascend(
        self, model: nn.Module, batch: MicroBatch, chosen: Sequence[Parameter], step: Step, *, synced: bool
    ) -> Tensor:
        """Run the clean pass, the only one with lasting side effects; accumulate gradients of `chosen` in `p.grad`."""
        seen = self._ascent_examples(batch, step)
        batch.before = seen.before = self.state.capture(self._random_states(), self.index, self._snapshot_budget)
        restore_inputs = self.changed_inputs.protect(batch)
        with self._engine.gradients_only_for(chosen, self._parameters.trainable):
            loss = self._passes.run(model, seen, synced=synced, is_ascent=True)
        batch.before.is_restorable &= restore_inputs()
        self.state.detect_changes(batch.before)
        batch.kept = seen.kept
        self._telemetry.add(clean_loss=loss)
        self._cost.ascent_passes += seen.fraction
        return loss

    def _ascent_examples(self, batch: MicroBatch, step: Step) -> MicroBatch:
        """The part of the batch that the ascent pass sees."""
        size, fraction = batch.size, self._config.ascent_fraction or 1.0
        indices = self.parts.ascent.examples(batch.inputs, step)
        if indices is not None:
            indices = checked_indices(indices, self.parts.ascent, "examples")
        elif fraction < 1:
            indices = torch.arange(math.ceil(fraction * (size or 0)))
        if indices is None or (size and len(indices) == size):
            return batch
        self.find_loss_combination(batch, max(1, int(fraction * (size or 0))))
        return batch.sample(indices)

    def find_loss_combination(self, batch: MicroBatch, size: int) -> None:
        """Set `loss_combination` before parts of `size` examples are used for the first time."""
        if not self.is_loss_combination_known:
            self.is_loss_combination_known = True
            self.loss_combination = self._passes.find_loss_combination(batch, size)

    def descend(self, model: nn.Module, window: list[MicroBatch], *, synced: bool) -> Tensor:
        """Run the passes at `w + eps`, on the examples and the loss that the method chooses."""
        if self.descends_on_part:
            window = [self._chosen_examples(batch) for batch in window]
        return self.run_all(model, window, synced=synced)

    def _chosen_examples(self, batch: MicroBatch) -> MicroBatch:
        self.find_loss_combination(batch, max(1, (batch.size or 0) // 2))
        self.state.restore(batch.before)
        after = self._passes.losses_of_examples(batch)
        self._cost.ascent_passes += FORWARD_SHARE * batch.fraction
        descent = self.parts.descent
        return batch.sample(checked_indices(descent.examples(batch.kept, after), descent, "examples"))

    def run_all(self, model: nn.Module, window: list[MicroBatch], *, synced: bool, is_ascent: bool = False) -> Tensor:
        """Run one pass per micro-batch of the window, from the state of its clean pass if any; return the summed loss.

        Args:
            synced (`bool`): Synchronise gradients after the last pass if the trainer would; otherwise never.
            is_ascent (`bool`): The gradients determine the perturbation; otherwise the optimizer steps along them.
        """
        losses = []
        for batch in window:
            if batch.before is not None:
                self.state.restore(batch.before)
            with self._cost.full_pass(batch.fraction):
                last = batch is window[-1]
                losses.append(self._passes.run(model, batch, synced=synced and last, is_ascent=is_ascent))
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def add_hessian_products(self, window: list[MicroBatch], vector: Gradients, product: Gradients) -> None:
        """Add `H vector` of the window's loss at the current weights to `product`."""
        for batch in window:
            self.state.restore(batch.before)
            self._passes.add_hessian_product(batch, vector, product)
            self._cost.ascent_passes += HESSIAN_PASSES * batch.fraction

    @contextlib.contextmanager
    def preserving_state(self) -> Iterator[Snapshot]:
        """Run repeated passes inside; afterwards restore the state that the clean pass left, which this yields."""
        now = self.state.capture(self._random_states(), self.index, self._snapshot_budget)
        was_repeating, self.is_repeating = self.is_repeating, True
        try:
            yield now
        finally:
            self.is_repeating = was_repeating
            self.state.restore(now)

    def refresh_snapshot(self, before: Snapshot) -> None:
        """Add what `model.train()` has changed; called before the forward of a clean pass."""
        self.state.refresh_snapshot(before, self._snapshot_budget)

    def was_skipped(self) -> bool:
        """Whether the optimizer skipped its last step because of an fp16 overflow."""
        return self._engine.may_skip_steps and self._passes.was_skipped()

    def _random_states(self) -> RandomStates | None:
        return RandomStates(self._devices) if self._config.replay_rng else None
