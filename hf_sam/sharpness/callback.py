"""Log sharpness during training like any other metric, without affecting the run."""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .loss import SubsetLoss
from .profile import SharpnessConfig, measure, scalars
from .subset import Subset


class SharpnessCallback(TrainerCallback):
    """
    Measure the model every `every` steps and log the numbers as `sharpness/<name>`.

        trainer.add_callback(SharpnessCallback(trainer, SharpnessConfig(measures=["sam"]), every=100))

    Weights, gradients, random states, the data order and the Trainer's own log entries are bitwise those of the run
    without the callback. Every process must have the callback, since they share the work.

    Args:
        trainer (`Trainer`):
            The trainer that the callback is added to; its `log` reports the numbers.
        config ([`SharpnessConfig`], *optional*):
            What to measure; SAM's own sharpness by default, at the cost of a few passes over the subset.
        dataset (`Dataset`, *optional*, defaults to the training set):
            The data to measure on, without augmentation.
        num_examples (`int`, *optional*, defaults to 256):
            Size of the subset.
        every (`int`, *optional*, defaults to 100):
            Measure after every `every` optimizer steps, and at the start and the end.
        batch_size (`int`, *optional*, defaults to the evaluation batch size):
            Examples per batch.

    Raises:
        ValueError: `every` is below 1.
    """

    def __init__(
        self,
        trainer: Trainer,
        config: SharpnessConfig | None = None,
        *,
        dataset: Any = None,
        num_examples: int = 256,
        every: int = 100,
        batch_size: int | None = None,
    ):
        if every < 1:
            raise ValueError(f"every={every!r} must be at least 1 step.")
        self.trainer = trainer
        self.config = config or SharpnessConfig(measures=["sam"], adaptive_rho=[])
        self.dataset, self.num_examples, self.every, self.batch_size = dataset, num_examples, every, batch_size
        self._subset: Subset | None = None
        self._measured_at: int | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._measure(args, state, control)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if state.global_step % self.every == 0:
            self._measure(args, state, control)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if self._measured_at != state.global_step:
            self._measure(args, state, control)

    def _measure(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        model = self.trainer.model
        if self._subset is None:
            self._subset = Subset.of(
                self.trainer.train_dataset if self.dataset is None else self.dataset,
                model,
                self.num_examples,
                seed=self.config.seed,
                data_collator=self.trainer.data_collator,
                batch_size=self.batch_size or args.eval_batch_size,
            )
        results = measure(SubsetLoss(model, self._subset), self.config)
        self._measured_at = state.global_step
        should_log = control.should_log  # `log` clears it, which would drop the Trainer's own entry of this step
        self.trainer.log({f"sharpness/{name}": value for name, value in scalars(results).items()})
        control.should_log = should_log
