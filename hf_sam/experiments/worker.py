"""A worker: finds a run that nobody has, makes it, and goes on until nothing is left. Any number of them share a study."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.utils import logging

from .execution import JOB_NAME, LOG_NAME, exit_code, is_running, mark_failed, start, stop
from .leases import Claims
from .plan import AVERAGE_KEYS, Plan, Run, command_line, settings_of, trial_runs
from .records import OPEN, RECORD_NAME, RecordError, RunRecord, read_record, write_json
from .tuning import best_trial, next_settings

logger = logging.get_logger(__name__)

ENDED = ("finished", "failed")
MAX_DEATHS = 3  # a run that ends so often without a result, its worker alive, is a failed one
POLL_SECONDS = 0.2


class StudyChangedError(ValueError):
    """A run on disk was made with other settings than the plan now has."""


@dataclass
class Workshop:
    """
    A plan and where its runs stand.

    Args:
        plan (`Plan`): What is compared.
        runs (`list[Run]`): The final runs, see `final_runs`.
        length (`Callable[[Run], dict]`): `max_steps` or `num_train_epochs` that the recipe has before a budget applies.
        in_force (`dict[tuple[str, str], str]`, *optional*): The SAM configuration of each task and arm, in words.
    """

    plan: Plan
    runs: list[Run]
    length: Callable[[Run], dict[str, Any]]
    in_force: dict[tuple[str, str], str] = field(default_factory=dict)

    def __post_init__(self):
        self._ended: dict[Path, RunRecord] = {}

    # --- where the runs stand --------------------------------------------------------------------------------------

    def folder(self, run: Run) -> Path:
        return self.plan.output_dir / run.folder

    def record(self, run: Run) -> RunRecord | None:
        """The record of a run, if there is a readable one."""
        folder = self.folder(run)
        if folder not in self._ended:
            try:
                record = read_record(folder / RECORD_NAME)
            except RecordError:
                return None
            if record.status not in ENDED:
                return record
            self._ended[folder] = record
        return self._ended[folder]

    def has_ended(self, run: Run) -> bool:
        record = self.record(run)
        return record is not None and record.status in ENDED

    def all_runs(self) -> Iterator[Run]:
        """Trials and final runs, in the order in which they are made."""
        seen = set()
        for run in self.runs:
            if self.plan.tuning and run.group not in seen:
                seen.add(run.group)
                yield from trial_runs(self.plan, run)
        yield from self.runs

    def is_ready(self, run: Run) -> bool:
        """Whether what has to be known before it is: of a trial, the ones before it; of a final run, all trials."""
        if self.plan.tuning is None:
            return True
        trials = trial_runs(self.plan, run)
        return all(self.has_ended(trial) for trial in trials[: run.trial])

    def open_runs(self) -> list[Run]:
        """Those that could be made now, whether claimed or not."""
        return [run for run in self.all_runs() if not self.has_ended(run) and self.is_ready(run)]

    # --- what a run is ---------------------------------------------------------------------------------------------

    def tuned(self, run: Run) -> dict[str, Any]:
        """The settings that a trial tries, or that have won for a final run."""
        if self.plan.tuning is None:
            return {}
        tuning, metric = self.plan.tuning, self.plan.question.metric
        trials = trial_runs(self.plan, run)
        done = [self.record(trial) for trial in trials[: run.trial]]
        if run.trial is not None:
            return next_settings(tuning.of(run.arm), tuning.seed, metric, done)
        best = best_trial(metric, done)
        if best is None:
            return {}  # every trial failed; so will the run, most likely, and say why
        return json.loads((self.folder(trials[best]) / JOB_NAME).read_text(encoding="utf-8"))["tuned"]

    def job(self, run: Run) -> dict[str, Any]:
        """What `run.json` holds: all that a process needs to make the run."""
        tuned, task = self.tuned(run), self.plan.tasks[run.task]
        settings = settings_of(self.plan, run, tuned, self.length(run))
        names = {name: settings[name] for name in ("task", "arm", "condition", "budget")}
        return {
            "recipe": task["recipe"],
            "argv": command_line(task.get("config"), settings, self.folder(run)),
            "names": {**names, "seed": run.seed},
            "tuned": tuned,
            "average": {key: value for key, value in self.plan.arms[run.arm].items() if key in AVERAGE_KEYS},
            "is_trial": run.trial is not None,
            "sharpness": self.plan.sharpness if run.trial is None else None,
            "survival": self.plan.survival if run.trial is None else None,
            "keep_model": self.plan.keep_models and run.trial is None,
        }

    def check_unchanged(self) -> None:
        """
        Raises:
            StudyChangedError: An ended run was made with other settings than the plan now gives it.
        """
        for run in self.all_runs():
            path = self.folder(run) / JOB_NAME
            if self.has_ended(run) and self.is_ready(run) and path.exists():
                made = json.loads(path.read_text(encoding="utf-8"))
                now = self.job(run)
                changed = sorted(
                    word
                    for word in set(map(str, made["argv"])) ^ set(now["argv"])
                    if not word.startswith("--output_dir=")
                )  # a study may have been moved since
                if changed or made["average"] != now["average"]:
                    raise StudyChangedError(
                        f"{path.parent} was run with other settings ({', '.join(changed[:4])}). Name another "
                        f"output_dir, or delete that folder to run it again."
                    )


def work(workshop: Workshop, stale_after: float = 60.0, report: Callable[[Run, str], None] = lambda *_: None) -> None:
    """
    Makes runs until none is left that this worker could make or take over.

    Args:
        workshop (`Workshop`): The plan and where it stands.
        stale_after (`float`, *optional*, defaults to 60.0): After how many silent seconds a worker counts as gone.
        report (`Callable[[Run, str], None]`, *optional*): Told of each run that this worker begins and ends.
    """
    claims = Claims(workshop.plan.output_dir, stale_after)
    while True:
        with claims.lock:
            waiting = workshop.open_runs()
            run = next((run for run in waiting if not claims.is_taken(workshop.folder(run))), None)
            if run is not None:
                claims.take(workshop.folder(run))
        if run is not None:
            report(run, "begins")
            make(workshop, run, claims)
            record = workshop.record(run)
            report(run, record.status if record is not None else "to be taken up again")
        elif waiting:  # others are at work; what they leave behind is taken over
            time.sleep(min(POLL_SECONDS * 5, stale_after / 6))
        else:
            return


def make(workshop: Workshop, run: Run, claims: Claims) -> None:
    """Makes one claimed run; the claim is kept alive meanwhile and given up at the end, whatever happens."""
    folder = workshop.folder(run)
    job = workshop.job(run)
    process = None
    try:
        _clear_stale(folder, job)
        write_json(folder / JOB_NAME, job)
        with claims.kept_alive(folder) as lost:
            process = start(folder, workshop.plan.launcher)
            while is_running(process) and not lost.is_set():
                time.sleep(POLL_SECONDS)
        if lost.is_set():
            logger.warning("%s was taken over by another worker while this one was not heard of.", run.folder)
        elif not workshop.has_ended(run):
            _count_death(folder, job, exit_code(process))
    finally:
        if process is not None and is_running(process):
            stop(process)
        claims.release(folder)


def _clear_stale(folder: Path, job: dict[str, Any]) -> None:
    """Checkpoints that other settings made are none to go on from."""
    path = folder / JOB_NAME
    if path.exists() and json.loads(path.read_text(encoding="utf-8"))["argv"] != job["argv"]:
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)


def _count_death(folder: Path, job: dict[str, Any], code: int) -> None:
    counter = folder / "deaths.txt"
    deaths = 1 + (int(counter.read_text()) if counter.exists() else 0)
    counter.write_text(str(deaths))
    if deaths >= MAX_DEATHS:
        cause = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        message = f"ended {deaths} times without a result, last: {cause}; see {LOG_NAME} in its folder"
        mark_failed(folder, job["names"], RuntimeError(message))


def retry_failed(workshop: Workshop) -> int:
    """Removes the records of failed runs, so that they are made again; returns how many there were."""
    count = 0
    for run in list(workshop.all_runs()):
        record = workshop.record(run)
        if record is not None and record.status == "failed":
            for name in (RECORD_NAME, "deaths.txt"):
                (workshop.folder(run) / name).unlink(missing_ok=True)
            workshop._ended.pop(workshop.folder(run), None)
            count += 1
    return count


def estimate(workshop: Workshop) -> tuple[float, int] | None:
    """Seconds that the rest would take one worker, and from how many finished runs that is known; `None` before any."""
    spent, cost = 0.0, 0.0
    known = 0
    rest = 0.0
    for run in workshop.all_runs():
        record = workshop.record(run)
        if record is None or record.status in OPEN:
            rest += run.cost
        elif record.status == "finished" and record.resumed_from is None:
            spent += _seconds(record)
            cost += run.cost
            known += 1
    return (rest * spent / cost, known) if known else None


def _seconds(record: RunRecord) -> float:
    """From the moment when the run was claimed to its end, by the folder's clock."""
    return record.path.stat().st_mtime - record.path.with_name(JOB_NAME).stat().st_mtime


def counts(workshop: Workshop) -> dict[str, int]:
    """How many runs and trials there are, by where they stand."""
    found = {"finished": 0, "failed": 0, "begun": 0, "waiting": 0, "trials": 0}
    for run in workshop.all_runs():
        record = workshop.record(run)
        found["trials"] += run.trial is not None
        found["waiting" if record is None else "begun" if record.status in OPEN else record.status] += 1
    return found


def records_of(workshop: Workshop, runs: Sequence[Run] | None = None) -> list[RunRecord]:
    """The records that there are, of trials and final runs."""
    found = [workshop.record(run) for run in (runs if runs is not None else workshop.all_runs())]
    return [record for record in found if record is not None]
