"""Run records: one JSON file per run, with its configuration, data, environment, results and cost.

A training script writes a record in three lines. The status in the record is right whatever happens: `running`,
`interrupted`, `finished` or `failed`.

    with recording(Path(args.output_dir) / RECORD_NAME, trainer, recipe=settings, task="digits", arm="sam") as record:
        trainer.train()
        record.metrics = evaluate(trainer)          # {"accuracy": 0.93, "nll": ...} on the test split
        record.predictions = "predictions.parquet"  # optional: a file in the same folder, see `RunRecord`

Files are replaced atomically, so a readable record is complete. Secrets are masked: values under keys that name a
credential, and strings that look like a hub token.
"""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .costs import CostKeeper
from .json_files import plain, write_json
from .provenance import describe_data, describe_environment, describe_model, peak_memory
from .same_run import changed_arguments

FORMAT = "hf_sam.run_record"
VERSION = 1
RECORD_NAME = "run_record.json"
STATUSES = ("running", "interrupted", "finished", "failed", "external")
ENDED = ("finished", "failed")
OPEN = ("running", "interrupted")  # left behind by a run that was killed or stopped, and can be resumed


class RecordError(ValueError):
    """A file is not a readable run record; the message names the file, the reason and the fix."""


class RunFinishedError(Exception):
    """The run has finished with the same arguments before, so there is nothing to do."""


@dataclass
class RunRecord:
    """
    The record of one run.

    Args:
        task (`str`): The task; results are compared within a task.
        arm (`str`): The treatment: `"adamw"`, `"sam"`, ...
        condition (`str`, *optional*, defaults to `"clean"`): The condition of the training data, such as `"noise 0.4"`.
        budget (`str`, *optional*, defaults to `"steps"`):
            `"steps"` (equal optimizer steps for every arm) or `"passes"` (equal gradient evaluations).
        seed (`int`, *optional*): The seed; runs of different arms with the same seed are pairs.
        status (`str`, *optional*, defaults to `"running"`):
            `"running"` (also after the run was killed), `"interrupted"` (by Ctrl-C), `"finished"`, `"failed"`, or
            `"external"` for a run that hf_sam did not record.
        config (`dict`, *optional*):
            `"recipe"` (the script's arguments), `"training_arguments"` and `"sam"` (`None`: no SAM).
        model, data, environment (`dict`, *optional*):
            Names, sizes and fingerprints, see `hf_sam.experiments.provenance`.
        metrics (`dict[str, float]`, *optional*): Metrics on the test split at the end of training.
        steps (`int`, *optional*): Number of optimizer steps.
        passes (`float`, *optional*): Gradient evaluations of the whole effective batch; one per step in the stock
            Trainer.
        seconds, samples_per_second (`float`, *optional*): Duration and throughput of the training loop alone.
        peak_memory (`int`, *optional*): Peak memory in bytes, of the accelerator if there is one, else of the process.
        resumed_from (`int`, *optional*):
            The step at which the run last resumed after an interruption.
        segments (`list[dict]`, *optional*):
            The segments between interruptions, each with `"begin"`, `"end"`, `"seconds"` and `"passes"`. If the first
            one begins at step 0, `seconds` and `passes` are their sums; if not, see `has_whole_costs`.
        curves (`list[dict]`, *optional*): The Trainer's `log_history`, one dict per log call, each with a `"step"`.
        sharpness (`dict[str, float]`, *optional*): Sharpness measures of the trained weights, if measured.
        survival (`list[dict]`, *optional*):
            Scores after quantization, pruning, noise or merging, if measured: `"kind"`, `"level"`, `"draw"` and
            metrics.
        predictions (`str`, *optional*):
            Name of a parquet file in the record's folder with one row per test example: `label` (`int`) and
            `probabilities` (list of `float`, one per class).
        error (`dict`, *optional*): `"type"`, `"message"` and `"traceback"` of the error that ended a failed run.
        started, ended (`str`, *optional*): Times in ISO 8601, UTC.
        path (`Path`, *optional*): Path of the record; not part of the file.
    """

    task: str
    arm: str
    condition: str = "clean"
    budget: str = "steps"
    seed: int | None = None
    status: str = "running"
    config: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float | None] = field(default_factory=dict)
    steps: int | None = None
    passes: float | None = None
    seconds: float | None = None
    samples_per_second: float | None = None
    peak_memory: int | None = None
    resumed_from: int | None = None
    segments: list[dict[str, Any]] = field(default_factory=list)
    curves: list[dict[str, Any]] = field(default_factory=list)
    sharpness: dict[str, float | None] = field(default_factory=dict)
    survival: list[dict[str, Any]] = field(default_factory=list)
    predictions: str | None = None
    error: dict[str, str] | None = None
    started: str | None = None
    ended: str | None = None
    path: Path | None = field(default=None, compare=False)

    def write(self, path: str | os.PathLike | None = None) -> Path:
        """Write the record atomically to `path` (default: `self.path`) and return the path."""
        path = Path(path or self.path)
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        del content["path"]
        write_json(path, plain(content))
        self.path = path
        return path

    def fail(self, error: BaseException) -> None:
        """Mark the run as failed with `error`."""
        self.status = "failed"
        self.error = {
            "type": type(error).__name__,
            "message": str(error),
            "traceback": "".join(traceback.format_exception(error)),
        }
        self.ended = _now()

    @property
    def has_whole_costs(self) -> bool:
        """Whether seconds, throughput and passes cover all steps, not just those after an interruption."""
        return self.resumed_from is None or (bool(self.segments) and self.segments[0].get("begin") == 0)

    def take_costs(self, trainer, keeper: CostKeeper) -> None:
        """Read steps, passes, time, memory and curves from a `Trainer` whose `train()` has returned or raised."""
        self.steps = trainer.state.global_step
        self.curves = trainer.state.log_history
        self.peak_memory = peak_memory()
        self.segments = keeper.segments()
        if not self.segments:  # training never started
            return
        self.resumed_from = keeper.begin or None
        present, before = self.segments[-1], sum(entry["seconds"] for entry in keeper.earlier)
        for entry in reversed(self.curves):
            if "train_runtime" in entry:  # training completed
                present["seconds"] = max(entry["train_runtime"] - (before if keeper.is_whole else 0.0), 0.0)
                present["passes"] = (present["end"] - present["begin"]) * entry.get("sam_passes", 1.0)
                self.samples_per_second = entry.get("train_samples_per_second")
                break
        self.seconds = sum(entry["seconds"] for entry in self.segments)
        self.passes = sum(entry["passes"] for entry in self.segments)


@contextmanager
def recording(path: str | os.PathLike, trainer, *, recipe: Mapping[str, Any] | None = None, **names):
    """
    Keep the record of one run while the `with` block trains and evaluates it.

    - Before the block starts, the record is written as `running`, with the fingerprint of the untrained model.
    - After the block, it is written as `finished`, as `failed` with the error, or as `interrupted` by Ctrl-C;
      exceptions propagate.
    - The record of a killed run stays `running`, so a comparison knows to resume it.
    - All processes enter; the first one writes.
    - A run resumed from a checkpoint includes the seconds, passes and losses of the steps before it.

    Args:
        path (`str` or `os.PathLike`): The file to write, by convention `<output_dir>/run_record.json`.
        trainer (`transformers.Trainer`): The trainer, before training.
        recipe (`Mapping`, *optional*): All arguments of the script, so that the run can be repeated.
        **names: `task`, `arm`, `condition`, `budget` and other fields of [`RunRecord`].

    Yields:
        `RunRecord`: Set its `metrics`, and `predictions` and `sharpness` if there are any.

    Raises:
        RunFinishedError: The folder has a finished record of the same run.
        ValueError: The folder has a finished record with different arguments, or the checkpoint to resume from was made
            with different arguments. The message names each with its old and new value.
    """
    names.setdefault("seed", trainer.args.seed)
    record = RunRecord(**names, path=Path(path), started=_now())
    sam_config = getattr(trainer, "sam_config", None)
    record.config = {
        "recipe": dict(recipe or {}),
        "training_arguments": trainer.args.to_dict(),
        "sam": sam_config.to_dict() if sam_config is not None else None,
    }
    record.model = describe_model(trainer.model)
    record.data = record.data or {
        split: describe_data(dataset)
        for split, dataset in (("train", trainer.train_dataset), ("test", trainer.eval_dataset))
        if dataset is not None
    }
    record.environment = describe_environment()
    _check_earlier(record, trainer.args.resume_from_checkpoint)
    keeper = CostKeeper(trainer)
    trainer.add_callback(keeper)
    is_writer = trainer.is_world_process_zero()
    if is_writer:
        record.write()
    try:
        yield record
    except Exception as error:
        record.take_costs(trainer, keeper)
        record.fail(error)
        raise
    except KeyboardInterrupt:
        record.take_costs(trainer, keeper)
        record.status, record.ended = "interrupted", _now()
        raise
    else:
        record.take_costs(trainer, keeper)
        record.status, record.ended = "finished", _now()
    finally:
        if is_writer and record.status != "running":
            record.write()


def _check_earlier(record: RunRecord, checkpoint: str | None) -> None:
    """Refuse to overwrite a finished record, or to resume from a checkpoint made with different arguments."""
    earlier = _readable(record.path)
    if earlier is not None and earlier.status == "finished":
        changed = changed_arguments(earlier, record)
        if not changed:
            raise RunFinishedError(f"{record.path}: this run has finished after {earlier.steps} steps. Nothing to do.")
        raise ValueError(
            f"{record.path} is the record of a finished run with different arguments: {'; '.join(changed)}. Choose another "
            f"output_dir, or start over with --overwrite_output_dir true."
        )
    if checkpoint:
        earlier = _readable(Path(checkpoint).parent / record.path.name)
        changed = changed_arguments(earlier, record) if earlier is not None else []
        if changed:
            raise ValueError(
                f"{checkpoint} was made with different arguments: {'; '.join(changed)}. Resume with the old values, or "
                f"start over with the new ones: --overwrite_output_dir true, or another output_dir."
            )


def _readable(path: Path) -> RunRecord | None:
    try:
        return read_record(path)
    except RecordError:
        return None


def read_record(path: str | os.PathLike) -> RunRecord:
    """
    Read one record.

    Raises:
        RecordError: The file is missing, truncated, incomplete, not JSON, not a run record, or of another version.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecordError(f"{path}: cannot be read ({error.strerror}).") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RecordError(
            f"{path} is not valid JSON ({error}); it may be truncated. Delete it to run it again."
        ) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise RecordError(f"{path} is not a run record of hf_sam (its 'format' is not {FORMAT!r}).")
    version = content.get("version")
    if version != VERSION:
        is_newer = isinstance(version, int) and version > VERSION
        remedy = "Upgrade hf_sam to read it" if is_newer else "Run it again, or read it with the release that wrote it"
        raise RecordError(f"{path} has format version {version!r}; this hf_sam reads version {VERSION}. {remedy}.")
    known = {entry.name for entry in fields(RunRecord)} - {"path"}
    record = {name: value for name, value in content.items() if name in known}
    _check_types(path, record)
    return RunRecord(**record, path=path)


def thinned(entries: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """At most `most` log entries of each kind (evaluations, losses, others), at even distances, each kind's last included."""
    kinds: dict[str, list[int]] = {}
    for index, entry in enumerate(entries):
        kind = "loss" if "loss" in entry else "evaluation" if any(key.startswith("eval_") for key in entry) else "other"
        kinds.setdefault(kind, []).append(index)
    if all(len(places) <= most for places in kinds.values()):
        return entries
    kept = {places[place] for places in kinds.values() for place in spread_out(len(places), most)}
    return [entry for index, entry in enumerate(entries) if index in kept]


def spread_out(count: int, most: int) -> list[int]:
    """At most `most` of the indices below `count`, at even distances, the first and the last included."""
    return list(range(count)) if count <= most else [round(i * (count - 1) / (most - 1)) for i in range(most)]


def find_records(folder: str | os.PathLike) -> tuple[list[RunRecord], list[str]]:
    """
    All records under `folder`, ordered by path, and one message for each file that cannot be read.

    Args:
        folder (`str` or `os.PathLike`): Folder to search recursively for files named `run_record.json`.
    """
    records, problems = [], []
    for path in sorted(_walk(Path(folder))):
        try:
            records.append(read_record(path))
        except RecordError as error:
            problems.append(str(error))
    return records, problems


def _walk(folder: Path) -> Iterator[Path]:
    for root, _, files in os.walk(folder):
        if RECORD_NAME in files:
            yield Path(root) / RECORD_NAME


_TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("task", "arm", "condition", "budget", "status"), str),
    **dict.fromkeys(("config", "model", "data", "environment", "metrics", "sharpness"), dict),
    **dict.fromkeys(("seed", "steps", "peak_memory", "resumed_from"), (int, type(None))),
    **dict.fromkeys(("passes", "seconds", "samples_per_second"), (int, float, type(None))),
    **dict.fromkeys(("predictions", "started", "ended"), (str, type(None))),
    **dict.fromkeys(("curves", "segments", "survival"), list),
    "error": (dict, type(None)),
}


def _check_types(path: Path, record: dict[str, Any]) -> None:
    for name in ("task", "arm", "status"):
        if name not in record:
            raise RecordError(f"{path} is incomplete: {name!r} is missing. Delete it to run it again.")
    for name, value in record.items():
        if not isinstance(value, _TYPES[name]) or isinstance(value, bool):
            raise RecordError(f"{path}: {name!r} must not be of type {type(value).__name__}.")
    if record["status"] not in STATUSES:
        raise RecordError(f"{path}: status={record['status']!r} is unknown. Allowed: {', '.join(STATUSES)}.")
    for name in ("metrics", "sharpness"):
        for key, value in record.get(name, {}).items():
            if isinstance(value, bool) or not isinstance(value, (int, float, type(None))):
                raise RecordError(f"{path}: {name}[{key!r}] must be a number, not {value!r}.")
    for name, words in (("curves", "logged step"), ("survival", "treatment and draw"), ("segments", "segment")):
        if not all(isinstance(entry, dict) for entry in record.get(name, [])):
            raise RecordError(f"{path}: {name!r} must contain one JSON object per {words}.")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
