"""Report on fine-tuned checkpoints: metrics with intervals, calibration, disagreements, paired tests, robustness.

    hf-sam report outputs/digits_adamw outputs/digits_sam --output_dir outputs/report
    hf-sam report adamw=outputs/a sam=some/hub-id --dataset imdb --test_samples 1000

Checkpoints are local folders, hub ids or PEFT adapters, optionally named as name=checkpoint. By default, the data are
those in the first checkpoint's run record; `--dataset` and the other data arguments of the training recipes override
them. Writes a self-contained `report.html`, the same as `report.md`, and the numbers.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from hf_sam.sharpness import SharpnessConfig

from ..evaluation.corruptions import IMAGE_CORRUPTIONS, LEVELS, TEXT_CORRUPTIONS
from ..evaluation.predictions import LanguagePredictions, Predictions
from ..evaluation.survival import SurvivalConfig
from ..experiments.provenance import describe_data, describe_environment, describe_model
from ..experiments.records import RECORD_NAME, RecordError, read_record
from ..reporting.checkpoints import Evaluated, make_checkpoint_document
from ..reporting.document import Section, write_document
from ..reporting.survival import survival_section
from . import sharpness, text_classification
from .checkpoints import TASKS, find_task, load_checkpoint, named_checkpoints, recorded_data
from .command_line.arguments import parse_arguments
from .command_line.errors import UserError
from .command_line.help import command_again
from .command_line.options import DataArguments, ModelArguments, option
from .data.images import open_image, undecoded
from .data.language import sequence_nll
from .data.text_to_text import SOURCE, TARGET
from .models import device
from .per_token import label_nll

THUMBNAIL = 96  # pixels of the longer side


@dataclass
class ReportArguments:
    """The checkpoints, and what to evaluate."""

    checkpoints: list[str] = field(metadata={"help": "Local folders or hub ids, optionally as name=checkpoint."})
    task: str | None = option(
        None,
        "image-classification, text-classification, causal-lm or seq2seq; by default that of the first checkpoint.",
    )
    output_dir: str = option("outputs/report", "Folder for report.html and the other outputs.")
    split: str = option("test", "Split to evaluate on.")
    batch_size: int = option(32, "Examples per batch.")
    corruption_samples: int = option(500, "Number of test examples to corrupt; 0 skips the robustness section.")
    sharpness: bool = option(False, "Also measure sharpness; accepts the options of `hf-sam sharpness`.")
    survival: bool = option(False, "Also evaluate after quantization, pruning and noise (`hf-sam survival`).")
    num_examples: int = option(256, "Number of training examples for sharpness.")
    bootstrap_seed: int = option(0, "Seed of the intervals and the corruptions.")
    disable_tqdm: bool = option(False, "Hide progress bars.")
    trust_remote_code: bool = option(
        False, "Run Python code that comes with the model. Use only with sources you trust."
    )

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1.")
        if self.corruption_samples < 0:
            raise ValueError(f"corruption_samples={self.corruption_samples} must be at least 0.")


def main(argv: Sequence[str] | None = None) -> Path:
    shown_argv = list(sys.argv[1:] if argv is None else argv)
    argv = with_option_name(list(shown_argv))
    if not argv:
        print(__doc__)
        raise UserError("Give at least one checkpoint: a folder or a hub id.")
    name = find_task(argv)
    if name == "token-classification":
        raise UserError(
            "Reports do not support token-classification checkpoints: their intervals assume independent examples, which the "
            "words of a sentence are not. Use recipes/compare.py to report on runs, or recipes/sharpness.py on checkpoints."
        )
    task = TASKS[name]
    args, data_args, task_args, *_ = parse_arguments(
        [ReportArguments, DataArguments, task.arguments, SharpnessConfig, SurvivalConfig],
        [*argv, *recorded_data(argv)],
    )
    named = named_checkpoints(args.checkpoints)
    for path in named.values() if args.task is None else ():  # fail before minutes are spent on the first one
        other = find_task(["--checkpoints", path])
        if other != name:
            raise UserError(f"{path} is for {other}, the first checkpoint for {name}. Report on them separately.")
    if args.disable_tqdm:
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    splits, *columns = task.read_data(data_args, task_args)
    if task.recipe == "seq2seq":  # evaluated by the likelihood of the targets, as for a language model
        columns = [[SOURCE, TARGET]]
    check_one_class(columns, "report")
    if args.split not in splits:
        raise UserError(f"split={args.split} does not exist. Allowed: {', '.join(splits)}.")
    rows = splits[args.split]
    if not isinstance(rows, Dataset):
        raise UserError("A report needs the whole test split. Switch streaming off.")
    is_classifier = columns[-1] is not None and len(columns) > 1
    some, corrupted = corrupt(rows, columns, args) if is_classifier else (None, {})

    evaluated = []
    for name, path in named.items():
        model_args = ModelArguments(model_name_or_path=path, trust_remote_code=args.trust_remote_code)
        model, processor_args = load_checkpoint(task.auto_class, model_args, columns, "merged")
        model.to(device()).eval()

        def predict(split: Dataset, what: str, model=model, processor_args=processor_args):
            examples, collator = task.prepare({args.split: split}, columns, processor_args, task_args, model)
            loader = DataLoader(examples[args.split], args.batch_size, collate_fn=collator)
            return predictions_of(model, tqdm(loader, desc=what, disable=args.disable_tqdm))

        start = time.perf_counter()
        predictions = predict(rows, name)
        seconds = time.perf_counter() - start
        check_finite(predictions, path)
        evaluated.append(
            Evaluated(
                name,
                path,
                predictions,
                model=describe_model(model),
                size=sum(tensor.numel() * tensor.element_size() for tensor in model.parameters()),
                seconds=seconds,
                corrupted={key: predict(split, f"{name}, {key[0]} {key[1]}") for key, split in corrupted.items()},
                corrupted_rows=some,
                data=recorded_splits(Path(path)),
            )
        )
    document = make_checkpoint_document(
        evaluated,
        facts={
            "data": str(data_args.dataset),
            "split": args.split,
            **{name: _words(value) for name, value in describe_data(rows).items()},
            "software": ", ".join(f"{name} {version}" for name, version in describe_environment()["packages"].items()),
        },
        examples=shown_examples(rows, columns),
        class_names=columns[-1] if len(columns) > 1 else None,
        seed=args.bootstrap_seed,
        sharpness=measure_sharpness(argv, Path(args.output_dir)) if args.sharpness else None,
        survival=measure_survival(argv, Path(args.output_dir)) if args.survival else None,
        command=command_again("report", shown_argv),
        image_of=thumbnails(rows, columns[0], args.split) if task.recipe == "image_classification" else None,
    )
    report = write_document(document, Path(args.output_dir))
    print(f"Report: {report}")
    return report


def _words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def with_option_name(argv: list[str]) -> list[str]:
    """Put `--checkpoints`, which the parsers need, before checkpoints given as positional arguments."""
    count = next((index for index, word in enumerate(argv) if word.startswith("-")), len(argv))
    return ["--checkpoints", *argv[:count], *argv[count:]] if count else argv


@torch.no_grad()
def predictions_of(model: Any, batches: Any) -> Predictions | LanguagePredictions:
    """The model's predictions for every example, in order: class probabilities, or losses per text."""
    outputs, labels = [], []
    for batch in batches:
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        target = batch.pop("labels")
        logits = model(**batch).logits
        is_language = logits.ndim == 3
        if is_language:
            if model.config.is_encoder_decoder:
                sums, counts = label_nll(logits, target)
            else:
                sums, counts = sequence_nll(logits, target, batch.get("position_ids"))
            outputs.append(sums.double().cpu())
            labels.append(counts.cpu())
        else:
            outputs.append(logits.double().softmax(-1).cpu())
            labels.append(target.cpu())
    values, told = torch.cat(outputs).numpy(), torch.cat(labels).numpy()
    return LanguagePredictions(values, told) if is_language else Predictions(told, values)


def check_one_class(columns: Sequence[Any], command: str) -> None:
    """
    Check the kind of labels.

    Raises:
        UserError: Examples of a classifier do not have exactly one class each.
    """
    if len(columns) == 4 and columns[2] != text_classification.SINGLE:  # texts, labels, kind of labels, names
        raise UserError(
            f"`hf-sam {command}` supports classifiers with one class per example, and language models, not "
            f"problem_type={columns[2]}."
        )


def check_finite(predictions: Predictions | LanguagePredictions, path: str) -> None:
    """
    Check that a checkpoint gives numbers.

    Raises:
        UserError: It gives NaN or infinity, which no test could compare.
    """
    values = predictions.nll if isinstance(predictions, LanguagePredictions) else predictions.probabilities
    if not np.isfinite(values).all():
        raise UserError(f"{path} gives NaN or infinite values, as after training that diverged. Leave it out.")


def recorded_splits(path: Path) -> dict[str, Any]:
    """The data in the run record of a checkpoint or of the run it belongs to; empty without a record."""
    for folder in (path, path.parent) if path.name.startswith("checkpoint-") else (path,):
        with suppress(RecordError):
            return read_record(folder / RECORD_NAME).data
    return {}


def thumbnails(rows: Dataset, image_column: str, split: str) -> Callable[[int], Any]:
    """A function from the index of an example to its thumbnail."""
    images = undecoded(rows, image_column)

    def image_of(index: int) -> Any:
        image = open_image(images[index][image_column], f"{split} image {index}")
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        return image

    return image_of


def corrupt(
    rows: Dataset, columns: Sequence[Any], args: ReportArguments
) -> tuple[np.ndarray | None, dict[tuple[str, int], Dataset]]:
    """
    Corrupt some test examples. The random draws depend only on the seed, the example and the level.

    Returns:
        `tuple`: The indices of the examples, and the corrupted rows by corruption and level.
    """
    count = min(args.corruption_samples, len(rows))
    if count == 0:
        return None, {}
    chosen = np.sort(np.random.default_rng(args.bootstrap_seed).permutation(len(rows))[:count])
    some = rows.select(chosen)
    is_text = isinstance(columns[0], list)
    names = columns[0] if is_text else [columns[0]]
    kinds: dict[str, Callable] = TEXT_CORRUPTIONS if is_text else IMAGE_CORRUPTIONS
    if not is_text:
        some = undecoded(some, names[0])

    def change(row: dict[str, Any], index: int, kind: str, level: int) -> dict[str, Any]:
        rng = np.random.default_rng((args.bootstrap_seed, index, level))
        values = [row[name] if is_text else open_image(row[name], f"{args.split} image {index}") for name in names]
        return {name: kinds[kind](value, level, rng) for name, value in zip(names, values, strict=True)}

    features = some.features if is_text else datasets.Features({**some.features, names[0]: datasets.Image()})
    return chosen, {
        (kind, level): some.map(
            change, with_indices=True, fn_kwargs={"kind": kind, "level": level}, features=features, keep_in_memory=True
        )
        for kind in kinds
        for level in LEVELS
    }


def shown_examples(rows: Dataset, columns: Sequence[Any]) -> list[str]:
    """The label of each example in the report: its text, or the index of an image."""
    names = columns[0]
    if isinstance(names, (list, tuple)):
        return [" | ".join(str(row[name]) for name in names) for row in rows.select_columns(list(names))]
    return [f"image {index}" for index in range(len(rows))]


def measure_sharpness(argv: list[str], folder: Path) -> dict[str, Any]:
    """Run `hf-sam sharpness`, which also writes its own report to a subfolder, and return its record."""
    words = without(argv, *OWN, "split", "batch_size", "bootstrap_seed", *_fields(SurvivalConfig))
    return sharpness.main([*words, "--output_dir", str(folder / "sharpness")])


def measure_survival(argv: list[str], folder: Path) -> Section:
    """Run `hf-sam survival`, which also writes its own report to a subfolder, and return its section."""
    from . import survival  # imports this module

    words = without(argv, *OWN, "num_examples", *_fields(SharpnessConfig))
    return survival_section(survival.main([*words, "--output_dir", str(folder / "survival")]))


OWN = ("output_dir", "corruption_samples", "sharpness", "survival")


def _fields(kind: type) -> tuple[str, ...]:
    return tuple(entry.name for entry in dataclasses.fields(kind))


def without(argv: Sequence[str], *names: str) -> list[str]:
    """The command line without these options and their values."""
    words, skip = [], False
    for word in argv:
        if skip and not word.startswith("--"):
            continue
        name, equals, _ = word.removeprefix("--").partition("=")
        is_left_out = word.startswith("--") and name in names
        skip = is_left_out and not equals
        if not is_left_out:
            words.append(word)
    return words
