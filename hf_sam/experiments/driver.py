"""The driver of a study: it knows which runs are to be made next, hands them to an executor, and reads what they left.

All that it knows is on disk, so that it can be killed, or closed and opened again, at any moment: a run with the record
of an end is never made again, and `submission.json` in the folder of another one says which job is at it.
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

from .execution import JOB_NAME, LOG_NAME, PLACE_NAME, SUBMISSION_NAME, mark_failed, read_json, remove_checkpoints
from .executors import Choice, Ending, Executor
from .plan import Run
from .records import write_json
from .workshop import DEATHS_NAME, Workshop

logger = logging.get_logger(__name__)

LOCK_NAME = ".driver.lock"
MAX_DEATHS = 3  # a run that ends so often without a result, by its own fault, is a failed one


class StudyInUseError(ValueError):
    """Another driver is at work in the folder."""


@contextmanager
def study_lock(folder: Path) -> Iterator[None]:
    """
    Keep a second driver out of a study. The system gives the lock up with the process, however that ends.

    Raises:
        StudyInUseError: There is one; the message says where.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock, owner = FileLock(folder / LOCK_NAME), folder / ".driver.owner"
    try:
        lock.acquire(timeout=1)  # `is_driven` has it for a moment
    except Timeout:
        at = owner.read_text(encoding="utf-8").strip() if owner.exists() else "another process"
        raise StudyInUseError(
            f"{folder} is driven by {at}. --status shows where it stands; end that process to drive it from here."
        ) from None
    except (NotImplementedError, OSError) as error:  # a file system without locks
        logger.warning("%s cannot be locked (%s): start no second driver on it.", folder, error)
        yield
        return
    try:
        owner.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        yield
    finally:
        lock.release()


def is_driven(folder: Path) -> bool:
    """Whether a driver is at work on a study, as far as the file system can tell."""
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
    Makes the runs of a workshop; the caller holds `study_lock`.

    Args:
        workshop (`Workshop`): The plan and where it stands.
        executor (`Executor`): Who makes the runs.
        report (`Callable[[Run, str], None]`, *optional*): Told what becomes of each run.
    """

    workshop: Workshop
    executor: Executor
    report: Callable[[Run, str], None] = lambda *_: None

    def __post_init__(self):
        self.jobs: dict[str, Run] = {}
        self._gone: dict[str, float] = {}  # jobs that have ended without a result that could be seen, and since when

    def drive(self) -> None:
        """Goes on until no run is left that could be made."""
        try:
            self.attach()
            while self.advance():
                self.executor.wait()
        finally:
            self.executor.close()

    def advance(self) -> bool:
        """Collects what has ended and submits what there is room for; returns whether there is more to come."""
        self.collect()
        return self.submit() or bool(self.jobs)

    def attach(self) -> None:
        """Takes up the jobs that an earlier driver has submitted."""
        self.jobs = named_jobs(self.workshop, self.executor.kind)
        for name, ending in self.executor.ended(list(self.jobs)).items():
            self.release(name, Ending(ending.cause, is_own_fault=False))
        for run in self.jobs.values():
            self.report(run, "goes on")

    def collect(self) -> None:
        """Lets go of the jobs that have ended, once their record is seen or has been waited for."""
        for name, ending in self.executor.ended(list(self.jobs)).items():
            self.workshop.forget(self.jobs[name])
            since = self._gone.setdefault(name, time.monotonic())
            if self.workshop.has_ended(self.jobs[name]) or time.monotonic() - since >= self.executor.patience:
                self.release(name, ending)

    def release(self, name: str, ending: Ending) -> None:
        """Notes that a job has ended, and counts it against its run where that has no result."""
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
            self.report(run, f"to be made again: {ending.cause}")
            return
        self.workshop.discard()
        self.report(run, self.workshop.record(run).status)

    def submit(self) -> bool:
        """Hands over what there is room for, in the order of the plan; returns whether the executor took less."""
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
            self.report(run, "queued" if self.executor.survives_driver else "begins")
        return len(names) < len(runs)


def drive(
    workshop: Workshop, choice: Choice | None = None, report: Callable[[Run, str], None] = lambda *_: None
) -> None:
    """
    Makes every run of a workshop that has not ended.

    Args:
        workshop (`Workshop`): The plan and where it stands.
        choice (`Choice`, *optional*): Who makes the runs; one process of this machine after another when left out.
        report (`Callable[[Run, str], None]`, *optional*): Told what becomes of each run.

    Raises:
        StudyInUseError: Another driver is at work on it.
    """
    choice = choice or Choice()
    with study_lock(workshop.plan.output_dir):
        Driver(workshop, choice.make(workshop.plan.launcher), report).drive()


def jobs_of(workshop: Workshop, choice: Choice) -> dict[str, Run]:
    """The jobs that are queued or under way; nothing is changed. A driver that is at work has noted them all."""
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
    Ends every job of a study; returns how many there were.

    Raises:
        StudyInUseError: A driver is at work on it, which would submit them again.
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
    """The last job of each run that could be made now, as far as the folders tell."""
    named = ((job_at(workshop.folder(run), kind), run) for run in workshop.open_runs())
    return {name: run for name, run in named if name is not None}


def make_one(folder: Path, executor: Executor, result: str) -> None:
    """Makes what `run.json` in `folder` says, and waits for its end, or a little longer for the file `result`."""
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
    The job that was last at a run, as far as its folder tells.

    Args:
        folder (`Path`): Of the run.
        kind (`str`): Of the executor that is to go on with it.

    Raises:
        StudyInUseError: Another executor has the run.
    """
    stated = read_json(folder / SUBMISSION_NAME)
    if stated is None:  # the driver that submitted it may have died before it noted the job, which has begun since
        stated = read_json(folder / PLACE_NAME)
        return stated["id"] if stated is not None and stated["id"].startswith(kind + " ") else None
    owner, name = stated["id"].split(" ", 1)
    if owner not in (kind, "local"):
        raise StudyInUseError(
            f"{folder} is with {owner}, job {name}. Go on with --executor {owner}, or end its jobs first by the same "
            f"command with --executor {owner} --cancel."
        )
    return stated["id"] if owner == kind else None


def prepare(folder: Path, job: dict[str, Any]) -> None:
    """Leaves in a run's folder what it is to do; checkpoints that other settings made are none to go on from."""
    path = folder / JOB_NAME
    if path.exists() and json.loads(path.read_text(encoding="utf-8"))["argv"] != job["argv"]:
        remove_checkpoints(folder)
    (folder / PLACE_NAME).unlink(missing_ok=True)
    write_json(path, job)


def count_death(folder: Path, ending: Ending) -> None:
    """A run that has often ended without a result is marked as failed."""
    counter = folder / DEATHS_NAME
    deaths = 1 + (int(counter.read_text()) if counter.exists() else 0)
    counter.write_text(str(deaths))
    if deaths >= MAX_DEATHS:
        message = f"ended {deaths} times without a result, last: {ending.cause}; see {LOG_NAME} in its folder"
        names = json.loads((folder / JOB_NAME).read_text(encoding="utf-8"))["names"]
        mark_failed(folder, names, RuntimeError(message))
