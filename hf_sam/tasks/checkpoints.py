"""Checkpoints of every task, for the commands that evaluate them: their names, models and data."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    default_data_collator,
)

from ..experiments.records import RECORD_NAME, read_record
from .command_line.errors import UserError, as_user_error
from .command_line.help import wants_help
from .command_line.options import DataArguments, ModelArguments
from .data.images import ImageDataset, ImageTransform, output_size
from .data.language import tokenize_texts
from .data.loading import Splits
from .data.text_to_text import tokenize_pairs
from .data.texts import tokenize
from .data.words import tokenize_words
from .models import (
    adapter_base,
    check_image_size,
    check_max_length,
    load_image_processor,
    load_tokenizer,
    model_class_names,
)

# --- names -----------------------------------------------------------------------------------------------------------


def named_checkpoints(texts: Sequence[str]) -> dict[str, str]:
    """
    The checkpoints by name, in order.

    Raises:
        UserError: Two have the same name.
    """
    pairs = [named_checkpoint(text) for text in texts]
    if len({name for name, _ in pairs}) < len(pairs):
        raise UserError("Two checkpoints have the same name. Name them: name=checkpoint.")
    return dict(pairs)


def named_checkpoint(text: str) -> tuple[str, str]:
    """Split `name=checkpoint`; a checkpoint without a name gets a short one, also a folder such as `lr=0.1`."""
    name, equals, path = text.partition("=")
    return (name, path) if equals and not Path(text).exists() else (short_name(text), text)


def short_name(path: str) -> str:
    parts = [part for part in path.rstrip("/").split("/") if part]
    return "/".join(parts[-2:]) if parts[-1].startswith("checkpoint-") else parts[-1]


# --- task and data, from the command line and the run record of the first checkpoint -----------------------------------


def find_task(argv: Sequence[str]) -> str:
    """
    The task in the command line, or that of the first checkpoint's architecture.

    Raises:
        UserError: Neither determines the task.
    """
    known = _glance(argv)
    if wants_help(argv):
        return known.task if known.task in TASKS else next(iter(TASKS))
    if known.task is None and known.checkpoints:
        _, path = named_checkpoint(known.checkpoints[0])
        with as_user_error(OSError, ValueError, prefix=f"{path} cannot be read (is this machine offline?): "):
            config = AutoConfig.from_pretrained(adapter_base(path) or path)
        name = (config.architectures or [""])[0]
        known.task = next((task for task, row in TASKS.items() if name in model_class_names(row.auto_class)), None)
    if known.task not in TASKS:
        raise UserError(f"task={known.task} is unknown. Give --checkpoints and --task: {', '.join(TASKS)}.")
    return known.task


def recorded_data(argv: Sequence[str]) -> list[str]:
    """The data arguments of the first checkpoint's run record, for a command line; empty if `--dataset` is given."""
    known = _glance(argv)
    if known.dataset is not None or not known.checkpoints or wants_help(argv):
        return []
    path = Path(named_checkpoint(known.checkpoints[0])[1]) / RECORD_NAME
    if not path.is_file():
        return []
    with as_user_error(ValueError):
        recipe = read_record(path).config.get("recipe", {})
    given = {word.removeprefix("--").split("=")[0].replace("-", "_") for word in argv if word.startswith("--")}
    words = []
    for part in ("data", "images", "texts", "words"):
        for key, value in recipe.get(part, {}).items():
            if value is None or key in given:
                continue
            words += [f"--{key}", *map(str, value)] if isinstance(value, list) else [f"--{key}={value}"]
    return words


def fixed_rows(split: Any, count: int, seed: int) -> Dataset:
    """A sample of `count` raw rows, drawn with `seed` and kept in order."""
    if not isinstance(split, Dataset):
        raise UserError("A fixed subset of the data is needed. Switch streaming off.")
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    return split.select(sorted(order[:count].tolist()))


def _glance(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments that determine which other arguments exist."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--checkpoints", nargs="+")
    parser.add_argument("--task")
    parser.add_argument("--dataset")
    return parser.parse_known_args(list(argv))[0]


# --- models ----------------------------------------------------------------------------------------------------------


def load_checkpoint(
    auto_class: type, model_args: ModelArguments, columns: Sequence[Any], peft: str
) -> tuple[PreTrainedModel, ModelArguments]:
    """
    Load a model in float32 with its trained head, and its adapter merged or attached.

    Returns:
        `tuple`: The model, and the model arguments with the path of its processor or tokenizer.

    Raises:
        UserError: The model cannot be loaded, has no head for the task, or has other classes than the data.
    """
    path = model_args.model_name_or_path
    base = adapter_base(path)
    names = columns[-1] if auto_class not in (AutoModelForCausalLM, AutoModelForSeq2SeqLM) else None
    options: dict[str, Any] = {"dtype": "float32", "trust_remote_code": model_args.trust_remote_code}
    if base is not None and names is not None:
        options |= {"num_labels": len(names), "ignore_mismatched_sizes": True}
    with as_user_error(OSError, ValueError, prefix=f"{path} cannot be loaded as {auto_class.__name__}: "):
        model, loaded = auto_class.from_pretrained(base or path, output_loading_info=True, **options)
        if base is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, path, is_trainable=True)
            if peft == "merged":
                model = model.merge_and_unload().requires_grad_(True)
    if base is None and loaded["missing_keys"]:
        missing = ", ".join(sorted(loaded["missing_keys"])[:3])
        raise UserError(f"{path} has no trained head for this task (missing: {missing}). Fine-tune it first.")
    if names is not None and model.config.num_labels != len(names):
        raise UserError(
            f"{path} has {model.config.num_labels} classes, but the data have {len(names)}: {', '.join(names)}."
        )
    has_own = any((Path(path) / file).is_file() for file in ("tokenizer_config.json", "preprocessor_config.json"))
    source = path if base is None or has_own else base
    return model, dataclasses.replace(model_args, model_name_or_path=source)


# --- data per task ---------------------------------------------------------------------------------------------------


def prepare_images(splits: Splits, columns: Sequence[Any], model_args: ModelArguments, image_args: Any, model: Any):
    image_column, label_column, _ = columns
    processor = load_image_processor(model_args, model.config, image_args.image_size)
    check_image_size(model, output_size(processor))
    transform = ImageTransform(processor)
    return {
        n: ImageDataset(s, image_column, label_column, transform, n) for n, s in splits.items()
    }, default_data_collator


def prepare_texts(splits: Splits, columns: Sequence[Any], model_args: ModelArguments, text_args: Any, model: Any):
    texts, label_column, _, _ = columns
    tokenizer = _tokenizer(model_args)
    check_max_length(text_args.max_length, model.config)
    return tokenize(splits, texts, label_column, tokenizer, text_args.max_length), DataCollatorWithPadding(tokenizer)


def prepare_language(splits: Splits, columns: Sequence[Any], model_args: ModelArguments, lm_args: Any, model: Any):
    (names,) = columns
    if len(names) > 1 or names == ("messages",):
        raise UserError(
            f"Sharpness is measured on texts, not on {' + '.join(names)}. Name a column with --text_column."
        )
    tokenizer = _tokenizer(model_args)
    check_max_length(lm_args.max_length, model.config)
    return tokenize_texts(splits, names[0], tokenizer, lm_args.max_length), DataCollatorForSeq2Seq(tokenizer)


def prepare_pairs(splits: Splits, columns: Sequence[Any], model_args: ModelArguments, text_args: Any, model: Any):
    tokenizer = _tokenizer(model_args)
    check_max_length(text_args.max_length, model.config)
    tokens = tokenize_pairs(splits, tokenizer, text_args.max_length, text_args.max_target_length)
    return tokens, DataCollatorForSeq2Seq(tokenizer, model=model)


def prepare_words(splits: Splits, columns: Sequence[Any], model_args: ModelArguments, word_args: Any, model: Any):
    words, label_column, _ = columns
    tokenizer = _tokenizer(model_args)
    check_max_length(word_args.max_length, model.config)
    tokens = {n: tokenize_words(s, words, label_column, tokenizer, word_args.max_length) for n, s in splits.items()}
    return tokens, DataCollatorForTokenClassification(tokenizer)


def _tokenizer(model_args: ModelArguments):
    tokenizer = load_tokenizer(model_args)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side = "right"  # left padding would make positions depend on the batch
    return tokenizer


@dataclass(frozen=True)
class Task:
    """
    How to load the data and models of one recipe.

    Args:
        auto_class (`type`): The auto class of the models.
        recipe (`str`): The module of the recipe, imported only if needed.
        arguments_name (`str`): Name of its dataclass of task-specific data arguments.
        prepare (`Callable`): Function from rows to examples and a collator.
    """

    auto_class: type
    recipe: str
    arguments_name: str
    prepare: Callable

    @property
    def arguments(self) -> type:
        return getattr(importlib.import_module(f"hf_sam.tasks.{self.recipe}"), self.arguments_name)

    def read_data(self, data_args: DataArguments, task_args: Any) -> tuple:
        return importlib.import_module(f"hf_sam.tasks.{self.recipe}").read_data(data_args, task_args)


TASKS = {
    "image-classification": Task(
        AutoModelForImageClassification,
        "image_classification",
        "ImageArguments",
        prepare_images,
    ),
    "text-classification": Task(
        AutoModelForSequenceClassification,
        "text_classification",
        "TextArguments",
        prepare_texts,
    ),
    "causal-lm": Task(AutoModelForCausalLM, "causal_lm", "LanguageArguments", prepare_language),
    "seq2seq": Task(AutoModelForSeq2SeqLM, "seq2seq", "Seq2SeqArguments", prepare_pairs),
    "token-classification": Task(
        AutoModelForTokenClassification, "token_classification", "WordArguments", prepare_words
    ),
}
