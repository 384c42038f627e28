"""`SAMTrainer`: the Trainer with the sharpness-aware update in its `training_step`. Glue only; the mathematics is in
`ascent.py`, `descent.py` and `schedule.py`, put together by `update.py`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from accelerate.utils import find_batch_size
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import nested_gather
from transformers.utils import logging

from .config import SAMConfig
from .engines.base import engine_for, loss_instead_of_backward
from .engines.compatibility import refuse_unsupported
from .methods.descents import hardest_hit
from .methods.table import FORWARD_SHARE, HESSIAN_PASSES
from .model_card import write_model_card
from .update.batches import MicroBatch
from .update.observation import log_entries
from .update.parameters import put_gradients, take_gradients
from .update.replay import RandomStates, bookkeeping_kept
from .update.second_order import add_hessian_vector_product, twice_differentiable_attention
from .update.state import check_config, load_state, reload_renamed_weights, save_config, save_state
from .update.step import SharpnessAwareUpdate
from .update.telemetry import Telemetry

logger = logging.get_logger(__name__)


class SAMTrainerMixin:
    """Adds sharpness-aware minimization to any `Trainer` whose `training_step` calls `super().training_step`.

        class SAMSFTTrainer(SAMTrainerMixin, SFTTrainer): ...

    Args:
        sam_config (`SAMConfig`, *optional*):
            What to do; None is plain SAM with its defaults. Every other argument is the base trainer's.

    Raises:
        TypeError: `sam_config` is no `SAMConfig`.
        ValueError: The optimizer, engine or parameters cannot be right under SAM; says why and what to use instead.
    """

    # Attributes in which the base trainer counts examples or metrics during `compute_loss` (TRL's trainers do): only
    # the clean pass moves them. A subclass that keeps more extends this.
    sam_bookkeeping: tuple[str, ...] = ("_metrics", "_total_train_tokens")
    # Whether a part of a batch is a batch. It is not where a collator stacks chosen above rejected answers.
    sam_splits_batches: bool = True

    def __init__(self, *args, sam_config: SAMConfig | None = None, **kwargs):
        if sam_config is None:
            sam_config = SAMConfig()
        if not isinstance(sam_config, SAMConfig):
            raise TypeError(f"sam_config must be a SAMConfig, not {type(sam_config).__name__}: {sam_config!r}.")
        self.sam_config = sam_config
        self._sam: SharpnessAwareUpdate | None = None
        self._sam_checkpoint: str | None = None
        self._examine: Callable | None = None
        super().__init__(*args, **kwargs)
        if sam_config.rho > 0:
            refuse_unsupported(self)
        self.add_callback(_UpdateCallback(self))

    # --- Algorithm 1 -----------------------------------------------------------------------------------------------

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One micro-batch of a sharpness-aware step; the clean loss is returned.

        Perturbed weights never leave this call: where the perturbation needs the whole accumulation window, all but
        its last micro-batch only run the ascent pass, and the last one runs the descent passes of the window.
        """
        if self.sam_config.rho == 0:
            return super().training_step(model, inputs, num_items_in_batch)
        if self._sam is None:  # called outside `train`
            self.start_update()
        sam, step, is_last = self._sam, self.state.global_step, self.accelerator.sync_gradients
        whole = MicroBatch(inputs, num_items_in_batch, self.current_gradient_accumulation_steps)
        with sam.cost.micro_batch(step):
            if not sam.schedule.perturbs(step):
                loss = self._plain_step(model, whole, is_last)
            elif not sam.looks(step):
                loss = self._one_pass_step(model, whole, is_last)
            else:
                parts = whole.split(sam.config.m)
                losses = [self._two_pass_step(model, part, is_last and part is parts[-1]) for part in parts]
                loss = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
        self.current_gradient_accumulation_steps = whole.accumulation_steps
        if is_last:
            sam.engine.finish_step()
        return loss

    def _two_pass_step(self, model: nn.Module, batch: MicroBatch, is_last: bool) -> Tensor:
        """`is_last`: whether gradients are synchronised, and the optimizer steps, after this batch."""
        sam, step = self._sam, self.state.global_step
        accumulated = take_gradients(sam.trainable) if sam.scope == "micro" else {}
        clean_loss = self._ascent_pass(model, batch, is_last)  # g = grad L(w), in p.grad
        sam.window.append(batch)
        if sam.scope != "micro" and not is_last:
            return clean_loss

        window, rho, measured = sam.close_window(), self._rho(), self._is_measured_step() and not accumulated
        after_clean_pass = RandomStates(sam.device)
        with (
            sam.statistics.kept(),
            bookkeeping_kept(self, self.sam_bookkeeping),
            sam.perturbation(step) as eps,  # leaving it restores w bitwise
        ):
            sam.climb(eps, sam.engine.take_gradients(sam.trainable), rho, measured=measured)  # w + eps
            for _ in range(1, sam.config.ascent_steps or 1):
                self._passes(model, window, synced=is_last and sam.scope == "global", looks=True)
                sam.climb(eps, sam.engine.take_gradients(sam.trainable), rho)
            if not sam.keeps_clean_gradient:
                put_gradients(accumulated)
            perturbed_loss = self._descent_passes(model, window, is_last)  # g_s = grad L(w + eps), in p.grad
            if measured:
                sam.observe(eps, sam.engine.gradients(sam.trainable))
        if sam.keeps_clean_gradient:
            sam.combine(accumulated, rho, is_last, partial(self._hessian_vector_product, window))
        if sam.config.replay_rng:
            after_clean_pass.restore()
        sam.telemetry.add(perturbed_loss=perturbed_loss)
        if is_last:
            sam.close_step()
        return clean_loss

    def _one_pass_step(self, model: nn.Module, batch: MicroBatch, is_last: bool) -> Tensor:
        """For directions known without a clean pass; the loss returned is the perturbed one."""
        sam, step, rho = self._sam, self.state.global_step, self._rho()
        if sam.auxiliary is not None:
            with sam.auxiliary.active():
                loss = self._passes(model, [batch], synced=True)
            if is_last:
                sam.climb_beside(rho, self.optimizer)
        else:
            with sam.perturbation(step) as eps:
                sam.step_aside(eps, rho, step, self.optimizer)
                loss = self._passes(model, [batch], synced=True)
                if self._is_measured_step():
                    sam.observe(eps, {})
            if is_last:
                sam.keep_gradient()
        sam.telemetry.add(perturbed_loss=loss)
        if is_last:
            sam.close_step()
        return loss

    def _plain_step(self, model: nn.Module, batch: MicroBatch, is_last: bool) -> Tensor:
        """The stock step: outside the schedule, or between two steps that perturb."""
        sam = self._sam
        reuses = sam.config.row.descent == "reused" and sam.schedule.is_inside(self.state.global_step)
        loss = self._passes(model, [batch], synced=not reuses or sam.scope == "global")
        if reuses:
            sam.reuse(is_last)
        return loss

    # --- passes ----------------------------------------------------------------------------------------------------

    def _ascent_pass(self, model: nn.Module, batch: MicroBatch, is_last: bool) -> Tensor:
        """The clean pass: the only one that moves running statistics and metrics."""
        sam = self._sam
        if sam.config.replay_rng:
            batch.random_states = RandomStates(sam.device)
        seen = batch.share(sam.config.ascent_fraction or 1.0)
        chosen = sam.ascent_parameters(self.state.global_step)
        with (
            sam.statistics.watch(),
            sam.engine.gradients_only_for(chosen, sam.trainable),
            self._examined(batch, sam.examine_clean),
        ):
            # Behind DDP the loss no longer depends on the logits: a gradient there needs the model itself.
            through_engine = sam.config.row.descent != "functional"
            synced = is_last and sam.scope == "global"
            loss = self._pass(model if through_engine else self.model, seen, synced, looks=True)
        if synced and not through_engine:
            sam.engine.average_gradients(sam.trainable)
        sam.telemetry.add(clean_loss=loss)
        sam.cost.ascent_passes += seen.fraction
        return loss

    def _descent_passes(self, model: nn.Module, window: list[MicroBatch], is_last: bool) -> Tensor:
        """The passes at `w + eps`, of the examples and the loss that the method descends on."""
        sam = self._sam
        if sam.config.row.descent == "hardest-hit" and sam.config.gamma < 1:
            window = [self._hardest_hit(batch) for batch in window]
        synced = is_last and (not sam.keeps_clean_gradient or sam.scope == "global")
        return self._passes(model, window, synced)

    def _passes(self, model: nn.Module, window: list[MicroBatch], synced: bool, looks: bool = False) -> Tensor:
        """Run the window again as the clean pass saw it; returns the sum of its losses. The arguments are `_pass`'s."""
        sam, losses = self._sam, []
        for batch in window:
            if batch.random_states is not None:
                batch.random_states.restore()
            with sam.cost.full_pass(batch.fraction), self._examined(batch, sam.examine_perturbed):
                losses.append(self._pass(model, batch, synced and batch is window[-1], looks))
        return torch.stack(losses).sum()

    def _pass(self, model: nn.Module, batch: MicroBatch, synced: bool, looks: bool = False) -> Tensor:
        """One forward and backward of the base trainer; gradients add up in p.grad.

        `synced` leaves synchronisation as the Trainer has set it for this micro-batch; otherwise there is none. `looks`
        where the gradients show where to look; otherwise the optimizer steps along them.
        """
        self.current_gradient_accumulation_steps = batch.accumulation_steps
        engine = self._sam.engine
        with (engine.looking if looks else engine.stepping)(model, synced) as module:
            return super().training_step(module, batch.fresh_inputs(), batch.num_items_in_batch)

    def _hardest_hit(self, batch: MicroBatch) -> MicroBatch:
        """ESAM's choice of examples, by one forward pass at `w + eps`."""
        sam, after = self._sam, batch.sample(torch.arange(find_batch_size(batch.inputs)))
        if batch.random_states is not None:
            batch.random_states.restore()
        with torch.no_grad(), self._examined(after, sam.examine_clean), self.compute_loss_context_manager():
            inputs = self._prepare_inputs(after.fresh_inputs())
            self.compute_loss(self.model, inputs, num_items_in_batch=batch.num_items_in_batch)
        sam.cost.ascent_passes += FORWARD_SHARE * batch.fraction
        return batch.sample(hardest_hit(batch.clean, after.clean, sam.config.gamma))

    def _hessian_vector_product(
        self, window: list[MicroBatch], vector: dict[nn.Parameter, Tensor]
    ) -> dict[nn.Parameter, Tensor]:
        """`H v` at `w`, of the loss of the window as the clean pass saw it."""
        sam = self._sam
        product = {p: torch.zeros_like(p) for p in sam.trainable}
        for batch in window:
            if batch.random_states is not None:
                batch.random_states.restore()
            with (
                sam.statistics.kept(),
                bookkeeping_kept(self, self.sam_bookkeeping),
                twice_differentiable_attention(self.model),
                loss_instead_of_backward(self.accelerator) as losses,
            ):
                self._pass(self.model, batch, synced=False)
                add_hessian_vector_product(losses[0], vector, product)
            sam.cost.ascent_passes += HESSIAN_PASSES * batch.fraction
        return product

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args, **kwargs):
        """The base trainer's own; methods that change the loss see the model's output on the way."""
        if self._examine is None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        labels = inputs.get("labels")
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        return self._examine(loss, outputs, labels, shifted=getattr(self, "_loss_shifts_labels", False))

    @contextlib.contextmanager
    def _examined(self, batch: MicroBatch, examine: Callable) -> Iterator[None]:
        changes_loss = self._sam.config.row.descent in ("hardest-hit", "functional")
        self._examine = partial(examine, batch) if changes_loss else None
        try:
            yield
        finally:
            self._examine = None

    def _rho(self) -> float:
        group = self.optimizer.param_groups[0]
        lr_fraction = group["lr"] / (group.get("initial_lr") or group["lr"] or 1.0)
        return self._sam.schedule.rho(self.state.global_step, lr_fraction)

    # --- in the Trainer's world ------------------------------------------------------------------------------------

    def start_update(self) -> None:
        """Bind the update to the model, optimizer and number of steps of the run that begins."""
        self.end_update()
        self._sam = None
        if self.sam_config.rho == 0:
            return
        refuse_unsupported(self)
        if self.optimizer is None:
            self.create_optimizer()
        max_steps = max(self.state.max_steps, 1)
        self._sam = SharpnessAwareUpdate(
            self.sam_config,
            self.model,
            self.optimizer,
            engine_for(self),
            max_steps=max_steps,
            seed=self.args.seed,
            warmup_steps=self.args.get_warmup_steps(max_steps),
        )
        if self._sam_checkpoint is not None:
            load_state(self._sam_checkpoint, self._sam, self.args.process_index)
            self._sam_checkpoint = None  # another call of `train` begins anew
        m = self._sam.effective_m(
            self._train_batch_size, self.args.gradient_accumulation_steps, self._sam.engine.batches
        )
        logger.info(f"SAM: {self.sam_config.method}, scope {self._sam.scope}: one perturbation for m = {m} examples")

    def end_update(self) -> None:
        """Leave nothing on the model; what the run has measured stays readable."""
        if self._sam is not None and self._sam.auxiliary is not None:
            self._sam.auxiliary.remove()

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Floating-point operations of one micro-batch, all passes of the present step included."""
        ops = super().floating_point_ops(inputs)
        return ops if self._sam is None else int(ops * self._sam.schedule.passes(self.state.global_step))

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """The Trainer's own, with the keys of the update added to training entries and its cost to the last one."""
        if self._sam is not None and "loss" in logs:
            logs.update(self._read_telemetry())
        if self._sam is not None and "train_runtime" in logs:
            logs.update(self._sam.cost.summary())
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The Trainer's own, with `sam_config.json` beside the weights."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            save_config(output_dir or self.args.output_dir, self.sam_config)

    def create_model_card(self, *args, **kwargs) -> None:
        """The base trainer's own, with the section on sharpness-aware minimization; `push_to_hub` comes by here."""
        super().create_model_card(*args, **kwargs)
        write_model_card(self, kwargs.get("dataset") or kwargs.get("dataset_name"), kwargs.get("tasks"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        reload_renamed_weights(self.model if model is None else model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        reload_renamed_weights(self.model, self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and not check_config(checkpoint, self.sam_config):
            logger.info(f"{checkpoint} was made by a stock Trainer: sharpness-aware minimization begins here.")
        self._sam_checkpoint = checkpoint
        super()._load_optimizer_and_scheduler(checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._sam is not None:
            save_state(output_dir, self._sam, self.args.process_index)

    def _is_measured_step(self) -> bool:
        """Whether to measure what costs memory bandwidth: on the last perturbing step before the Trainer logs.

        Between epochs the Trainer's next entry cannot be foreseen; every 50th step stands in.
        """
        step = self.state.global_step
        every = int(self.state.logging_steps if self.args.logging_strategy == "steps" else 0) or 50
        next_entry = (step // every + 1) * every
        return step == 0 or not any(map(self._sam.schedule.perturbs, range(step + 1, next_entry)))

    def _read_telemetry(self) -> dict[str, float]:
        """Means since the last entry, over steps and ranks; the one place that waits for the device."""
        tables = nested_gather(self._sam.telemetry.drain(), self.args.parallel_mode)
        return log_entries(Telemetry.means(tables), self._sam.selected.values())


class SAMTrainer(SAMTrainerMixin, Trainer):
    """[`~transformers.Trainer`] with sharpness-aware minimization (Foret et al. 2021, arXiv 2010.01412).

        trainer = SAMTrainer(model=model, args=args, train_dataset=data, sam_config=SAMConfig(rho=0.01))

    Takes every argument of `Trainer`, and `sam_config` as [`SAMTrainerMixin`] describes it.
    """


class _UpdateCallback(TrainerCallback):
    """Calls `start_update` when the model is wrapped, the optimizer exists and the number of steps is known."""

    def __init__(self, trainer: SAMTrainerMixin):
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self._trainer.start_update()

    def on_train_end(self, args, state, control, **kwargs):
        self._trainer.end_update()
