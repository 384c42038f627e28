"""Fine-tune checkpoints on a second task over a grid of learning rates, and measure forgetting of the first.

    hf-sam forgetting adamw=outputs/a sam=outputs/b --recipe text_classification \\
        --config configs/text_classification/minilm.yaml --settings '{"dataset": "second.csv", "max_steps": 200}' \\
        --learning_rates 1e-5 3e-5 1e-4 --seeds 0 1 2
    hf-sam forgetting forgetting.yaml          # the same options, in a file

A name given more than once, as in `sam=outputs/b0 sam=outputs/b1`, has several checkpoints. These are replicates,
paired in order with those of the other names; so are the folders of a pattern, `'sam=outputs/b*'`. The data of the
first task come from the run record of the first checkpoint, or from `--first '{"dataset": ...}'`. The main result is
the test loss of the first task at matched training loss of the second. Running the same command again completes
missing runs. --workers 4 makes four runs at a time on this machine; --executor ray or slurm hands them to a cluster
(docs/clusters.md).
"""

# ruff: noqa: RUF009 - `option` returns a dataclass field

from __future__ import annotations

import glob
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import transformers

from ..experiments.driver import drive
from ..experiments.execution import LOG_NAME
from ..experiments.executors import Choice, choose
from ..experiments.json_files import plain, read_json, write_json
from ..experiments.plan import slug
from ..experiments.records import RECORD_NAME, RunRecord, read_record
from ..experiments.standing import reason
from ..experiments.workshop import retry_failed
from ..reporting.document import write_document
from ..reporting.forgetting import make_forgetting_document
from ..reporting.results import natural
from ..suggestions import did_you_mean
from . import TRAINING, report
from .checkpoints import named_checkpoint
from .command_line.arguments import parse_arguments
from .command_line.config_files import split_command_line
from .command_line.errors import UserError, as_user_error
from .command_line.options import option
from .forgetting_first import FirstTask
from .forgetting_runs import EVALUATION, RESULT_NAME, SEEDS, ForgettingWorkshop, SecondRun, result_of, weights_in
from .studies import cancelled_or_shown, interruptible

GIVEN = ("model_name_or_path", "learning_rate", "seed", "output_dir")  # set here for each run


@dataclass
class ForgettingArguments:
    """The checkpoints, and the training on the second task."""

    checkpoints: list[str] = field(
        metadata={"help": "Folders, patterns or hub ids as name=checkpoint; repeated names are replicates."}
    )
    recipe: str = field(metadata={"help": f"Recipe of the second task: {', '.join(TRAINING)}."})
    learning_rates: list[float] = field(
        metadata={"help": "Grid of learning rates; each checkpoint is fine-tuned with each."}
    )
    config: str | None = option(None, "Configuration file of the second task, for its recipe.")
    settings: dict | str | None = option(None, "JSON object of recipe arguments that override the configuration.")
    seeds: list[int] = field(
        default_factory=lambda: [0], metadata={"help": "Seeds of the second training; each is a replicate."}
    )
    first: dict | str | None = option(
        None, "JSON object of the first task's data arguments; default: from the run record."
    )
    output_dir: str = option("outputs/forgetting", "Folder for runs and report.")
    target_loss: float | None = option(
        None, "Second-task training loss to compare at; default: the lowest reached by all."
    )
    max_examples: int = option(1000, "Maximum number of test examples of the first task; 0: all.")
    batch_size: int = option(32, "Examples per batch of the evaluation on the first task.")
    workers: int | None = option(None, "Number of simultaneous runs on this machine; default: 1.")
    executor: str | None = option(None, "Where to execute the runs: local, ray or slurm; default: local, this machine.")
    executor_options: list[str] = field(
        default_factory=list, metadata={"help": "KEY=VALUE options of the executor; see docs/clusters.md."}
    )
    status: bool = option(False, "Print the state of the runs and exit.")
    cancel: bool = option(False, "Cancel queued and running jobs and exit.")
    launcher: list[str] = field(
        default_factory=list, metadata={"help": "Command that starts each run, such as accelerate launch."}
    )
    keep_models: bool = option(False, "Keep the weights of every run.")
    trust_remote_code: bool = option(False, "Run Python code shipped with the model. Only for sources you trust.")

    def __post_init__(self):
        self.checkpoints = [named for text in self.checkpoints for named in _expanded(text)]
        if self.recipe not in TRAINING:
            raise ValueError(
                f"recipe={self.recipe} is not a training recipe.{did_you_mean(self.recipe, TRAINING, f' Allowed: {TRAINING}.')}"
            )
        for name in ("settings", "first"):
            value = getattr(self, name) or {}
            if isinstance(value, str):
                try:
                    value = json.loads(value)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{name}={value!r} is not valid JSON: {error}.") from None
            if not isinstance(value, dict):
                raise ValueError(f'{name}={value!r} must be a JSON object such as {{"max_steps": 200}}.')
            setattr(self, name, value)
        taken = [name for name in GIVEN if name in self.settings]
        if taken:
            raise ValueError(f"settings: {taken[0]} is set for each run; leave it out.")
        written = {f"{rate:g}" for rate in self.learning_rates if rate > 0}  # each names a folder
        if not 0 < len(self.learning_rates) == len(written):
            raise ValueError(f"learning_rates={self.learning_rates} must be distinct numbers above 0.")
        if len(set(self.seeds)) < len(self.seeds) or not all(0 <= seed < SEEDS for seed in self.seeds):
            raise ValueError(f"seeds={self.seeds} must be distinct whole numbers from 0 to {SEEDS - 1}.")
        folders: dict[str, str] = {}
        for name in self.starts:
            other = folders.setdefault(slug(name), name)
            if other != name:
                raise ValueError(f"checkpoints: {other} and {name} would share a folder. Rename one.")
        for name, least in (("workers", 1), ("batch_size", 1), ("max_examples", 0)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}.")

    @property
    def starts(self) -> dict[str, list[str]]:
        """Group the checkpoints by name, in order."""
        found: dict[str, list[str]] = {}
        for text in self.checkpoints:
            name, path = named_checkpoint(text)
            found.setdefault(name, []).append(path)
        return found


def _expanded(text: str) -> list[str]:
    """Return the folders that `name=pattern` matches, each with the name; `text` itself if it is not a pattern."""
    name, equals, pattern = text.partition("=") if "=" in text and not Path(text).exists() else ("", "", text)
    if glob.escape(pattern) == pattern or Path(pattern).exists():
        return [text]
    found = sorted((path for path in glob.glob(pattern) if Path(path).is_dir()), key=natural)
    if not found:
        raise ValueError(f"checkpoints: {pattern} matches no folder.")
    return [f"{name}{equals}{path}" for path in found]


def main(argv: Sequence[str] | None = None) -> Path | None:
    words = list(sys.argv[1:] if argv is None else argv)
    files, options = split_command_line(words)
    if not words:
        print(__doc__)
        raise UserError("Give checkpoints, --recipe and --learning_rates, or a YAML file with them.")
    (args,) = parse_arguments([ForgettingArguments], [*files, *report.with_option_name(options)])
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    workshop = ForgettingWorkshop(args)
    with as_user_error(ValueError):
        choice = choose({}, args.executor, args.workers, args.executor_options)
    if cancelled_or_shown(workshop, choice, args.cancel, args.status):
        return None
    first, folder, runs = FirstTask(args), workshop.plan.output_dir, workshop.runs
    before = first_scores_before(args, first, folder)
    failures = make_all(workshop, choice)
    done = [result for run in runs if (result := result_of(run, folder)) is not None]
    if not done:
        raise UserError(failures[0] if failures else "No run has finished.")
    facts = {
        "first task": f"{first.data_args.dataset}, {len(first.rows):,} test examples",
        "second task": f"{args.recipe} {args.config or ''} {json.dumps(args.settings)}",
        "learning rates": ", ".join(f"{rate:g}" for rate in args.learning_rates),
        "checkpoints": "; ".join(f"{name}: {', '.join(paths)}" for name, paths in args.starts.items()),
        "seeds of the second training": ", ".join(map(str, args.seeds)),
        "runs": f"{len(done)} of {len(runs)}",
    }
    with as_user_error(ValueError):
        document = make_forgetting_document(done, before, facts, list(args.starts), args.target_loss)
    written = write_document(document, folder / "report")
    print(f"Report: {written}")
    if failures:
        raise UserError(
            f"{len(failures)} of {len(runs)} runs failed; the same command tries them again. The first: {failures[0]}"
        )
    return written


# --- the first task ----------------------------------------------------------------------------------------------------


def first_scores_before(args: ForgettingArguments, first: FirstTask, folder: Path) -> dict[str, list[dict[str, float]]]:
    """Return the first-task scores of every checkpoint before the second training; computed once and cached."""
    path, settings = folder / "before.json", {name: getattr(args, name) for name in EVALUATION}
    cache = read_json(path)
    if cache is None or cache.get("settings") != settings:
        cache = {"settings": settings, "scores": {}}
    kept = cache["scores"]
    for paths in args.starts.values():
        for checkpoint in paths:
            if checkpoint not in kept:
                kept[checkpoint] = first.scores(checkpoint)
                write_json(path, plain(cache))
    return {name: [kept[checkpoint] for checkpoint in paths] for name, paths in args.starts.items()}


# --- the second ----------------------------------------------------------------------------------------------------------


def make_all(workshop: ForgettingWorkshop, choice: Choice) -> list[str]:
    """Make the missing runs; return a line for each that failed."""
    workshop.check_unchanged()
    retry_failed(workshop)

    def tell(run: SecondRun, what: str) -> None:
        name = f"{run.start}, learning rate {run.learning_rate:g}, seed {run.seed}"
        print(f"{what:>10}  {name}, {run.checkpoint}", flush=True)

    done = sum(map(workshop.has_ended, workshop.runs))
    print(f"{done} of {len(workshop.runs)} runs are finished.", flush=True)
    with interruptible(choice):
        drive(workshop, choice, tell)
    failed = [(run, record) for run in workshop.runs if (record := workshop.record(run)) and record.status == "failed"]
    return [f"{workshop.folder(run)}: {reason(record)} (see {LOG_NAME} there)" for run, record in failed]


def afterwards(folder: Path, job: Mapping[str, Any]) -> None:
    """
    Evaluate a finished run on the first task, in the process that made it; a run that cannot be evaluated has failed.

    Args:
        folder (`Path`): Of the run.
        job (`Mapping`): `arguments`, those of `ForgettingArguments`, and `run`, those of `SecondRun`.
    """
    if (folder / RESULT_NAME).exists():
        return
    args, run = ForgettingArguments(**job["arguments"]), SecondRun(**job["run"])
    record = read_record(folder / RECORD_NAME)
    try:
        scores = FirstTask(args).scores(run.checkpoint, folder)
    except Exception as error:
        record.fail(error)
        record.write()
        raise
    result = {
        "start": run.start,
        "checkpoint": run.checkpoint,
        "replicate": run.replicate,
        "seed": run.seed,
        "learning_rate": run.learning_rate,
        "second": {**record.metrics, "train_loss": train_loss(record)},
        "first": scores,
    }
    write_json(folder / RESULT_NAME, plain(result))
    if not args.keep_models:
        for file in weights_in(folder):
            file.unlink()


def train_loss(record: RunRecord) -> float:
    """Return the mean loss of the finished model on the training split, per example or per token."""
    if record.metrics.get("train_nll") is not None:
        return record.metrics["train_nll"]
    if record.metrics.get("train_perplexity") is not None:
        return float(np.log(record.metrics["train_perplexity"]))
    return record.metrics["train_loss"]
