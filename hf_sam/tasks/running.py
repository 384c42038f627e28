"""The steps that every recipe takes before training (seed, folder, checkpoint) and after it (evaluate, save, card)."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import torch
import transformers
from transformers import Trainer, TrainingArguments, set_seed
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.trainer_utils import IntervalStrategy

from hf_sam.config import SAMConfig

from ..evaluation.metrics import METRICS
from ..experiments.pausing import BeforeFirstStep
from ..experiments.provenance import describe_data
from ..experiments.records import RECORD_NAME, RunRecord, recording
from ..suggestions import did_you_mean
from .command_line.arguments import SAMArguments
from .command_line.errors import Interrupted, UserError, as_user_error
from .command_line.options import DataArguments, ModelArguments, RunArguments
from .data.loading import Splits
from .metrics import class_probabilities, logits_of
from .output_folder import is_finished, last_complete_checkpoint, lock_folder, missing_from_checkpoint

logger = logging.getLogger(__name__)
Table = Callable[[Any, np.ndarray], dict[str, Any]]


def prepare(
    args: TrainingArguments, run_args: RunArguments, sam_args: SAMArguments, model_args: ModelArguments
) -> SAMConfig:
    """
    Set the seed, lock `output_dir` and find the checkpoint to resume from; print and return the SAM configuration.

    With `resume_from_checkpoint="auto"`, training resumes from the last complete checkpoint in `output_dir`, or starts
    from the beginning if there is none.

    Raises:
        UserError: If `output_dir` cannot be used, or contains an earlier run that is neither resumed nor overwritten.
    """
    sam_config = sam_args.to_config()
    if args.process_index == 0:
        print(f"SAM: {sam_args.explain()}", flush=True)
        if model_args.model_type is None and sam_args.has_rho_for_training_from_scratch:
            print(
                f"note: rho {sam_config.rho:g} is from the paper of {sam_config.method}, which trained from scratch, and "
                "is untested for fine-tuning; `hf-sam find-rho` searches for a suitable value, 0 included.",
                flush=True,
            )
    if args.disable_tqdm:
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    args.dataloader_pin_memory = args.dataloader_pin_memory and torch.accelerator.is_available()
    if args.logging_steps == 1:
        args.logging_steps = 1  # argparse yields 1.0, and `TrainingArguments` converts only values above 1 to int
    best = (args.metric_for_best_model or "").removeprefix("eval_")
    if best in METRICS:  # the Trainer takes any metric whose name does not end in "loss" to be better if it is higher
        args.greater_is_better = METRICS[best].higher_is_better
    set_seed(args.seed)
    check_reporters(args)
    folder = Path(args.output_dir)
    if folder.is_file():
        raise UserError(f"output_dir={folder} is a file; choose a folder.")
    if args.process_index == 0:
        lock_folder(folder)
    checkpoints = sorted(folder.glob("checkpoint-*")) if folder.is_dir() else []
    if run_args.overwrite_output_dir:
        if args.resume_from_checkpoint:
            raise UserError("Give resume_from_checkpoint or overwrite_output_dir, not both.")
        if args.process_index == 0:
            (folder / RECORD_NAME).unlink(missing_ok=True)
            for checkpoint in checkpoints:
                shutil.rmtree(checkpoint)
    elif args.resume_from_checkpoint in ("auto", "true", "True"):
        args.resume_from_checkpoint = last_complete_checkpoint(folder, args)
    elif args.resume_from_checkpoint:
        missing = missing_from_checkpoint(Path(args.resume_from_checkpoint), args)
        if missing:
            raise UserError(
                f"resume_from_checkpoint={args.resume_from_checkpoint} is not a complete checkpoint: {missing}."
            )
    elif checkpoints:
        raise UserError(
            f"output_dir={folder} already contains {checkpoints[-1].name}. Continue from it with --resume_from_checkpoint auto, "
            f"start over with --overwrite_output_dir true, or choose another folder."
        )
    elif is_finished(folder):
        raise UserError(
            f"output_dir={folder} contains a finished run; start over with --overwrite_output_dir true, or choose another folder."
        )
    return sam_config


def check_reporters(args: TrainingArguments) -> None:
    """
    Check the trackers in `report_to`.

    Raises:
        UserError: If a tracker is unknown or its package is not installed.
    """
    available = get_available_reporting_integrations()
    for name in args.report_to if isinstance(args.report_to, list) else [args.report_to]:
        if name in ("all", "none", *available):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            hint = did_you_mean(name, INTEGRATION_TO_CALLBACK, f" Allowed: none, {', '.join(INTEGRATION_TO_CALLBACK)}.")
            raise UserError(f"report_to={name} is not a tracker known to the Trainer.{hint}")
        raise UserError(f"report_to={name}: its package is not installed. Run pip install {name}, or give "
                        f"--report_to none.")  # fmt: skip


def check_optimizer(trainer: Trainer) -> None:
    """
    Check that the optimizer can be created.

    Raises:
        UserError: If the optimizer's library is not installed or a required argument is missing.
    """
    with as_user_error(ImportError, ValueError, RuntimeError, prefix=f"optim={trainer.args.optim.value}: "):
        trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)


def check_training_arguments(
    args: TrainingArguments,
    data_args: DataArguments,
    run_args: RunArguments,
    has_validation: bool,
    metrics: Sequence[str] = (),
) -> None:
    """
    Check for values and combinations that `TrainingArguments` accepts but that would fail late or have no effect.

    Args:
        args (`TrainingArguments`): The arguments to check.
        data_args (`DataArguments`): `streaming` and `validation_samples` are used.
        run_args (`RunArguments`): `score_split` and `hub_metrics` are used.
        has_validation (`bool`): Whether there is a validation split.
        metrics (`Sequence[str]`, *optional*): Names of the task's metrics.

    Raises:
        UserError: If a check fails; the message names the argument and the fix.
    """
    if args.eval_strategy != IntervalStrategy.NO and not has_validation:
        raise UserError(
            f"eval_strategy={args.eval_strategy.value} needs a validation split (the test split is used once, at the "
            f"end): give --validation_size 0.1, or --validation_split."
        )
    if run_args.score_split == "validation" and not has_validation:
        raise UserError(
            "score_split=validation needs a validation split: give --validation_size 0.1, or --validation_split."
        )
    with as_user_error(ValueError):
        data_args.check_validation_samples()
    best = (args.metric_for_best_model or "loss").removeprefix("eval_")
    # The names of metrics from the hub are known only once they have been computed.
    if metrics and best not in metrics and not run_args.hub_metrics:
        raise UserError(
            f"metric_for_best_model={args.metric_for_best_model} is not a metric of this task."
            f"{did_you_mean(best, metrics)} Allowed: {', '.join(metrics)}."
        )
    if data_args.streaming and args.max_steps <= 0:
        raise UserError(
            "streaming needs a number of steps, because the length of a stream is unknown; give --max_steps."
        )
    if args.max_steps <= 0 and args.num_train_epochs <= 0:
        raise UserError(f"num_train_epochs={args.num_train_epochs} must be above 0, or give --max_steps.")
    if args.learning_rate <= 0:
        raise UserError(f"learning_rate={args.learning_rate} must be above 0.")
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(args, name) < 1:
            raise UserError(f"{name}={getattr(args, name)} must be at least 1.")


def train(trainer: Trainer) -> None:
    """
    Train, from the checkpoint found by `prepare` if there is one; print and save the training metrics.

    After a resume, time and `train_loss` cover the whole run if the checkpoint recorded those of the steps before it.
    """
    try:
        metrics = trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint).metrics
    except BeforeFirstStep:
        trainer.is_in_train = False
        return
    ended = next(entry for entry in reversed(trainer.state.log_history) if "train_runtime" in entry)
    metrics |= {name: ended[name] for name in metrics.keys() & ended.keys()}
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)


@contextmanager
def recorded(
    trainer: Trainer, splits: Splits, data_args: DataArguments, run_args: RunArguments, **settings: Any
) -> Iterator[RunRecord]:
    """
    Maintain `run_record.json` in `output_dir` while the block trains and evaluates.

    Args:
        trainer (`Trainer`): Not yet trained.
        splits (`dict`): The data before preprocessing; their fingerprints are recorded.
        data_args (`DataArguments`): Give the default names of task and condition.
        run_args (`RunArguments`): `task`, `arm`, `condition`, `budget` and `phase` are used.
        **settings: The recipe's other argument objects, recorded so that the run can be repeated.
    """
    sam = trainer.sam_config
    trainer.run_phase = run_args.phase
    check_optimizer(trainer)
    arm = f"{sam.name} ({trainer.args.optim.value})" if sam.rho > 0 else trainer.args.optim.value
    noise = f"noise {data_args.label_noise:g}" if data_args.label_noise else "clean"
    with recording(
        Path(trainer.args.output_dir) / RECORD_NAME,
        trainer,
        recipe={name: vars(value) for name, value in {**settings, "data": data_args}.items()}
        | ({"phase": run_args.phase} if run_args.phase else {}),
        task=run_args.task or Path(str(data_args.dataset)).name,
        arm=run_args.arm or arm,
        condition=run_args.condition or noise,
        budget=run_args.budget,
        data={name: describe_data(split) for name, split in splits.items()},
    ) as record:
        try:
            yield record
        except KeyboardInterrupt:
            raise Interrupted(_where_it_stands(trainer)) from None


def _where_it_stands(trainer: Trainer) -> str:
    """Describe how far an interrupted run got and how to resume it."""
    line = f"Interrupted at step {trainer.state.global_step} of {trainer.state.max_steps}."
    checkpoint = last_complete_checkpoint(Path(trainer.args.output_dir), trainer.args)
    if checkpoint is None:
        return f"{line} No checkpoint was saved (see save_strategy, save_steps); the same command starts over."
    return f"{line} The same command with --resume_from_checkpoint auto continues from {checkpoint}."


def evaluate(trainer: Trainer, split: Any, name: str, table: Table | None = None) -> dict[str, float]:
    """
    Evaluate on a split, log and save the metrics, and save the predictions.

    Args:
        trainer (`Trainer`): A trained trainer.
        split (`Dataset`): The examples to predict.
        name (`str`): Name of the split, used in `<name>_results.json` and `<name>_predictions.parquet`.
        table (`Callable`, *optional*):
            Maps predictions and labels to the columns of the saved predictions; without it, none are saved.

    Returns:
        `dict[str, float]`: The metrics, without the prefix for the split.
    """
    output = trainer.predict(split, metric_key_prefix=name)
    trainer.log(dict(output.metrics))
    trainer.log_metrics(name, output.metrics)
    trainer.save_metrics(name, output.metrics)
    if table is not None and trainer.is_world_process_zero():
        frame = pd.DataFrame(table(output.predictions, output.label_ids)).rename_axis("index").reset_index()
        frame.to_parquet(predictions_file(trainer, name), index=False)
    timing = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    metrics = {key.removeprefix(f"{name}_"): value for key, value in output.metrics.items()}
    return {key: value for key, value in metrics.items() if key not in timing}


def predictions_file(trainer: Trainer, name: str) -> Path:
    """Return the path where `evaluate` saves the predictions of a split."""
    return Path(trainer.args.output_dir) / f"{name}_predictions.parquet"


def finish(trainer: Trainer, record: RunRecord, splits: dict[str, Any], run_args: RunArguments, table: Table) -> None:
    """
    Evaluate on the test split and, with `evaluate_train`, on the training split; add the metrics to the record.

    With `score_split="validation"`, the validation split replaces the test split, which is then not used.
    """
    record.metrics = evaluate(trainer, splits[run_args.score_split], "test", table)
    record.predictions = predictions_file(trainer, "test").name
    if run_args.evaluate_train:
        on_train = evaluate(trainer, splits["train_split"], "train_split")
        record.metrics |= {f"train_{key}": value for key, value in on_train.items()}


def classification_table(predictions: Any, labels: np.ndarray) -> dict[str, Any]:
    """Return the columns of saved predictions: true class, predicted class, probability of every class."""
    probabilities = class_probabilities(predictions)
    return {"label": labels, "prediction": probabilities.argmax(axis=1), "probabilities": list(probabilities)}


def regression_table(predictions: Any, labels: np.ndarray) -> dict[str, Any]:
    """Return the columns of saved predictions: true and predicted number."""
    return {"label": np.reshape(labels, -1), "prediction": np.reshape(logits_of(predictions), -1)}


def multi_label_table(predictions: Any, labels: np.ndarray) -> dict[str, Any]:
    """Return the columns of saved predictions: true 0 or 1, and probability, of every label."""
    return {"label": list(labels), "probabilities": list(1 / (1 + np.exp(-logits_of(predictions).astype(float))))}


def perplexity_table(predictions: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Return the columns of saved predictions: summed negative log-likelihood and number of tokens."""
    return {"nll": predictions, "tokens": labels}


def save(trainer: Trainer) -> None:
    """Save the model, its tokenizer or processor, and the Trainer's state in `output_dir`, if it has been trained."""
    if trainer.state.global_step == 0:
        return
    trainer.save_model()
    trainer.save_state()


def write_card(trainer: Trainer, **details: Any) -> None:
    """
    Write the model card to `output_dir`; with `push_to_hub`, push the model and its card to the hub.

    Args:
        trainer (`Trainer`): A trained and evaluated trainer.
        **details: Arguments of the trainer's `create_model_card`.
    """
    if trainer.args.push_to_hub:
        trainer.push_to_hub(**details)
    else:
        trainer.create_model_card(**details)
    if trainer.is_world_process_zero():
        print(f"saved: model, model card (README.md) and test results in {trainer.args.output_dir}", flush=True)
