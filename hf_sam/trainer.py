"""`SAMTrainer`: the Trainer with the sharpness-aware update in its `training_step`. Glue only; the mathematics is in
`ascent.py`, `descent.py` and `schedule.py`, put together by `update.py`."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import nested_gather
from transformers.utils import logging

from .batches import MicroBatch
from .config import SAMConfig
from .engines import Engine, refuse_unsupported
from .parameters import put_gradients, take_gradients
from .replay import RandomStates, bookkeeping_kept
from .state import check_config, save_config
from .update import SharpnessAwareUpdate

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

    def __init__(self, *args, sam_config: SAMConfig | None = None, **kwargs):
        if sam_config is None:
            sam_config = SAMConfig()
        if not isinstance(sam_config, SAMConfig):
            raise TypeError(f"sam_config must be a SAMConfig, not {type(sam_config).__name__}: {sam_config!r}.")
        self.sam_config = sam_config
        self._sam: SharpnessAwareUpdate | None = None
        super().__init__(*args, **kwargs)
        if sam_config.rho > 0:
            refuse_unsupported(self)
        self.add_callback(_StartUpdate(self))

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
        whole = MicroBatch(inputs, num_items_in_batch, self.current_gradient_accumulation_steps)
        if not self._sam.schedule.perturbs(self.state.global_step):
            with self._sam.micro_batch(self.state.global_step):
                return self._passes(model, [whole], synced=True)

        parts = whole.split(self.sam_config.m)
        with self._sam.micro_batch(self.state.global_step):
            clean_losses = [
                self._sharpness_aware_step(model, part, is_last=self.accelerator.sync_gradients and part is parts[-1])
                for part in parts
            ]
        self.current_gradient_accumulation_steps = whole.accumulation_steps
        return clean_losses[0] if len(clean_losses) == 1 else torch.stack(clean_losses).sum()

    def _sharpness_aware_step(self, model: nn.Module, batch: MicroBatch, is_last: bool) -> Tensor:
        """`is_last`: whether gradients are synchronised, and the optimizer steps, after this batch."""
        sam, config = self._sam, self.sam_config
        accumulated = take_gradients(sam.trainable) if sam.scope == "micro" else {}

        clean_loss = self._ascent_pass(model, batch, is_last)  # g = grad L(w), in p.grad
        sam.window.append(batch)
        if sam.scope != "micro" and not is_last:
            return clean_loss

        measured = self._is_measured_step() and not accumulated
        after_clean_pass = RandomStates(sam.device)
        try:
            with (
                sam.statistics.kept(),
                bookkeeping_kept(self, self.sam_bookkeeping),
                sam.perturbation(self.state.global_step) as eps,  # leaving it restores w bitwise
            ):
                sam.climb(eps, take_gradients(sam.trainable), self._rho(), measured=measured)  # w + eps
                for _ in range(1, config.ascent_steps):
                    self._passes(model, sam.window, synced=is_last and sam.scope == "global")
                    sam.climb(eps, take_gradients(sam.trainable), self._rho())
                put_gradients(accumulated)
                perturbed_loss = self._passes(model, sam.window, synced=is_last)  # g_s = grad L(w + eps), in p.grad
                if measured:
                    sam.observe(eps, {p: p.grad for p in sam.trainable if p.grad is not None})
        finally:
            sam.window.clear()
        if config.replay_rng:
            after_clean_pass.restore()
        sam.telemetry.add(perturbed_loss=perturbed_loss)
        if is_last:
            sam.close_step()
        return clean_loss

    def _ascent_pass(self, model: nn.Module, batch: MicroBatch, is_last: bool) -> Tensor:
        """The clean pass: the only one that moves running statistics and metrics."""
        sam = self._sam
        if self.sam_config.replay_rng:
            batch.random_states = RandomStates(sam.device)
        with sam.statistics.watch():
            seen = batch.share(self.sam_config.ascent_fraction)
            loss = self._pass(model, seen, synced=is_last and sam.scope == "global")
        sam.telemetry.add(clean_loss=loss)
        sam.ascent_passes += seen.fraction
        return loss

    def _passes(self, model: nn.Module, window: list[MicroBatch], synced: bool) -> Tensor:
        """Run the window again as the clean pass saw it; returns the sum of its losses."""
        losses = []
        for batch in window:
            if batch.random_states is not None:
                batch.random_states.restore()
            with self._sam.pass_clock:
                losses.append(self._pass(model, batch, synced=synced and batch is window[-1]))
            self._sam.full_passes += batch.fraction
        return torch.stack(losses).sum()

    def _pass(self, model: nn.Module, batch: MicroBatch, synced: bool) -> Tensor:
        """One forward and backward of the base trainer; gradients add up in p.grad.

        `synced` leaves synchronisation as the Trainer has set it for this micro-batch; otherwise there is none.
        """
        self.current_gradient_accumulation_steps = batch.accumulation_steps
        with contextlib.nullcontext() if synced else self._sam.engine.without_sync(model):
            return super().training_step(model, batch.fresh_inputs(), batch.num_items_in_batch)

    def _rho(self) -> float:
        group = self.optimizer.param_groups[0]
        lr_fraction = group["lr"] / (group.get("initial_lr") or group["lr"] or 1.0)
        return self._sam.schedule.rho(self.state.global_step, lr_fraction)

    # --- in the Trainer's world ------------------------------------------------------------------------------------

    def start_update(self) -> None:
        """Bind the update to the model, optimizer and number of steps of the run that begins."""
        self._sam = None
        if self.sam_config.rho == 0:
            return
        refuse_unsupported(self)
        self._sam = SharpnessAwareUpdate(
            self.sam_config,
            self.model,
            self.optimizer,
            Engine(self.accelerator),
            max_steps=self.state.max_steps,
            seed=self.args.seed,
        )
        m = self._sam.effective_m(self._train_batch_size, self.args.gradient_accumulation_steps, self.args.world_size)
        logger.info(f"SAM: {self.sam_config.method}, scope {self._sam.scope}: one perturbation for m = {m} examples")

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Floating-point operations of one micro-batch, all passes of the present step included."""
        ops = super().floating_point_ops(inputs)
        if self._sam is None or not self._sam.schedule.perturbs(self.state.global_step):
            return ops
        return int(ops * self._sam.passes_per_step)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """The Trainer's own, with the keys of the update added to training entries and its cost to the last one."""
        if self._sam is not None and "loss" in logs:
            logs.update(self._read_telemetry())
        if self._sam is not None and "train_runtime" in logs:
            logs.update(self._sam.cost())
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The Trainer's own, with `sam_config.json` beside the weights."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            save_config(output_dir or self.args.output_dir, self.sam_config)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and not check_config(checkpoint, self.sam_config):
            logger.info(f"{checkpoint} was made by a stock Trainer: sharpness-aware minimization begins here.")
        super()._load_optimizer_and_scheduler(checkpoint)

    def _is_measured_step(self) -> bool:
        """Whether to measure what costs memory bandwidth: on the last perturbing step before the Trainer logs.

        Between epochs the Trainer's next entry cannot be foreseen; every 50th step stands in.
        """
        step = self.state.global_step
        every = (self.state.logging_steps if self.args.logging_strategy == "steps" else 0) or 50
        next_entry = (step // every + 1) * every
        return step == 0 or not any(map(self._sam.schedule.perturbs, range(step + 1, next_entry)))

    def _read_telemetry(self) -> dict[str, float]:
        """Means since the last entry, over steps and ranks; the one place that waits for the device."""
        names, means = self._sam.telemetry.drain()
        if not names:
            return {}
        values = nested_gather(means, self.args.parallel_mode).reshape(-1, len(names)).mean(0).tolist()
        return self._sam.check_realised(dict(zip(names, values, strict=True)))


class SAMTrainer(SAMTrainerMixin, Trainer):
    """[`~transformers.Trainer`] with sharpness-aware minimization (Foret et al. 2021, arXiv 2010.01412).

        trainer = SAMTrainer(model=model, args=args, train_dataset=data, sam_config=SAMConfig(rho=0.05))

    Takes every argument of `Trainer`, and `sam_config` as [`SAMTrainerMixin`] describes it.
    """


class _StartUpdate(TrainerCallback):
    """Calls `start_update` when the model is wrapped, the optimizer exists and the number of steps is known."""

    def __init__(self, trainer: SAMTrainerMixin):
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self._trainer.start_update()
