"""A plan and the state of its runs, read from the records on disk. How runs are executed is up to an executor."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from .execution import JOB_NAME, SUBMISSION_NAME, is_unmeasured
from .plan import AVERAGE_KEYS, Plan, Run, changed_settings, command_line, settings_of, trial_runs
from .records import ENDED, OPEN, RECORD_NAME, RecordError, RunRecord, read_record, thinned
from .tuning import best_trial, in_space, next_settings, open_storage

DEATHS_NAME = "deaths.txt"  # in a run's folder: how often it ended without a result
MANY_RUNS, MAX_ENTRIES = 1000, 50


class StudyChangedError(ValueError):
    """A run on disk has other settings than the plan now gives it."""


@dataclass
class Workshop:
    """
    A plan and the state of its runs.

    Args:
        plan (`Plan`): The comparison.
        runs (`list[Run]`): The final runs, see `final_runs`.
        length (`Callable[[Run], dict]`): `max_steps` or `num_train_epochs` of the recipe, before a budget applies.
        in_force (`dict[tuple[str, str], str]`, *optional*):
            A description of the SAM configuration in force, for each task and arm.
        bases (`dict[str, dict[str, str]]`, *optional*): The values of each task's base configuration, as text.
    """

    plan: Plan
    runs: list[Run]
    length: Callable[[Run], dict[str, Any]]
    in_force: dict[tuple[str, str], str] = field(default_factory=dict)
    bases: dict[str, dict[str, str]] = field(default_factory=dict)

    def __post_init__(self):
        self._records: dict[Path, RunRecord | None] = {}
        self._trials: dict[tuple[str, ...], list[Run]] = {}

    # --- state of the runs -----------------------------------------------------------------------------------------

    def folder(self, run: Run) -> Path:
        return self.plan.output_dir / run.folder

    def record(self, run: Run) -> RunRecord | None:
        """The run's record without its large fields, or `None` if it cannot be read; cached, see `forget`."""
        if run.folder not in self._records:
            self._records[run.folder] = read_outcome(self.folder(run))
        return self._records[run.folder]

    def forget(self, run: Run) -> None:
        """Drop the cached record of a run, so that it is read again."""
        self._records.pop(run.folder, None)

    def has_ended(self, run: Run) -> bool:
        record = self.record(run)
        return record is not None and record.status in ENDED

    @cached_property
    def _every_run(self) -> list[Run]:
        found: dict[Run, None] = {}
        for run in self.runs:
            found |= dict.fromkeys(self.trials(run))
        return [*found, *self.runs]

    def all_runs(self) -> Sequence[Run]:
        """Trials and final runs, in order of execution."""
        return self._every_run

    def trials(self, run: Run) -> list[Run]:
        """The trials that tune the group of `run`."""
        if self.plan.tuning is None:
            return []
        if run.group not in self._trials:
            self._trials[run.group] = trial_runs(self.plan, run)
        return self._trials[run.group]

    def is_ready(self, run: Run) -> bool:
        """Whether a run can start: a final run after all its trials, a trial after all but `parallel` - 1 before it."""
        if self.plan.tuning is None:
            return True
        missing = sum(not self.has_ended(trial) for trial in self.trials(run)[: run.trial])
        return missing < (1 if run.trial is None else self.plan.tuning.parallel)

    def open_runs(self) -> Iterator[Run]:
        """Runs that can start now or have started, in order of execution."""
        return (run for run in self.all_runs() if not self.has_ended(run) and self.is_ready(run))

    def discard(self) -> None:
        """Remove files that are no longer needed; called when a run has ended."""

    # --- settings of a run -----------------------------------------------------------------------------------------

    def tuned(self, run: Run) -> dict[str, Any]:
        """The settings that a trial tries, or the best ones for a final run."""
        if self.plan.tuning is None:
            return {}
        tuning, metric = self.plan.tuning, self.plan.question.metric
        trials = self.trials(run)[: run.trial]
        records = [self.record(trial) if self.has_ended(trial) else None for trial in trials]
        if run.trial is None:
            best = best_trial(metric, records)
            return (
                {} if best is None else self._made(trials[best])["tuned"]
            )  # if all trials failed, the run itself will show why
        if (self.folder(run) / JOB_NAME).exists():
            made = self._made(run)["tuned"]
            if in_space(tuning.of(run.arm), made):
                return made
        earlier = [(self._made(trial)["tuned"], record) for trial, record in zip(trials, records, strict=True)]
        name = " | ".join([*run.group, metric])
        return next_settings(tuning.of(run.arm), tuning.seed, metric, earlier, self._storage, name)

    def _made(self, run: Run) -> dict[str, Any]:
        """The job with which a run was last started."""
        return json.loads((self.folder(run) / JOB_NAME).read_text(encoding="utf-8"))

    @cached_property
    def _storage(self) -> Any:
        return open_storage(self.plan.output_dir, self.plan.tuning.storage)

    def job(self, run: Run) -> dict[str, Any]:
        """The content of `run.json`: everything that a process needs to execute the run."""
        tuned, task = self.tuned(run), self.plan.tasks[run.task]
        settings = settings_of(self.plan, run, tuned, self.length(run))
        names = {name: settings[name] for name in ("task", "arm", "condition", "budget")}
        return {
            "recipe": task["recipe"],
            "argv": command_line(task.get("config"), settings, self.folder(run)),
            "base": self.bases.get(run.task, {}),
            "names": {**names, "seed": run.seed},
            "tuned": tuned,
            "average": {key: value for key, value in self.plan.arms[run.arm].items() if key in AVERAGE_KEYS},
            "is_trial": run.trial is not None,
            "sharpness": self.plan.sharpness if run.trial is None else None,
            "survival": self.plan.survival if run.trial is None else None,
            "keep_model": self.plan.keep_models and run.trial is None,
        }

    def check_unchanged(self, retry_failed: bool = False) -> None:
        """
        Check that the runs on disk have the settings of the plan.

        Args:
            retry_failed (`bool`, *optional*, defaults to `False`): Failed runs are to run again, so they may have others.

        Raises:
            StudyChangedError: A run has ended with other settings than the plan now gives it.
        """
        for run in self.all_runs():
            path = self.folder(run) / JOB_NAME
            has_ended = self.has_ended(run) or is_unmeasured(path.parent)
            has_failed = self.has_ended(run) and self.record(run).status == "failed"
            if has_ended and not (has_failed and retry_failed) and self.is_ready(run) and path.exists():
                made = self._made(run)
                if run.trial is not None and not in_space(self.plan.tuning.of(run.arm), made["tuned"]):
                    raise StudyChangedError(
                        f"{path.parent} tried {made['tuned']}, which is not in the present search space. "
                        f"Choose another output_dir, or delete that folder to run it again."
                    )
                now = self.job(run)
                changed = changed_settings(made, now)
                if changed or made["average"] != now["average"]:
                    remedy = "give --retry_failed" if has_failed else "delete that folder"
                    raise StudyChangedError(
                        f"{path.parent} was run with other settings ({', '.join(changed[:4])}). Choose another "
                        f"output_dir, or {remedy} to run it again."
                    )


def read_outcome(folder: Path) -> RunRecord | None:
    """
    The record in `folder` without curves and descriptions, which would fill the memory in a study with many runs. A run
    whose trained model is still to be measured counts as running.
    """
    try:
        record = read_record(folder / RECORD_NAME)
    except RecordError:
        return None
    status = "running" if is_unmeasured(folder) else record.status
    return replace(record, status=status, curves=[], config={}, model={}, data={}, environment={})


def retry_failed(workshop: Workshop) -> int:
    """Remove the records of failed runs, so that they run again; returns the number of failed runs."""
    count = 0
    for run in workshop.all_runs():
        record = workshop.record(run)
        if record is not None and record.status == "failed":
            for name in (RECORD_NAME, DEATHS_NAME, SUBMISSION_NAME):
                (workshop.folder(run) / name).unlink(missing_ok=True)
            workshop.forget(run)
            count += 1
    return count


def counts(workshop: Workshop) -> dict[str, int]:
    """Number of runs by state, and number of trials."""
    found = {"finished": 0, "failed": 0, "begun": 0, "waiting": 0, "trials": 0}
    for run in workshop.all_runs():
        record = workshop.record(run)
        found["trials"] += run.trial is not None
        found["waiting" if record is None else "begun" if record.status in OPEN else record.status] += 1
    return found


def records_of(workshop: Workshop, runs: Sequence[Run] | None = None) -> list[RunRecord]:
    """
    The complete records of trials and final runs, as far as they exist. In a study of more than `MANY_RUNS`, the curve of each
    keeps `MAX_ENTRIES` entries of a kind: more would fill the memory, and no drawing has room for them.
    """
    runs = workshop.all_runs() if runs is None else runs
    found = []
    for run in runs:
        if workshop.record(run) is not None:
            with suppress(RecordError):
                record = read_record(workshop.folder(run) / RECORD_NAME)
                if len(runs) > MANY_RUNS:
                    record.curves = thinned(record.curves, MAX_ENTRIES)
                found.append(record)
    return found
