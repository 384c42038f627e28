"""Execute one run in its own process, so that a crash, a memory leak or a kill does not affect anything else."""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from accelerate import PartialState
from filelock import FileLock, Timeout

from .json_files import read_json, write_json
from .pausing import PauseAt
from .plan import averaging_of, command_line
from .records import ENDED, OPEN, RECORD_NAME, RecordError, RunRecord, read_record

JOB_NAME, LOG_NAME, LENGTH_NAME = "run.json", "log.txt", "length.json"
SUBMISSION_NAME = "submission.json"  # which job of which executor executes the run; removed when the job has ended
PLACE_NAME = "place.json"  # where the run last started, written by the run itself
PRELOADED = ["datasets", "pandas", __name__]  # imported once for all runs on a machine
UNMEASURED_NAME = "unmeasured"  # the trained model is still to be measured; removed once it is
HELD_NAME = "_job.lock"  # held by the job that executes the run; names with an underscore are not pushed to the hub
HOLD_SECONDS = 180.0  # a Ray worker that has lost its head ends after about a minute
_HELD: dict[Path, FileLock] = {}  # a lock that is garbage-collected is released
WEIGHTS = ("*.safetensors", "*.bin", "*.pt")


def load_task(name: str) -> ModuleType:
    """
    Import the module whose `main(argv, callbacks)` executes a run.

    Args:
        name (`str`): Name of a task in `hf_sam.tasks`, or of any importable module if it contains a dot.
    """
    return importlib.import_module(name if "." in name else f"hf_sam.tasks.{name}")


def start(
    folder: Path, launcher: Sequence[str], environment: Mapping[str, str] | None = None
) -> multiprocessing.Process | subprocess.Popen:
    """
    Start the run whose `run.json` is in `folder`, in a process that ends with this one.

    Args:
        folder (`Path`): The run's folder.
        launcher (`Sequence[str]`): Command that starts the run; if empty, a process with preloaded libraries is forked.
        environment (`Mapping[str, str]`, *optional*): Variables that override those of this process.
    """
    if launcher:
        words = [*launcher, "-m", __name__, str(folder), "--parent", str(os.getpid())]
        with open(folder / LOG_NAME, "ab") as log:
            variables = {**os.environ, **(environment or {})}
            return subprocess.Popen(words, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=variables)
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_child, args=(folder, dict(environment or {})))
    process.start()
    return process


def is_running(process: multiprocessing.Process | subprocess.Popen) -> bool:
    """Whether a process is still running."""
    return process.poll() is None if isinstance(process, subprocess.Popen) else process.is_alive()


def exit_code(process: multiprocessing.Process | subprocess.Popen) -> int:
    """Return the exit code of a process; `-n` if signal `n` killed it."""
    return process.returncode if isinstance(process, subprocess.Popen) else process.exitcode


def stop(process: multiprocessing.Process | subprocess.Popen) -> None:
    """Terminate a process, and kill it if it does not end within seconds."""
    process.terminate()
    deadline = time.monotonic() + 5
    while is_running(process) and time.monotonic() < deadline:
        time.sleep(0.05)
    if is_running(process):
        process.kill()
    process.wait() if isinstance(process, subprocess.Popen) else process.join()


def _child(folder: Path, environment: Mapping[str, str]) -> None:
    """Execute a run in a child process, with output to the log; the child ends with its parent."""
    os.environ.update(environment)
    with open(folder / LOG_NAME, "ab", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    end_with_parent()
    execute(folder)


def end_with_parent() -> None:
    """End this process when its parent process ends, however it ends."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)  # otherwise nobody could stop this process

    threading.Thread(target=watch, daemon=True).start()


def end_with(parent: int) -> None:
    """End this process when the process with the id `parent` ends; for runs started by a launcher."""

    def watch() -> None:
        while True:
            try:
                os.kill(parent, 0)
            except ProcessLookupError:
                os._exit(1)
            time.sleep(1)

    threading.Thread(target=watch, daemon=True).start()


def execute(folder: Path) -> None:
    """
    Execute the task described in `run.json`, and leave a record even if the task fails before it writes one.

    If the record says that the run has ended, only what a kill has cut off is made up for: measures of the trained model,
    and the evaluation in `afterwards`. A job with `pause_at`
    stops at that step of its schedule and keeps the checkpoint; at 0 it evaluates the untrained model and writes the
    length of the run to a file.
    """
    job = json.loads((folder / JOB_NAME).read_text(encoding="utf-8"))
    is_first = int(os.environ.get("RANK", "0")) == 0
    if has_ended(folder):
        if is_unmeasured(folder):
            _measure_all(folder, job, is_first)
        if is_first:
            _do_afterwards(folder, job)
        return
    if job.get("pause_at") is not None and is_first:
        remove_checkpoints(folder)  # this phase restarts from its beginning
    if is_first and (job["sharpness"], job.get("survival")) != (None, None):
        (folder / UNMEASURED_NAME).touch()
    try:
        averaging = averaging_of(job["average"])
        callbacks = [averaging] if averaging is not None else []
        if job.get("pause_at") is not None:
            callbacks.append(PauseAt(job["pause_at"]))
        trainer = load_task(job["recipe"]).main(job["argv"], callbacks)
        _measure_all(folder, job, trainer.is_world_process_zero())
        if trainer.is_world_process_zero():
            if job.get("pause_at") == 0:
                write_json(folder / LENGTH_NAME, {"max_steps": trainer.state.max_steps})
            _do_afterwards(folder, job)
    except Exception as error:
        traceback.print_exc()
        if type(error).__name__ == "FolderInUseError":  # the run continues in another process, so it has not failed
            sys.exit(1)
        if is_first:
            mark_failed(folder, job["names"], error)


def is_unmeasured(folder: Path) -> bool:
    """Whether the run has finished, but was killed before its trained model was measured."""
    if not (folder / UNMEASURED_NAME).exists():
        return False
    try:
        return read_record(folder / RECORD_NAME).status == "finished"
    except RecordError:
        return False


def _measure_all(folder: Path, job: dict[str, Any], is_first: bool) -> None:
    """Measure the trained model as the job says, and remove what is then no longer needed."""
    if job["sharpness"] is not None:
        _measure(folder, "sharpness", job["sharpness"])
    if is_first:
        if job.get("survival") is not None:
            _measure(folder, "survival", job["survival"])
        _clear(folder, job)
        (folder / UNMEASURED_NAME).unlink(missing_ok=True)


def _measure(folder: Path, task: str, settings: dict[str, Any]) -> None:
    """Add sharpness (on all processes) or survival (on the first) of the trained model to the run's record."""
    try:
        if task == "sharpness":
            PartialState().wait_for_everyone()  # until the first process has written the model
        words = command_line(None, settings, folder / task)
        load_task(task).main(["--checkpoints", str(folder), "--disable_tqdm=true", *words])
    except Exception:  # the run stays finished; the report shows the measure as missing
        traceback.print_exc()


def _do_afterwards(folder: Path, job: dict[str, Any]) -> None:
    """Let the task named in `afterwards` evaluate a finished run; it writes a result or marks the run as failed."""
    stated = job.get("afterwards")
    if stated is not None and read_record(folder / RECORD_NAME).status == "finished":
        load_task(stated["task"]).afterwards(folder, stated)


def _clear(folder: Path, job: dict[str, Any]) -> None:
    """Remove checkpoints and weights that are no longer needed."""
    if not job["keep_model"]:
        if job.get("pause_at") is None:  # a paused run resumes from its checkpoint
            remove_checkpoints(folder)
        for pattern in WEIGHTS:
            for path in folder.glob(pattern):
                path.unlink()


def remove_checkpoints(folder: Path) -> None:
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def has_ended(folder: Path) -> bool:
    """Whether the run in `folder` has ended, according to its record."""
    try:
        return read_record(folder / RECORD_NAME).status in ENDED
    except RecordError:
        return False


def hold(folder: Path, seconds: float) -> bool:
    """
    Wait until no earlier job executes the run, and keep later jobs out until this process ends.

    An earlier job may still be running although its cluster has lost it. Return whether it ended within `seconds`.
    """
    lock = _HELD.setdefault(folder.resolve(), FileLock(folder / HELD_NAME, thread_local=False))
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        return False
    except (NotImplementedError, OSError):  # a file system without locks
        pass
    return True


def follow(folder: Path, submission: str, seconds: float) -> bool:
    """Wait until the first process of a run has recorded its start; return whether it did within `seconds`."""
    deadline = time.monotonic() + seconds
    while (read_json(folder / PLACE_NAME) or {}).get("id") != submission:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def is_ours(folder: Path, submission: str) -> bool:
    """Whether the run belongs to this job, that is, no other job is recorded for it."""
    stated = read_json(folder / SUBMISSION_NAME)
    return stated is None or stated["id"] == submission


def take_up(folder: Path, submission: str) -> bool:
    """
    Record that the run starts in this process, unless it belongs to another job.

    If a driver dies between submitting a job and recording its name, the next driver may submit the run again. The job
    that is not recorded then leaves the run alone.

    Args:
        folder (`Path`): The run's folder.
        submission (`str`): The executor's name of this job.

    Returns:
        `bool`: Whether this job may execute the run.
    """
    if not is_ours(folder, submission):
        return False
    write_place(folder, submission, os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    return True


def write_place(folder: Path, submission: str, pid: int, gpus: str | None) -> None:
    """Record the machine, process and GPUs of a run."""
    place = {"id": submission, "host": socket.gethostname(), "pid": pid, "gpus": gpus or None}
    write_json(folder / PLACE_NAME, place)


def mark_failed(folder: Path, names: dict[str, Any], error: Exception) -> None:
    """Write a failed record, unless the recipe has done so itself."""
    try:
        record = read_record(folder / RECORD_NAME)
    except RecordError:
        record = RunRecord(**names, path=folder / RECORD_NAME)
    if record.status in OPEN:
        record.fail(error)
        record.write()


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of a run that was started by a launcher."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="The run's folder, with its `run.json`.")
    parser.add_argument("--parent", type=int, help="Id of the process with which the run ends.")
    parser.add_argument("--submission", help="Name of the cluster job that executes the run.")
    args = parser.parse_args(argv)
    if args.parent:
        end_with(args.parent)
    if args.submission:
        if int(os.environ.get("RANK", "0")) == 0:
            if not is_ours(args.folder, args.submission) or not hold(args.folder, HOLD_SECONDS):
                sys.exit(f"{args.folder} is being executed by another job than {args.submission}.")
            if not take_up(args.folder, args.submission):
                sys.exit(f"{args.folder} belongs to another job than {args.submission}.")
        elif not follow(args.folder, args.submission, 2 * HOLD_SECONDS):
            sys.exit(f"The first process of {args.submission} has not started.")
    execute(args.folder)


if __name__ == "__main__":
    main()
