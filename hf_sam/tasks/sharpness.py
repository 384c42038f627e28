"""Measure the sharpness of the loss around fine-tuned checkpoints.

    hf-sam sharpness --checkpoints adamw=outputs/digits_adamw sam=outputs/digits_sam

By default, the data are those in the first checkpoint's run record; `--dataset` and the other data arguments of the
training recipes override them. Writes `sharpness.json`, `report.html`, `report.md`, figures and their numbers to
`--output_dir`. With `--num_processes N`, the processes split the examples, and the results are the same.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from tqdm.auto import tqdm
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

from hf_sam.sharpness import SharpnessConfig, Subset, SubsetLoss, line_between, measure, scalars

from ..experiments.json_files import plain, write_json
from ..experiments.provenance import describe_environment, peak_memory
from ..experiments.records import RECORD_NAME, read_record
from ..reporting.sharpness import FORMAT, VERSION, write_sharpness_report
from .command_line.arguments import parse_arguments
from .command_line.errors import UserError, as_user_error
from .command_line.help import command_again, wants_help
from .command_line.options import DataArguments, ModelArguments, option
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

DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass
class CheckpointArguments:
    """The checkpoints, and the examples to measure on."""

    checkpoints: list[str] = field(metadata={"help": "Local folders or hub ids, optionally as name=checkpoint."})
    task: str | None = option(
        None, "image-classification, text-classification, causal-lm, ...; by default that of the first checkpoint."
    )
    output_dir: str = option("outputs/sharpness", "Folder for sharpness.json, the report and its figures.")
    split: str = option("train", "Split to measure on, without augmentation.")
    num_examples: int = option(256, "Number of examples of the split, sampled with subset_seed.")
    batch_size: int = option(16, "Examples per batch and process; affects memory and speed, not the results.")
    dtype: str = option("float32", "Precision: float32 or float64.")
    perturb: str = option("all", "Parameters to perturb: all, norm, no-norm-no-bias, or patterns separated by commas.")
    peft: str = option("merged", "How to measure an adapter: merged into the weights, or its factors.")
    line: bool = option(False, "Also measure the loss on the line between the first checkpoint and each other one.")
    line_points: int = option(11, "Points on each line.")
    update_records: bool = option(
        True, "Also write the results to the run_record.json of each checkpoint that has one."
    )
    disable_tqdm: bool = option(False, "Hide progress bars.")
    trust_remote_code: bool = option(
        False, "Run Python code that comes with the model. Use only with sources you trust."
    )

    def __post_init__(self):
        for name, allowed in (("dtype", DTYPES), ("peft", ("merged", "factors"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)} is unknown. Allowed: {', '.join(allowed)}.")
        for name in ("num_examples", "batch_size", "line_points"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")

    @property
    def named(self) -> dict[str, str]:
        """Checkpoints by name, in order."""
        pairs = [named_checkpoint(text) for text in self.checkpoints]
        if len({name for name, _ in pairs}) < len(pairs):
            raise UserError("Two checkpoints have the same name. Name them: name=checkpoint.")
        return dict(pairs)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    argv = list(sys.argv[1:] if argv is None else argv)
    task = TASKS[find_task(argv)]
    args, data_args, task_args, config = parse_arguments(argument_types(task), [*argv, *recorded_data(argv)])
    state = PartialState(cpu=not torch.accelerator.is_available())
    named = args.named
    with state.main_process_first():
        splits, *columns = task.read_data(data_args, task_args)
    if args.split not in splits:
        raise UserError(f"split={args.split} does not exist. Allowed: {', '.join(splits)}.")
    rows = fixed_rows(splits[args.split], args.num_examples, data_args.subset_seed)

    checkpoints, losses = {}, {}
    subset = None
    for name, path in named.items():
        model_args = ModelArguments(model_name_or_path=path, trust_remote_code=args.trust_remote_code)
        model, processor_args = load_checkpoint(task.auto_class, model_args, columns, args.peft)
        with state.main_process_first():
            examples, collator = task.prepare({args.split: rows}, columns, processor_args, task_args, model)
        subset = Subset.of(examples[args.split], model, data_collator=collator, batch_size=args.batch_size)
        with tqdm(
            desc=name, unit=" batches", mininterval=1, disable=args.disable_tqdm or not state.is_main_process
        ) as bar:
            perturb = [part.strip() for part in args.perturb.split(",")]
            with as_user_error(ValueError, prefix=f"{path}: "):
                loss = SubsetLoss(
                    model.to(state.device),
                    subset,
                    perturb=perturb[0] if len(perturb) == 1 else perturb,
                    dtype=DTYPES[args.dtype],
                    progress=bar.update,
                )
            pass_seconds, gradient_memory = gradient_cost(loss)
            results = measure(
                loss, config, lambda measure, name=name, bar=bar: bar.set_description(f"{name}: {measure}")
            )
        numbers = scalars(results)
        checkpoints[name] = {
            "path": path,
            "parameters": loss.weights.numel(),
            "fingerprint": subset.fingerprint,
            "scalars": numbers,
            "measures": results,
            "epoch_seconds": pass_seconds * len(splits["train"]) / len(subset),
            "gradient_memory": gradient_memory,
            "peak_memory": peak_memory(),
        }
        losses[name] = loss
        if not args.line:
            del losses[name]

    record = {
        "format": FORMAT,
        "version": VERSION,
        "subset": {
            "dataset": data_args.dataset,
            "split": args.split,
            "examples": len(subset),
            "labels": loss.num_labels,
            "fingerprint": subset.fingerprint,
            "epoch_examples": len(splits["train"]),
        },
        "perturb": args.perturb,
        "dtype": args.dtype,
        "peft": args.peft,
        "config": dataclasses.asdict(config),
        "checkpoints": checkpoints,
        "lines": lines_from_first(losses, args.line_points),
        "environment": describe_environment(),
    }
    if state.is_main_process:
        words = command_again("sharpness", argv)
        save(plain(record), Path(args.output_dir), args.update_records, words)
    return record


def argument_types(task: Task) -> tuple[type, ...]:
    """The dataclasses that the command line is parsed into."""
    return CheckpointArguments, DataArguments, task.arguments, SharpnessConfig


# --- task and data ---------------------------------------------------------------------------------------------------


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


def named_checkpoint(text: str) -> tuple[str, str]:
    """Split `name=checkpoint`; a checkpoint without a name gets a short one, also a folder such as `lr=0.1`."""
    name, equals, path = text.partition("=")
    return (name, path) if equals and not Path(text).exists() else (_short_name(text), text)


def _short_name(path: str) -> str:
    parts = [part for part in path.rstrip("/").split("/") if part]
    return "/".join(parts[-2:]) if parts[-1].startswith("checkpoint-") else parts[-1]


# --- checkpoints -----------------------------------------------------------------------------------------------------


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


# --- data per task -----------------------------------------------------------------------------------------------------


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


# --- results -----------------------------------------------------------------------------------------------------------


def gradient_cost(loss: SubsetLoss) -> tuple[float, int]:
    """Seconds of one gradient over the subset, after a warm-up, and the peak memory so far in bytes."""
    loss.gradient()
    start = time.perf_counter()
    loss.gradient()
    return time.perf_counter() - start, peak_memory()


def lines_from_first(losses: dict[str, SubsetLoss], points: int) -> list[dict[str, Any]]:
    """The loss on the line from the first checkpoint to each other one."""
    names = list(losses)
    lines = []
    for name in names[1:]:
        with as_user_error(ValueError, prefix=f"line from {names[0]} to {name}: "):
            line = line_between(losses[names[0]], losses[name], points)
        lines.append({"first": names[0], "second": name, "t": line.t, "losses": line.losses, "barrier": line.barrier})
    return lines


def save(record: dict[str, Any], folder: Path, update_records: bool, command: str) -> None:
    """Write `sharpness.json`, the report, and the results in the checkpoints' run records."""
    write_json(folder / "sharpness.json", record)
    report = write_sharpness_report(record, folder, command)
    print(f"Wrote {folder / 'sharpness.json'} and {report}")
    for entry in record["checkpoints"].values():
        path = Path(entry["path"]) / RECORD_NAME
        if update_records and path.is_file():
            with as_user_error(ValueError):
                run_record = read_record(path)
            run_record.sharpness = copy.deepcopy(entry["scalars"])
            run_record.write(path)
            print(f"Updated {path}")
