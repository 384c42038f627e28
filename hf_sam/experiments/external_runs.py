"""Outputs of a plain `Trainer`, read for display in a report: with fewer columns, and never paired."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from .records import RECORD_NAME, RunRecord

STATE, RESULTS = "trainer_state.json", "all_results.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)$")
_SEED = re.compile(r"[-_. ]?seed[-_=. ]?(\d+)$", re.IGNORECASE)
_TEST_PREFIXES = ("test_", "predict_", "eval_")  # by precedence, if a metric has several
_TIMING = re.compile(r"(runtime|samples_per_second|steps_per_second|samples|model_preparation_time|loss_per_token)$")


def find_external_runs(folder: str | os.PathLike, task: str) -> tuple[list[RunRecord], list[str]]:
    """
    All runs of a plain Trainer under `folder`, and one message for each that cannot be read.

    A run is a folder with `trainer_state.json` or `all_results.json`, but without a run record. If only its checkpoints
    have these files, the last checkpoint is used. The arm is the folder's name, and the seed a trailing `seed-N`:
    `adamw/seed-3` and `adamw-seed3` are both arm `adamw`, seed 3.

    Args:
        folder (`str` or `os.PathLike`): Folder to search recursively.
        task (`str`): The task of the runs, which their files do not contain.
    """
    records, problems = [], []
    for run in _find_runs(Path(folder)):
        try:
            records.append(_read_run(run, Path(folder), task))
        except (OSError, ValueError, AttributeError, TypeError) as error:
            problems.append(f"{run}: no readable Trainer output ({error}).")
    return records, problems


def _find_runs(folder: Path) -> list[Path]:
    found: dict[Path, None] = {}
    for root, _, files in sorted(os.walk(folder)):
        path = Path(root)
        if STATE not in files and RESULTS not in files:
            continue
        run = path.parent if _CHECKPOINT.search(path.name) and path != folder else path
        if not (run / RECORD_NAME).exists():
            found[run] = None
    return list(found)


def _read_run(run: Path, folder: Path, task: str) -> RunRecord:
    state, results = _read_json(_state_file(run)), _read_json(run / RESULTS)
    history = [entry for entry in state.get("log_history", []) if isinstance(entry, dict)]
    last: dict[str, Any] = {}
    for entry in history:
        last.update(entry)
    last.update(results)
    arm, seed = _name(run, folder)
    return RunRecord(
        task=task,
        arm=arm,
        seed=seed,
        status="external",
        metrics=_metrics(last),
        steps=_number(state.get("global_step")),
        seconds=_number(last.get("train_runtime")),
        samples_per_second=_number(last.get("train_samples_per_second")),
        curves=history,
        path=run,
    )


def _state_file(run: Path) -> Path:
    if (run / STATE).exists():
        return run / STATE
    checkpoints = [path for path in run.glob("checkpoint-*") if _CHECKPOINT.search(path.name)]
    checkpoints.sort(key=lambda path: int(_CHECKPOINT.search(path.name)[1]))
    return checkpoints[-1] / STATE if checkpoints else run / STATE


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is not a JSON object")
    return content


def _metrics(values: dict[str, Any]) -> dict[str, float | None]:
    metrics: dict[str, float | None] = {}
    for prefix in _TEST_PREFIXES:
        for key, value in values.items():
            name = key.removeprefix(prefix)
            if key.startswith(prefix) and not _TIMING.search(name) and _number(value) is not None:
                metrics.setdefault(name, value)
    return metrics


def _number(value: Any) -> Any:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _name(run: Path, folder: Path) -> tuple[str, int | None]:
    """Arm and seed from the folder's name, or the arm from its parent's name if its own has only the seed."""
    name = run.name if run != folder else run.resolve().name
    match = _SEED.search(name)
    arm = name[: match.start()] if match else name
    if not arm:
        arm = run.parent.name if run != folder else run.resolve().parent.name
    return arm, int(match[1]) if match else None
