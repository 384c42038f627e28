"""`SAMTrainer`: the Trainer with the sharpness-aware update in its `training_step`. Glue only; see `update/step.py`."""

from __future__ import annotations

import dis
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import nested_gather
from transformers.trainer_utils import HPSearchBackend
from transformers.utils import logging

from .config import SAMConfig
from .engines import engine_for, refuse_unsupported
from .model_card import write_model_card
from .passes import TrainerPasses
from .update.batches import MicroBatch
from .update.contents import named_modules_in, parts_of
from .update.diagnosis import Diagnosis
from .update.observation import log_entries
from .update.state import check_config, load_state, reload_renamed_weights, save_config, save_state
from .update.step import SharpnessAwareUpdate
from .update.telemetry import Telemetry

logger = logging.get_logger(__name__)

# Attributes set by the Trainer and this module. They are not state of a custom loss, so passes need not restore them.
_TRAINER_ATTRIBUTES = {i.argval for i in dis.get_instructions(Trainer.__init__) if i.opname == "STORE_ATTR"} | {
    "_sam",
    "_sam_checkpoint",
    "_sam_config_given",
    "_sam_diagnosis",
    "_sam_passes",
    "compute_loss",
    "current_gradient_accumulation_steps",
    "deepspeed",
    "model_wrapped",
    "sam_config",
}


class SAMTrainerMixin:
    """Add sharpness-aware minimization to any `Trainer` whose `training_step` calls `super().training_step`.

        class SAMSFTTrainer(SAMTrainerMixin, SFTTrainer): ...

    Args:
        sam_config (`SAMConfig`, *optional*):
            The configuration; None is plain SAM with its defaults. All other arguments are those of the base trainer.

    Raises:
        TypeError: `sam_config` is not a `SAMConfig`.
        ValueError: The optimizer, engine or parameters do not work with SAM, or checkpoints cannot hold the
            configuration; the message says why and what to use.
    """

    # Further attributes of the trainer that only the clean pass may change. Custom attributes are found automatically;
    # those that the stock Trainer sets are restored only if named here.
    sam_bookkeeping: tuple[str, ...] = ()
    # Whether part of a batch is a valid batch, unlike in collators that stack chosen and rejected answers.
    sam_splits_batches: bool = True

    def __init__(self, *args, sam_config: SAMConfig | None = None, **kwargs):
        if not isinstance(self, Trainer):
            raise TypeError(
                f"SAMTrainerMixin needs a subclass of transformers.Trainer, and {type(self).__name__} is not one. If it wraps "
                "another trainer, as setfit's does, combine the mixin with that trainer."
            )
        if sam_config is None:
            sam_config = SAMConfig()
        if not isinstance(sam_config, SAMConfig):
            raise TypeError(f"sam_config must be a SAMConfig, not {type(sam_config).__name__}: {sam_config!r}.")
        sam_config.to_json()  # raises now what would otherwise end the run at its first checkpoint
        self.sam_config = sam_config
        self._sam: SharpnessAwareUpdate | None = None
        self._sam_passes: TrainerPasses | None = None
        self._sam_diagnosis: Diagnosis | None = None
        self._sam_checkpoint: str | None = None
        self._sam_config_given: SAMConfig | None = None  # before a hyperparameter search
        super().__init__(*args, **kwargs)
        if sam_config.rho > 0:
            refuse_unsupported(self)
        self.add_callback(_UpdateCallback(self))

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run one micro-batch of a sharpness-aware step and return the clean loss."""
        if self.sam_config.rho == 0:
            return super().training_step(model, inputs, num_items_in_batch)
        # Called outside `train`, or a callback has replaced the optimizer.
        if self._sam is None or self._sam.optimizer is not self.optimizer:
            self.start_update()
        steps = self.current_gradient_accumulation_steps
        batch = MicroBatch(inputs, num_items_in_batch, steps)
        is_last = self.accelerator.sync_gradients
        try:
            return self._sam.run(model, batch, self.state.global_step, is_last, self._is_measured_step)
        finally:
            self.current_gradient_accumulation_steps = steps

    # --- a run -------------------------------------------------------------------------------------------------------

    def train(self, *args, **kwargs):
        """Train as the base trainer does; clean up the model also after an error."""
        try:
            return super().train(*args, **kwargs)
        except BaseException:
            self.end_update()
            raise

    def start_update(self) -> None:
        """Create the update for the model, optimizer and number of steps of the starting run."""
        self.end_update()
        self._sam = None
        if self.sam_config.rho == 0:
            return
        refuse_unsupported(self)
        if self.optimizer is None:
            self.create_optimizer()
        max_steps = max(self.state.max_steps, 1)
        self._sam_passes = TrainerPasses(self, super().training_step)
        loss_parts = parts_of(self.compute_loss_func)
        values = {k: v for k, v in vars(self).items() if k not in _TRAINER_ATTRIBUTES} | {
            "compute_loss_func": loss_parts
        }
        self._sam = SharpnessAwareUpdate(
            self.sam_config,
            self.model,
            self.optimizer,
            engine_for(self),
            self._sam_passes,
            max_steps=max_steps,
            seed=self.args.seed,
            warmup_steps=self.args.get_warmup_steps(max_steps),
            scheduler=self.lr_scheduler,
            others=named_modules_in(values),
            owner=self,
            also_tracked=loss_parts,
            train_dataset=self.train_dataset,
            ignored=_TRAINER_ATTRIBUTES.difference(self.sam_bookkeeping),
        )
        self._sam_passes.start(self._sam)
        stored_in = {p.dtype for p in self._sam.parameters.selected}
        autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        computed_in = autocast or min(stored_in or {torch.float32}, key=lambda dtype: dtype.itemsize)
        first_loss = next((entry["loss"] for entry in self.state.log_history if "loss" in entry), None)
        self._sam_diagnosis = Diagnosis(
            self.sam_config, max_steps, computed_in, stored_in, self._sam.ascent_step.group_sizes(), first_loss
        )
        if self._sam_checkpoint is not None:
            load_state(self._sam_checkpoint, self._sam, self.args.process_index)
            self._sam_checkpoint = None  # the next call of `train` starts anew
        m = self._sam.effective_m(self._train_batch_size, self.args.gradient_accumulation_steps)
        logger.info(
            f"SAM: {self.sam_config.method}, scope {self._sam.scope}: one perturbation for every m = {m} examples"
        )

    def end_update(self) -> None:
        """Remove hooks and attached modules from the model; measurements of the run stay readable."""
        if self._sam_passes is not None:
            self._sam_passes.end()
        if self._sam is not None and self._sam.attached is not None:
            self._sam.attached.remove()

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Floating-point operations of one micro-batch, including all passes of the current step."""
        ops = super().floating_point_ops(inputs)
        return ops if self._sam is None else int(ops * self._sam.schedule.passes(self.state.global_step))

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Log as the base trainer does, with values of the update in training entries and its cost in the last entry.

        Calls from a loss function in repeated passes are dropped.
        """
        if self._sam is not None and self._sam.runner.is_repeating:
            return
        if self._sam is not None and "loss" in logs:
            means = self._read_telemetry()
            logs.update(log_entries(means, bool(self.sam_config.log_shares)))
            if self.is_world_process_zero():
                self._sam_diagnosis.check(means, logs["loss"], self.state.global_step)
        if self._sam is not None and "train_runtime" in logs:
            logs.update(self._sam.cost.summary())
            if self.is_world_process_zero():
                self._sam_diagnosis.end(self.state.global_step, "sam_rho" in self._sam.telemetry.has_recorded)
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as the base trainer does, with `sam_config.json` next to the weights."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            save_config(output_dir or self.args.output_dir, self.sam_config)

    def create_model_card(self, *args, **kwargs) -> None:
        """Write the base trainer's card with a section on sharpness-aware minimization; `push_to_hub` calls this."""
        super().create_model_card(*args, **kwargs)
        write_model_card(self, kwargs.get("dataset") or kwargs.get("dataset_name"), kwargs.get("tasks"))

    def _hp_search_setup(self, trial: Any) -> None:
        """Set up a trial as the base trainer does; its `sam_*` values go to `sam_config`, not to `TrainingArguments`.

        Raises:
            ValueError: A `sam_*` name is not a field of `SAMConfig`, or a value is out of range.
        """
        if self.hp_search_backend is None or trial is None:
            super()._hp_search_setup(trial)
            return
        if self._sam_config_given is None:
            self._sam_config_given = self.sam_config
        values = dict(self.hp_space(trial) if self.hp_search_backend == HPSearchBackend.OPTUNA else trial)
        ours = {name: values.pop(name) for name in list(values) if name.startswith("sam_")}
        self.sam_config = self._sam_config_given.changed(**{name.removeprefix("sam_"): v for name, v in ours.items()})
        hp_space = self.hp_space
        try:
            self.hp_space = lambda _: values
            super()._hp_search_setup(trial if self.hp_search_backend == HPSearchBackend.OPTUNA else values)
        finally:
            self.hp_space = hp_space
        if ours and self.sam_config.rho > 0:
            refuse_unsupported(self)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        reload_renamed_weights(self.model if model is None else model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        reload_renamed_weights(self.model, self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and not check_config(checkpoint, self.sam_config):
            logger.info(f"{checkpoint} was written by a stock Trainer: sharpness-aware minimization starts here.")
        self._sam_checkpoint = checkpoint
        super()._load_optimizer_and_scheduler(checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._sam is not None:
            save_state(output_dir, self._sam, self.args.process_index)

    def _is_measured_step(self) -> bool:
        """Whether to measure values that cost memory bandwidth: in the last perturbed step before the Trainer logs.

        Unless the Trainer logs by steps, its next entry is unpredictable, and every 50th step is used.
        """
        step = self.state.global_step
        every = int(self.state.logging_steps if self.args.logging_strategy == "steps" else 0) or 50
        next_entry = (step // every + 1) * every
        following = self._sam.schedule.next_perturbed(step + 1)
        return step == 0 or following is None or following >= next_entry

    def _read_telemetry(self) -> dict[str, float]:
        """Means over steps since the last entry and over ranks; the only place that synchronises with the device."""
        tables = nested_gather(self._sam.telemetry.drain(), self.args.parallel_mode)
        return Telemetry.means(tables)


class SAMTrainer(SAMTrainerMixin, Trainer):
    """[`~transformers.Trainer`] with sharpness-aware minimization (Foret et al. 2021, arXiv 2010.01412).

        trainer = SAMTrainer(model=model, args=args, train_dataset=data, sam_config=SAMConfig(rho=0.01))

    Takes every argument of `Trainer`, and `sam_config` as described in [`SAMTrainerMixin`].
    """


class _UpdateCallback(TrainerCallback):
    """Calls `start_update` when the model is wrapped, the optimizer exists and the number of steps is known."""

    def __init__(self, trainer: SAMTrainerMixin):
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self._trainer.start_update()

    def on_train_end(self, args, state, control, **kwargs):
        self._trainer.end_update()
