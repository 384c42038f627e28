"""Measure what a step of each SAM method costs on your model and batch, relative to the stock Trainer in the same run.

    hf-sam benchmark digits
    hf-sam benchmark --task image-classification --dataset digits --batch_sizes 4 16 --methods sam asam subset late
    hf-sam benchmark --task text-classification --synthetic true --sizes 2M 22M 135M --methods sam

All variants take turns in one process, a few steps each, so that fluctuations of the machine affect all of them alike.
Writes `benchmark.json`, `benchmark.csv`, `benchmark.md` and plots to `--output_dir`.
"""

# ruff: noqa: RUF009 - `option` returns a dataclass field

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers
from tqdm.auto import tqdm
from transformers import TrainingArguments, set_seed
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from hf_sam import SAMConfig
from hf_sam.benchmark import (
    STOCK,
    VARIANTS,
    SteppedSAMTrainer,
    SteppedTrainer,
    Variant,
    measure,
    stepped_trainer,
)
from hf_sam.methods.users import load_parts

from ..experiments.json_files import plain, write_json
from ..experiments.provenance import describe_environment
from ..experiments.records import find_records
from ..reporting.benchmark import (
    SETTING,
    draw_frontier,
    draw_ratios,
    draw_sweep,
    gains,
    readable,
    row_of,
    write_benchmark_report,
)
from ..suggestions import did_you_mean
from .benchmark_inputs import SIZES, TASKS, Inputs, MadeUpArguments, Task, made_up_inputs, of_size, real_inputs
from .command_line.arguments import parse_arguments, read_config, split_command_line
from .command_line.errors import UserError, as_user_error
from .command_line.help import command_words, wants_help
from .command_line.options import DataArguments, ModelArguments, option
from .tables import markdown

FORMAT, VERSION = "hf_sam.benchmark", 1


@dataclass
class BenchmarkArguments:
    """The variants to measure, their sizes, and the number of steps."""

    task: str | None = option(None, f"{', '.join(TASKS)}.")
    methods: list[str] | None = option(None, f"Variants: {', '.join(VARIANTS)}, or JSON objects of SAMConfig.")
    synthetic: bool = option(False, "Synthetic data in the model's input shape instead of a data set.")
    sizes: list[str] | None = option(None, f"Models from scratch of these sizes: {', '.join(SIZES)}.")
    batch_sizes: list[int] | None = option(None, "Examples per device; default: per_device_train_batch_size.")
    accumulations: list[int] | None = option(None, "Micro-batches per step; default: gradient_accumulation_steps.")
    steps: int = option(40, "Timed optimizer steps per variant.")
    warmup: int = option(5, "Untimed optimizer steps before these.")
    block: int = option(5, "Optimizer steps per turn.")
    variants_at_once: int = option(6, "Variants in memory at the same time, including the stock Trainer.")
    records: str | None = option(None, "Folder of a comparison; plots its gains against the cost measured here.")
    control: str | None = option(None, "The arm of these records to compare with; default: detected.")

    def __post_init__(self):
        for name, least in (("steps", 1), ("warmup", 1), ("block", 1), ("variants_at_once", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}.")
        for name in ("batch_sizes", "accumulations"):
            if any(value < 1 for value in getattr(self, name) or []):
                raise ValueError(f"{name}={getattr(self, name)}: each must be at least 1.")
        for size in self.sizes or []:
            if size not in SIZES:
                raise ValueError(f"sizes: {size!r} is unknown. Allowed: {', '.join(SIZES)}.")

    @property
    def variants(self) -> list[Variant]:
        """
        Return the named variants, by default all; the stock Trainer always comes first.

        Raises:
            UserError: If a name is unknown, or `SAMConfig` rejects a configuration.
        """
        named = [variant_of(text) for text in self.methods or VARIANTS]
        return list({variant.name: variant for variant in [STOCK, *named]}.values())


@dataclass(frozen=True)
class Setting:
    """One point of a sweep."""

    size: str | None
    batch_size: int
    accumulation: int


def main(argv: Sequence[str] | None = None) -> pd.DataFrame:
    argv = list(sys.argv[1:] if argv is None else argv)
    task, is_synthetic, words = glance(argv)
    task_arguments = MadeUpArguments if is_synthetic else task.arguments
    model_args, data_args, task_args, bench, args = parse_arguments(
        [ModelArguments, DataArguments, task_arguments, BenchmarkArguments, TrainingArguments], words
    )
    if hasattr(task_args, "trainer"):
        task_args.trainer = "plain"  # TRL's trainer does extra work
    variants, records = bench.variants, records_of(bench)
    check(model_args, data_args, getattr(task_args, "glue_task", None), bench)
    prepare(args)

    frames, described = [], []
    for setting in settings_of(bench, args):
        inputs = inputs_of(setting, task, model_args, data_args, task_args, bench, args)
        examples = setting.batch_size * setting.accumulation * args.world_size
        parameters = inputs.model.num_parameters()
        columns = dict(
            zip(SETTING, (parameters, setting.batch_size, setting.accumulation, args.world_size), strict=True)
        )
        with (
            tqdm(
                total=expected_steps(bench, len(variants)),
                unit=" steps",
                disable=args.disable_tqdm or args.process_index > 0,
                desc=f"{parameters / 1e6:.1f} M parameters, {setting.batch_size} x {setting.accumulation}",
            ) as bar,
            as_user_error(ValueError),
        ):
            measurements = measure(
                variants,
                lambda variant, steps, inputs=inputs, setting=setting: build(
                    variant, steps, inputs, setting, args, task
                ),
                steps=bench.steps,
                warmup=bench.warmup,
                block=bench.block,
                at_once=bench.variants_at_once,
                seed=args.seed,
                progress=lambda name, steps, bar=bar: bar.update(steps),
            )
        frames.append(pd.DataFrame([columns | row_of(entry, examples, args.seed) for entry in measurements]))
        described.append(
            columns
            | {
                "model": type(inputs.model).__name__,
                "steps": {entry.variant.name: entry.seconds for entry in measurements},
                "sam": {c.name: c.sam.to_dict() if c.sam else None for c in variants},
            }
        )
    rows = pd.concat(frames, ignore_index=True)
    if args.process_index == 0:
        arguments = {"model": model_args, "data": data_args, "task": task_args, "benchmark": bench}
        document = {
            "format": FORMAT,
            "version": VERSION,
            "command": command(argv),
            "environment": describe_environment(),
            "arguments": {name: vars(value) for name, value in arguments.items()},
            "training_arguments": args.to_dict(),
            "rows": rows.to_dict("records"),
            "settings": described,
        }
        folder = Path(args.output_dir)
        write(document, rows, folder)
        gained = write_gains(records, rows, variants, bench.control, folder) if records else None
        print(f"Report: {write_benchmark_report(plain(document), rows, folder, provenance(document), gained)}")
    return rows


# --- command line ------------------------------------------------------------------------------------------------------


def glance(argv: Sequence[str]) -> tuple[Task, bool, list[str]]:
    """
    Return the task and whether the data are synthetic, which determine the other arguments, and the command line with
    defaults filled in.

    Raises:
        UserError: If no task is given, or it is unknown.
    """
    files, options = split_command_line(argv)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("task", "model_name_or_path", "model_type"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--synthetic", nargs="?", const="true")
    given = {name: value for file in files for name, value in read_config(Path(file)).items()}
    given |= {name: value for name, value in vars(parser.parse_known_args(options)[0]).items() if value is not None}
    name = given.get("task")
    if wants_help(options):
        name = name or "image-classification"
    if name not in TASKS:
        raise UserError(f"task={name} is unknown. Give --task: {', '.join(TASKS)}.{did_you_mean(str(name), TASKS)}")
    from_scratch = not given.get("model_name_or_path") and not given.get("model_type")
    is_synthetic = str(given.get("synthetic")).lower() in ("true", "t", "yes", "y", "1")
    return TASKS[name], is_synthetic, [*argv, *(["--model_type", TASKS[name].model_type] if from_scratch else [])]


def variant_of(text: str) -> Variant:
    """Return a row of `VARIANTS`, or one made from a JSON object such as `{"method": "subset", "interval": 10}`."""
    if text in VARIANTS:
        return VARIANTS[text]
    if not text.lstrip().startswith("{"):
        raise UserError(f"methods: {text!r} is unknown.{did_you_mean(text, VARIANTS)} Allowed: {', '.join(VARIANTS)}.")
    with as_user_error(ValueError, TypeError, prefix="methods: "):
        values = json.loads(text)
        if isinstance(values.get("ascent") or values.get("descent"), str):  # custom classes
            values |= load_parts(values.get("ascent"), values.get("descent"), values.get("options"))
        return Variant(", ".join(f"{name} {value}" for name, value in values.items()), SAMConfig.from_dict(values))


def records_of(bench: BenchmarkArguments) -> list:
    """Read the records of the comparison, if a folder is given, before anything is timed."""
    if bench.records is None:
        return []
    found, _ = find_records(bench.records)
    if not found:
        raise UserError(f"records={bench.records} contains no run_record.json; give the output_dir of a comparison.")
    return found


def check(model_args: ModelArguments, data_args: DataArguments, glue: str | None, bench: BenchmarkArguments) -> None:
    """
    Check combinations of arguments.

    Raises:
        UserError: If arguments are incompatible.
    """
    if not bench.synthetic and data_args.dataset is None and not glue:
        raise UserError("Give --dataset, or --synthetic true.")
    if bench.synthetic and data_args.dataset is not None:
        raise UserError("Give --dataset or --synthetic true, not both.")
    if data_args.streaming:
        raise UserError("A benchmark reads the same examples for every variant: leave streaming off.")
    if bench.sizes and model_args.model_type is None:
        raise UserError("sizes is for models from scratch: leave out model_name_or_path or sizes.")


def prepare(args: TrainingArguments) -> None:
    """Turn off everything but training: logging, evaluation, checkpoints, incomplete accumulation windows."""
    args.logging_strategy = args.eval_strategy = IntervalStrategy.NO
    args.save_strategy = SaveStrategy.NO
    args.report_to, args.load_best_model_at_end, args.push_to_hub = [], False, False
    args.dataloader_drop_last = True
    args.dataloader_pin_memory = args.dataloader_pin_memory and torch.accelerator.is_available()
    if args.output_dir == "trainer_output":
        args.output_dir = "outputs/benchmark"
    transformers.utils.logging.disable_progress_bar()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, used for memory, logs every start and stop


def settings_of(bench: BenchmarkArguments, args: TrainingArguments) -> Iterator[Setting]:
    """Yield every combination of size, batch size and accumulation."""
    batch_sizes = bench.batch_sizes or [args.per_device_train_batch_size]
    accumulations = bench.accumulations or [args.gradient_accumulation_steps]
    return itertools.starmap(Setting, itertools.product(bench.sizes or [None], batch_sizes, accumulations))


def inputs_of(
    setting: Setting,
    task: Task,
    model_args: ModelArguments,
    data_args: DataArguments,
    task_args: Any,
    bench: BenchmarkArguments,
    args: TrainingArguments,
) -> Inputs:
    """
    Return the model and the data of one setting.

    Raises:
        UserError: If the training split is smaller than one step.
    """
    set_seed(args.seed)
    model_args = of_size(task, model_args, setting.size)
    examples = setting.batch_size * setting.accumulation * args.world_size
    if bench.synthetic:
        return made_up_inputs(task, model_args, copy.copy(task_args), examples * (bench.steps + bench.warmup))
    inputs = real_inputs(task, model_args, copy.copy(data_args), copy.copy(task_args), args)
    if len(inputs.dataset) < examples:
        raise UserError(
            f"One step takes {examples} examples, but the training split has {len(inputs.dataset)}: lower batch_sizes or "
            "accumulations."
        )
    return inputs


def build(
    variant: Variant, steps: int, inputs: Inputs, setting: Setting, args: TrainingArguments, task: Task
) -> SteppedTrainer | SteppedSAMTrainer:
    """Make the trainer of a variant, with a copy of the model."""
    args = copy.deepcopy(args)
    args.per_device_train_batch_size, args.gradient_accumulation_steps = setting.batch_size, setting.accumulation
    args.max_steps = steps
    args.disable_tqdm = True
    set_seed(args.seed)
    common = {
        "model": copy.deepcopy(inputs.model),
        "args": args,
        "train_dataset": inputs.dataset,
        "data_collator": inputs.collator,
    }
    trainer = stepped_trainer(variant, **common)
    if task.is_classification:
        trainer.model_accepts_loss_kwargs = False  # as in the training recipes, whose loss is a mean over examples
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def expected_steps(bench: BenchmarkArguments, variants: int) -> int:
    """Total of the progress bar: one counting step plus all timed ones, with the stock Trainer in each group."""
    groups = max(1, -(-(variants - 1) // (bench.variants_at_once - 1)))
    return variants + (variants - 1 + groups) * (bench.steps + bench.warmup)


# --- results -----------------------------------------------------------------------------------------------------------


def write(document: dict[str, Any], rows: pd.DataFrame, folder: Path) -> None:
    """Write all files, and print the tables."""
    write_json(folder / "benchmark.json", plain(document))
    rows.to_csv(folder / "benchmark.csv", index=False)
    text = []
    for number, (setting, group) in enumerate(rows.groupby(SETTING, sort=False)):
        parameters, batch_size, accumulation, processes = setting
        model = document["settings"][number]["model"]
        title = f"{model}, {parameters / 1e6:.1f} M parameters, batch {batch_size}, accumulation {accumulation}"
        title += f", {processes} processes" if processes > 1 else ""
        text.append(f"### {title}\n\n{markdown(readable(group))}\n")
        draw_ratios(group).savefig(folder / f"ratios{f'_{number}' if number else ''}.png", dpi=150)
    sweep = draw_sweep(rows)
    if sweep is not None:
        sweep.savefig(folder / "sweep.png", dpi=150)
    page = "\n".join([*text, provenance(document)])
    (folder / "benchmark.md").write_text(page, encoding="utf-8")
    print(f"\n{page}\nWritten to {folder}")


def provenance(document: dict[str, Any]) -> str:
    """Return the sentence under the tables: machine, versions, command."""
    packages, hardware = (document["environment"][key] for key in ("packages", "hardware"))
    machine = ", ".join(hardware["accelerators"]) or f"{hardware['processors']} processors ({hardware['machine']})"
    versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "transformers", "hf-sam") if name in packages)
    bench = document["arguments"]["benchmark"]
    return (
        f"One run on {machine}, {hardware['threads']} threads per process; {versions}. Medians of {bench['steps']} optimizer "
        f"steps of each variant after {bench['warmup']} dropped ones, in turns of {bench['block']}; ratios are to the "
        f"stock Trainer's steps in the same turns, with bootstrap intervals. Command: `{document['command']}`\n"
    )


def command(argv: Sequence[str]) -> str:
    """Return the command that repeats the benchmark."""
    processes = describe_environment()["hardware"]["processes"]
    words = command_words("benchmark")
    if processes > 1 and words[0] == "python":
        words = ["accelerate", "launch", "--num_processes", str(processes), *words[1:]]
    elif processes > 1:
        words += ["--num_processes", str(processes)]
    return shlex.join([*words, *argv])


def write_gains(
    records: list, rows: pd.DataFrame, variants: Sequence[Variant], control: str | None, folder: Path
) -> pd.DataFrame:
    """Plot gain against cost at the first setting; return what was plotted."""
    first = rows[(rows[SETTING] == rows[SETTING].iloc[0]).all(axis=1)]
    with as_user_error(ValueError, prefix="records: "):
        frame = gains(records, first, variants, control)
    if frame.empty:
        print("No arm of the records has a configuration that was timed here, so gain against cost is not plotted.")
        return frame
    frame.to_csv(folder / "gains.csv", index=False)
    draw_frontier(frame).savefig(folder / "gains.png", dpi=150)
    left = sorted({record.arm for record in records} - set(frame.arm) - set(frame.control))
    print(f"Gain against cost: {folder / 'gains.png'}." + (f" Not timed here: {', '.join(left)}." if left else ""))
    return frame
