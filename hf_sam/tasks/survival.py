"""Evaluate fine-tuned checkpoints after quantization, pruning, weight noise and merging.

    hf-sam survival adamw=outputs/digits_adamw sam=outputs/digits_sam --output_dir outputs/survival
    hf-sam survival outputs/seed_0 --merge_with outputs/seed_1 --merge_start some/hub-id

Checkpoints are local folders, hub ids or PEFT adapters, optionally named as name=checkpoint. By default, the data are
those in the first checkpoint's run record; `--dataset` and the other data arguments override them. Nothing is trained.
Writes `survival.json`, `report.html`, `report.md`, figures and their numbers. `hf-sam report --survival true` includes
the same results as a section.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
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

from ..evaluation.merging import mergeable_state
from ..evaluation.predictions import LanguagePredictions
from ..evaluation.survival import Outcome, SurvivalConfig, evaluate_treatments
from ..evaluation.weights import weight_matrices
from ..experiments.json_files import plain, write_json
from ..experiments.provenance import describe_data, describe_environment
from ..experiments.records import RECORD_NAME, read_record
from ..reporting.document import Document, write_document
from ..reporting.survival import FORMAT, VERSION, compare_survival, survival_rows, survival_section
from . import report
from .checkpoints import TASKS, Task, find_task, fixed_rows, load_checkpoint, named_checkpoints, recorded_data
from .command_line.arguments import parse_arguments
from .command_line.errors import UserError, as_user_error
from .command_line.options import DataArguments, ModelArguments, option
from .models import adapter_base, device


@dataclass
class SurvivalArguments:
    """The checkpoints, and where the results go."""

    checkpoints: list[str] = field(metadata={"help": "Local folders or hub ids, optionally as name=checkpoint."})
    task: str | None = option(
        None, "image-classification, text-classification or causal-lm; by default that of the first checkpoint."
    )
    output_dir: str = option("outputs/survival", "Folder for survival.json, the report and its figures.")
    split: str = option("test", "Split to evaluate on.")
    batch_size: int = option(32, "Examples per batch.")
    bootstrap_seed: int = option(0, "Seed of the intervals, and of the sample of examples if not all are used.")
    update_records: bool = option(True, "Also write the scores to the run_record.json of each checkpoint that has one.")
    disable_tqdm: bool = option(False, "Hide progress bars.")
    trust_remote_code: bool = option(
        False, "Run Python code that comes with the model. Use only with sources you trust."
    )

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1.")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    argv = report.with_option_name(list(sys.argv[1:] if argv is None else argv))
    if not argv:
        print(__doc__)
        raise UserError("Give at least one checkpoint: a folder or a hub id.")
    task = TASKS[find_task(argv)]
    args, data_args, task_args, config = parse_arguments(
        [SurvivalArguments, DataArguments, task.arguments, SurvivalConfig], [*argv, *recorded_data(argv)]
    )
    if args.disable_tqdm:
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    splits, *columns = task.read_data(data_args, task_args)
    check_data(splits, columns, args.split)
    rows = fixed_rows(splits[args.split], config.max_examples or len(splits[args.split]), args.bootstrap_seed)
    merged = named_checkpoints(config.merge_with)
    others = {name: body_of(task, path, args) for name, path in merged.items()}
    start = body_of(task, config.merge_start, args) if config.merge_start else None

    found: dict[str, list[Outcome]] = {}
    checkpoints: dict[str, dict[str, Any]] = {}
    for name, path in named_checkpoints(args.checkpoints).items():
        model_args = ModelArguments(model_name_or_path=path, trust_remote_code=args.trust_remote_code)
        model, processor_args = load_checkpoint(task.auto_class, model_args, columns, "merged")
        model.to(device()).eval()
        examples, collator = task.prepare({args.split: rows}, columns, processor_args, task_args, model)
        loader = DataLoader(examples[args.split], args.batch_size, collate_fn=collator)

        def evaluate(altered, loader=loader):
            return report.predictions_of(altered, loader)

        with as_user_error(ValueError, prefix=f"{path}: "):
            treated = evaluate_treatments(model, evaluate, config, others, start)
            found[name] = list(tqdm(treated, desc=name, unit=" evaluations", disable=args.disable_tqdm))
        matrices = weight_matrices(model, config.alter_embeddings, config.alter_head)
        checkpoints[name] = {
            "path": path,
            "rows": survival_rows(found[name]),
            "altered": {
                "tensors": len(matrices),
                "parameters": sum(matrix.weight.numel() for matrix in matrices.values()),
                "of": sum(parameter.numel() for parameter in model.parameters()),
            },
        }
    first = next(iter(found.values()))[0].result
    record = {
        "format": FORMAT,
        "version": VERSION,
        "metric": "loss" if isinstance(first, LanguagePredictions) else "accuracy",
        "subset": {"dataset": data_args.dataset, "split": args.split, "examples": len(rows), **describe_data(rows)},
        "config": dataclasses.asdict(config),
        "checkpoints": checkpoints,
        "scores": compare_survival(found, np.random.default_rng(args.bootstrap_seed)),
        "environment": describe_environment(),
    }
    save(plain(record), Path(args.output_dir), args.update_records)
    return plain(record)


def check_data(splits: Any, columns: Sequence[Any], split: str) -> None:
    """
    Check that the data can be used.

    Raises:
        UserError: The split does not exist or is a stream, or examples do not have exactly one class.
    """
    if split not in splits:
        raise UserError(f"split={split} does not exist. Allowed: {', '.join(splits)}.")
    if not isinstance(splits[split], Dataset):
        raise UserError("`hf-sam survival` needs a fixed set of examples. Switch streaming off.")
    report.check_one_class(columns, "survival")


def body_of(task: Task, path: str, args: SurvivalArguments) -> dict[str, torch.Tensor]:
    """The mergeable tensors of a checkpoint, with any head; a PEFT adapter is first merged into its base."""
    with as_user_error(OSError, ValueError, prefix=f"{path} cannot be loaded as {task.auto_class.__name__}: "):
        base = adapter_base(path)
        model = task.auto_class.from_pretrained(base or path, dtype="float32", trust_remote_code=args.trust_remote_code)
        if base is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, path).merge_and_unload()
    return {name: value.clone() for name, value in mergeable_state(model).items()}


def save(record: dict[str, Any], folder: Path, update_records: bool) -> None:
    """Write `survival.json`, the report, and the scores in the checkpoints' run records."""
    write_json(folder / "survival.json", record)
    names = ", ".join(record["checkpoints"])
    lead = (
        f"{names} on {record['subset']['examples']:,} examples of {record['subset']['dataset']}. Intervals are at 95 %."
    )
    path = write_document(Document("What survives", lead, [survival_section(record)], numbers=record), folder)
    print(f"Wrote {folder / 'survival.json'} and {path}")
    for entry in record["checkpoints"].values():
        path = Path(entry["path"]) / RECORD_NAME
        if update_records and path.is_file():
            with as_user_error(ValueError):
                run_record = read_record(path)
            run_record.survival = entry["rows"]
            run_record.write(path)
            print(f"Updated {path}")
