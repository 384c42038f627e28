"""Measure the sharpness of the loss around fine-tuned checkpoints.

    hf-sam sharpness --checkpoints adamw=outputs/digits_adamw sam=outputs/digits_sam

By default, the data are those in the first checkpoint's run record; `--dataset` and the other data arguments of the
training recipes override them. Writes `sharpness.json`, `report.html`, `report.md`, figures and their numbers to
`--output_dir`. With `--num_processes N`, the processes split the examples, and the results are the same.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from hf_sam.sharpness import SharpnessConfig, Subset, SubsetLoss, line_between, measure, scalars

from ..experiments.json_files import plain, write_json
from ..experiments.provenance import describe_environment, peak_memory
from ..experiments.records import RECORD_NAME, read_record
from ..reporting.sharpness import FORMAT, VERSION, write_sharpness_report
from .checkpoints import TASKS, Task, find_task, fixed_rows, load_checkpoint, named_checkpoints, recorded_data
from .command_line.arguments import parse_arguments
from .command_line.errors import UserError, as_user_error
from .command_line.help import command_again
from .command_line.options import DataArguments, ModelArguments, option

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


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    argv = list(sys.argv[1:] if argv is None else argv)
    task = TASKS[find_task(argv)]
    args, data_args, task_args, config = parse_arguments(argument_types(task), [*argv, *recorded_data(argv)])
    state = PartialState(cpu=not torch.accelerator.is_available())
    named = named_checkpoints(args.checkpoints)
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
