"""Fine-tune a text classifier with sharpness-aware minimization: one label, several, or a number per text or pair.

    hf-sam text-classification glue_mrpc --sam_method asam

`--sam_rho 0` is the baseline with the same configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, TrainerCallback, TrainingArguments

from hf_sam import SAMTrainer

from . import metrics as measured
from .command_line.arguments import SAMArguments, parse_arguments
from .command_line.errors import UserError
from .command_line.options import DataArguments, ModelArguments, RunArguments, option
from .data.labels import add_label_noise, check_classes, class_labels, multi_hot_labels, numeric_labels
from .data.loading import Splits, load_splits, make_splits, pick_column, public_name
from .data.summary import classes, sizes, tell, truncation
from .data.texts import GLUE, GLUE_HUB_ID, check_labelled, check_texts, tokenize
from .metrics import classification_metrics, hub_metrics, multi_label_metrics, regression_metrics
from .models import check_max_length, load_config, load_model, load_tokenizer
from .running import (
    check_training_arguments,
    classification_table,
    finish,
    multi_label_table,
    prepare,
    recorded,
    regression_table,
    save,
    train,
    write_card,
)

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
MEASURED = {SINGLE: measured.CLASSIFICATION, MULTI: measured.MULTI_LABEL, REGRESSION: measured.REGRESSION}
METRICS = tuple(dict.fromkeys(name for names in MEASURED.values() for name in names))  # on the test split
# Metrics and saved columns of predictions for each kind of label.
EVALUATION: dict[str, tuple[Callable, Callable]] = {
    SINGLE: (classification_metrics, classification_table),
    MULTI: (multi_label_metrics, multi_label_table),
    REGRESSION: (regression_metrics, regression_table),
}


@dataclass
class TextArguments:
    """The texts and the kind of labels."""

    glue_task: str | None = option(None, f"A GLUE task with its columns and splits: {', '.join(GLUE)}.")
    text_column: str | None = option(None, "Column of the texts; default: detected.")
    text_pair_column: str | None = option(None, "Column of the second text of each pair.")
    problem_type: str | None = option(None, f"{', '.join(EVALUATION)}; default: detected from the labels.")
    max_length: int = option(128, "Maximum number of tokens of a text or pair; the rest is cut off.")
    drop_empty: bool = option(False, "Drop examples without text or label; otherwise they are an error.")

    def __post_init__(self):
        if self.glue_task is not None and self.glue_task not in GLUE:
            raise ValueError(f"glue_task={self.glue_task} is unknown. Allowed: {', '.join(GLUE)}.")
        if self.problem_type is not None and self.problem_type not in EVALUATION:
            raise ValueError(f"problem_type={self.problem_type} is unknown. Allowed: {', '.join(EVALUATION)}.")


ARGUMENTS = (ModelArguments, DataArguments, TextArguments, RunArguments, SAMArguments, TrainingArguments)


def main(argv: Sequence[str] | None = None, callbacks: Sequence[TrainerCallback] = ()) -> SAMTrainer:
    """
    Train, evaluate and save.

    Args:
        argv (`Sequence[str]`, *optional*, defaults to `sys.argv[1:]`): The command line.
        callbacks (`Sequence[TrainerCallback]`, *optional*): Added to the trainer.
    """
    model_args, data_args, text_args, run_args, sam_args, args = parse_arguments(ARGUMENTS, argv)
    sam_config = prepare(args, run_args, sam_args, model_args)

    with args.main_process_first(desc="reading the data"):
        splits, texts, label_column, problem_type, names = read_data(data_args, text_args)
    check_training_arguments(args, data_args, run_args, "validation" in splits, MEASURED[problem_type])

    config = load_config(model_args, labels=names, problem_type=problem_type)
    check_max_length(text_args.max_length, config)
    tokenizer = load_tokenizer(model_args)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    config.pad_token_id = tokenizer.pad_token_id
    if args.process_index == 0:
        counted = classes(splits, label_column, names) if problem_type == SINGLE else []
        tell([*sizes(splits), *counted, *truncation(splits, texts, tokenizer, text_args.max_length)])
    model = load_model(AutoModelForSequenceClassification, model_args, config)

    with args.main_process_first(desc="tokenizing"):
        tokens = tokenize(splits, texts, label_column, tokenizer, text_args.max_length)
    tokens["train_split"] = tokens["train"]
    if data_args.streaming:
        tokens["train"] = tokens["train"].shuffle(seed=args.seed, buffer_size=data_args.shuffle_buffer)
    metrics, table = EVALUATION[problem_type]
    trainer = SAMTrainer(
        model=model,
        args=args,
        train_dataset=tokens["train"],
        eval_dataset=tokens.get("validation"),
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        callbacks=list(callbacks),
        compute_metrics=partial(metrics, hub=hub_metrics(run_args.hub_metrics)),
        sam_config=sam_config,
    )
    # The model's loss is a mean over examples that ignores `num_items_in_batch`. Without this, the Trainer would not
    # divide it under accumulation and would multiply it by the number of processes.
    trainer.model_accepts_loss_kwargs = False
    with recorded(trainer, splits, data_args, run_args, model=model_args, texts=text_args) as record:
        train(trainer)
        finish(trainer, record, tokens, run_args, table)
    save(trainer)
    write_card(trainer, dataset=[public_name(data_args)], tasks=["text-classification"])
    return trainer


def read_data(
    data_args: DataArguments, text_args: TextArguments
) -> tuple[Splits, list[str], str, str, list[str] | None]:
    """Read the splits, the columns of texts and labels, the kind of labels, and the names of the classes."""
    if text_args.glue_task is not None:
        use_glue(data_args, text_args)
    splits = load_splits(data_args)
    first = pick_column(splits, text_args.text_column, ("text", "sentence", "sentence1", "review"), "text_column")
    texts = [first]
    if text_args.text_pair_column:
        texts.append(pick_column(splits, text_args.text_pair_column, (), "text_pair_column"))
    label_column = pick_column(
        splits, data_args.label_column, ("label", "labels", "class", "score"), "label_column", taken=texts
    )
    splits = check_texts(splits, texts, text_args.drop_empty)
    splits = check_labelled(splits, label_column, text_args.drop_empty)
    problem_type = text_args.problem_type or find_problem_type(splits["train"].features, label_column)
    if problem_type == SINGLE:
        splits, names = class_labels(splits, label_column, data_args)
        splits = make_splits(splits, data_args, strata=label_column)
        check_classes(splits, label_column, names)
        return add_label_noise(splits, label_column, len(names), data_args), texts, label_column, problem_type, names
    for name in ("label_noise", "streaming", "train_samples_per_class"):
        if getattr(data_args, name):
            raise UserError(
                f"{name} needs one class per example and does not work with problem_type={problem_type}; leave it out."
            )
    if problem_type == MULTI:
        splits, names = multi_hot_labels(splits, label_column, data_args)
    else:
        splits, names = numeric_labels(splits, label_column), ["LABEL_0"]
    return make_splits(splits, data_args, strata=None), texts, label_column, problem_type, names


def use_glue(data_args: DataArguments, text_args: TextArguments) -> None:
    """Fill in data set, split and columns of the GLUE task; values given by the user are kept, for a copy on disk."""
    task = GLUE[text_args.glue_task]
    if data_args.dataset is None:
        data_args.dataset, data_args.dataset_config = GLUE_HUB_ID, text_args.glue_task
    data_args.test_split = data_args.test_split or task.test_split
    text_args.text_column = text_args.text_column or task.texts[0]
    if len(task.texts) == 2:
        text_args.text_pair_column = text_args.text_pair_column or task.texts[1]


def find_problem_type(features: Mapping[str, Any] | None, label_column: str) -> str:
    """Return the kind of labels by their type: lists are several labels, floats are numbers, all others are classes."""
    from datasets import LargeList, List

    feature = (features or {}).get(label_column)
    if isinstance(feature, (List, LargeList, list)):
        return MULTI
    if str(getattr(feature, "dtype", "")).startswith("float"):
        return REGRESSION
    return SINGLE
