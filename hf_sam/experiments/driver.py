"""
The driver of a study, which decides which runs come next, submits them to an executor, and reads their records.

Its whole state is on disk, so it can be killed and restarted at any moment. A run whose record says that it ended is
never repeated; for all others, `submission.json` in the run's folder names the job that executes it.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from transformers.utils import logging

from .execution import (
    JOB_NAME,
    LOG_NAME,
    PLACE_NAME,
    SUBMISSION_NAME,
    UNMEASURED_NAME,
    mark_failed,
    remove_checkpoints,
)
from .executors import Choice, Ending, Executor
from .json_files import read_json, write_json
from .plan import Run, changed_settings
from .workshop import DEATHS_NAME, Workshop

logger = logging.get_logger(__name__)

LOCK_NAME = ".driver.lock"
MAX_DEATHS = 3  # a run that ends without a result this often, through its own fault, has failed


class StudyInUseError(ValueError):
    """Another driver, or another executor, is working on the study."""


@contextmanager
def study_lock(folder: Path) -> Iterator[None]:
    """
    Keep a second driver out of a study. The operating system releases the lock when the process ends, however it ends.

    Raises:
        StudyInUseError: If another driver holds the lock; the message names its process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock, owner = FileLock(folder / LOCK_NAME), folder / ".driver.owner"
    try:
        lock.acquire(timeout=1)  # `is_driven` holds it for a moment
    except Timeout:
        at = owner.read_text(encoding="utf-8").strip() if owner.exists() else "another process"
        raise StudyInUseError(
            f"{folder} is driven by {at}. --status shows the state of its runs; end that process to continue from here."
        ) from None
    except (NotImplementedError, OSError) as error:  # a file system without locks
        logger.warning("%s cannot be locked (%s); do not start a second driver on it.", folder, error)
        yield
        return
    try:
        owner.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        yield
    finally:
        lock.release()


def is_driven(folder: Path) -> bool:
    """Whether a driver is working on a study, as far as the file system can tell."""
    lock = FileLock(folder / LOCK_NAME)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    except (NotImplementedError, OSError):
        return False
    lock.release()
    return False


@dataclass
class Driver:
    """
    Execute the runs of a workshop. The caller holds `study_lock`.

    Args:
        workshop (`Workshop`): The plan and the state of its runs.
        executor (`Executor`): The executor of the runs.
        report (`Callable[[Run, str], None]`, *optional*): Called with each run whose state changes, and the new state.
    """

    workshop: Workshop
    executor: Executor
    report: Callable[[Run, str], None] = lambda *_: None

    def __post_init__(self):
        self.jobs: dict[str, Run] = {}
        self._gone: dict[
            str, float
        ] = {}  # jobs that ended without a visible result, and the time when this was first seen

    def drive(self) -> None:
        """Execute runs until none is left that can start."""
        try:
            self.attach()
            while self.advance():
                self.executor.wait()
        finally:
            self.executor.close()

    def advance(self) -> bool:
        """Collect jobs that have ended and submit as many as there is room for; returns whether any are left."""
        self.collect()
        return self.submit() or bool(self.jobs)

    def attach(self) -> None:
        """Adopt the jobs that an earlier driver has submitted."""
        self.jobs = named_jobs(self.workshop, self.executor.kind)
        for name, ending in self.executor.ended(list(self.jobs)).items():
            self.release(name, Ending(ending.cause, is_own_fault=False))
        for run in self.jobs.values():
            self.report(run, "attached")

    def collect(self) -> None:
        """Release jobs that have ended, once their record is visible or the wait for it is over."""
        for name, ending in self.executor.ended(list(self.jobs)).items():
            self.workshop.forget(self.jobs[name])
            since = self._gone.setdefault(name, time.monotonic())
            if self.workshop.has_ended(self.jobs[name]) or time.monotonic() - since >= self.executor.patience:
                self.release(name, ending)

    def release(self, name: str, ending: Ending) -> None:
        """Record the end of a job, and count it against the run if there is no result."""
        run = self.jobs.pop(name)
        self._gone.pop(name, None)
        folder = self.workshop.folder(run)
        self.workshop.forget(run)
        is_own_fault = ending.is_own_fault
        if is_own_fault is None:
            is_own_fault = (read_json(folder / PLACE_NAME) or {}).get("id") == name
        if not self.workshop.has_ended(run) and is_own_fault:
            count_death(folder, ending)
            self.workshop.forget(run)
        (folder / SUBMISSION_NAME).unlink(missing_ok=True)
        if not self.workshop.has_ended(run):
            self.report(run, f"will be rerun: {ending.cause}")
            return
        self.workshop.discard()
        self.report(run, self.workshop.record(run).status)

    def submit(self) -> bool:
        """Submit runs in the order of the plan while there is room; returns whether the executor took fewer."""
        room = self.executor.room - len(self.jobs)
        if room <= 0:
            return False
        taken = {run.folder for run in self.jobs.values()}
        runs = list(islice((run for run in self.workshop.open_runs() if run.folder not in taken), room))
        folders = [self.workshop.folder(run).resolve() for run in runs]
        for run, folder in zip(runs, folders, strict=True):
            prepare(folder, self.workshop.job(run))
        names = self.executor.submit(folders) if folders else []
        for run, folder, name in zip(runs, folders, names, strict=False):
            write_json(folder / SUBMISSION_NAME, {"id": name})
            self.jobs[name] = run
            self.report(run, "queued" if self.executor.survives_driver else "started")
        return len(names) < len(runs)


def drive(
    workshop: Workshop, choice: Choice | None = None, report: Callable[[Run, str], None] = lambda *_: None
) -> None:
    """
    Execute every run of a workshop that has not ended.

    Args:
        workshop (`Workshop`): The plan and the state of its runs.
        choice (`Choice`, *optional*): The executor; by default one process after another on this machine.
        report (`Callable[[Run, str], None]`, *optional*): Called with each run whose state changes, and the new state.

    Raises:
        StudyInUseError: If another driver is working on the study.
    """
    choice = choice or Choice()
    with study_lock(workshop.plan.output_dir):
        Driver(workshop, choice.make(workshop.plan.launcher), report).drive()


def jobs_of(workshop: Workshop, choice: Choice) -> dict[str, Run]:
    """Return the jobs that are queued or running, as listed by the driver if one is running; changes nothing."""
    jobs = named_jobs(workshop, choice.kind)
    if not jobs or is_driven(workshop.plan.output_dir):
        return jobs
    executor = choice.make(workshop.plan.launcher)
    try:
        gone = executor.ended(list(jobs))
    finally:
        executor.close()
    return {name: run for name, run in jobs.items() if name not in gone}


def cancel_all(workshop: Workshop, choice: Choice) -> int:
    """
    Cancel every job of a study, and return their number.

    Raises:
        StudyInUseError: If a driver is running, which would submit them again.
    """
    with study_lock(workshop.plan.output_dir):
        jobs = named_jobs(workshop, choice.kind)
        executor = choice.make(workshop.plan.launcher)
        try:
            gone = executor.ended(list(jobs))
            jobs = {name: run for name, run in jobs.items() if name not in gone}
            executor.cancel(list(jobs))
        finally:
            executor.close()
        for run in jobs.values():
            (workshop.folder(run) / SUBMISSION_NAME).unlink(missing_ok=True)
            (workshop.folder(run) / PLACE_NAME).unlink(missing_ok=True)
        return len(jobs)


def named_jobs(workshop: Workshop, kind: str) -> dict[str, Run]:
    """Return the last job of each run that can start now or has started, according to the runs' folders."""
    named = ((job_at(workshop.folder(run), kind), run) for run in workshop.open_runs())
    return {name: run for name, run in named if name is not None}


def make_one(folder: Path, executor: Executor, result: str) -> None:
    """Execute the run in `folder`, and wait for its end and, up to the executor's patience, for the file `result`."""
    try:
        jobs = executor.submit([folder.resolve()])
        while not executor.ended(jobs):
            executor.wait()
        deadline = time.monotonic() + executor.patience
        while not (folder / result).exists() and time.monotonic() < deadline:
            executor.wait()
    finally:
        executor.close()


def job_at(folder: Path, kind: str) -> str | None:
    """
    Return the last job of a run, according to its folder.

    Args:
        folder (`Path`): The run's folder.
        kind (`str`): Kind of the executor that is to continue the run.

    Raises:
        StudyInUseError: If the run belongs to another executor.
    """
    stated = read_json(folder / SUBMISSION_NAME)
    if stated is None:  # the driver may have died before it recorded a job that has started since
        stated = read_json(folder / PLACE_NAME)
        return stated["id"] if stated is not None and stated["id"].startswith(kind + " ") else None
    owner, name = stated["id"].split(" ", 1)
    if owner not in (kind, "local"):
        raise StudyInUseError(
            f"{folder} belongs to job {name} of executor {owner}. Continue with --executor {owner}, or cancel its jobs first "
            f"with --executor {owner} --cancel."
        )
    return stated["id"] if owner == kind else None


def prepare(folder: Path, job: dict[str, Any]) -> None:
    """Write a run's job to its folder, and remove checkpoints made with other settings."""
    path = folder / JOB_NAME
    if path.exists() and changed_settings(json.loads(path.read_text(encoding="utf-8")), job):
        remove_checkpoints(folder)
    (folder / PLACE_NAME).unlink(missing_ok=True)
    write_json(path, job)


def count_death(folder: Path, ending: Ending) -> None:
    """Count an end without a result, and mark the run as failed after `MAX_DEATHS` of them."""
    counter = folder / DEATHS_NAME
    deaths = 1 + (read_json(counter) or 0)  # 0 also if a full disk left an empty file
    write_json(counter, deaths)
    if deaths >= MAX_DEATHS:
        message = f"ended {deaths} times without a result, last: {ending.cause}; see {LOG_NAME} in its folder"
        names = json.loads((folder / JOB_NAME).read_text(encoding="utf-8"))["names"]
        mark_failed(folder, names, RuntimeError(message))
        (folder / UNMEASURED_NAME).unlink(missing_ok=True)  # a run that ended while measured stays finished
