"""One run in a process of its own: a crash, a leak or a killed worker takes nothing else with it."""

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

from .pausing import PauseAt
from .plan import averaging_of, command_line
from .records import ENDED, OPEN, RECORD_NAME, RecordError, RunRecord, read_record, write_json

JOB_NAME, LOG_NAME, LENGTH_NAME = "run.json", "log.txt", "length.json"
SUBMISSION_NAME = "submission.json"  # which job of which executor makes the run; gone when it has ended
PLACE_NAME = "place.json"  # where the run began last, written by the run itself
PRELOADED = ["datasets", "pandas", __name__]  # once for all runs of a machine
WEIGHTS = ("*.safetensors", "*.bin", "*.pt")


def load_task(name: str) -> ModuleType:
    """
    The module whose `main(argv, callbacks)` makes a run.

    Args:
        name (`str`): Of a task in `hf_sam.tasks`, or with a dot in it, any importable module.
    """
    return importlib.import_module(name if "." in name else f"hf_sam.tasks.{name}")


def start(
    folder: Path, launcher: Sequence[str], environment: Mapping[str, str] | None = None
) -> multiprocessing.Process | subprocess.Popen:
    """
    Start the run whose `run.json` is in `folder`, in a process that ends with this one.

    Args:
        folder (`Path`): Of the run.
        launcher (`Sequence[str]`): Command that starts it; none: a child of a process that has the libraries loaded.
        environment (`Mapping[str, str]`, *optional*): Variables to set over those of this process.
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
    """Whether it has not ended."""
    return process.poll() is None if isinstance(process, subprocess.Popen) else process.is_alive()


def exit_code(process: multiprocessing.Process | subprocess.Popen) -> int:
    """How it ended; negative: by that signal."""
    return process.returncode if isinstance(process, subprocess.Popen) else process.exitcode


def stop(process: multiprocessing.Process | subprocess.Popen) -> None:
    """Ends it, politely first."""
    process.terminate()
    deadline = time.monotonic() + 5
    while is_running(process) and time.monotonic() < deadline:
        time.sleep(0.05)
    if is_running(process):
        process.kill()
    process.wait() if isinstance(process, subprocess.Popen) else process.join()


def _child(folder: Path, environment: Mapping[str, str]) -> None:
    """What a process of our own does first: write to the log, and end when the one that started it does."""
    os.environ.update(environment)
    with open(folder / LOG_NAME, "ab", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    end_with_parent()
    execute(folder)


def end_with_parent() -> None:
    """Ends this process when the one that started it has ended, however that came about."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)  # nobody is left to stop what goes on

    threading.Thread(target=watch, daemon=True).start()


def end_with(parent: int) -> None:
    """The same under a launcher, by the number of that process."""

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
    Run the task as `run.json` says, and leave a record even where the task did not get so far. Nothing is done where
    the record says that the run has ended.

    A job with `pause_at` stops at that step of its schedule and keeps the checkpoint. At 0 it evaluates the untrained
    model, and writes down the length of the run.
    """
    job = json.loads((folder / JOB_NAME).read_text(encoding="utf-8"))
    if has_ended(folder):
        return
    if job.get("pause_at") is not None and int(os.environ.get("RANK", "0")) == 0:
        remove_checkpoints(folder)  # of a part of a run, which is made again from where it began
    try:
        averaging = averaging_of(job["average"])
        callbacks = [averaging] if averaging is not None else []
        if job.get("pause_at") is not None:
            callbacks.append(PauseAt(job["pause_at"]))
        trainer = load_task(job["recipe"]).main(job["argv"], callbacks)
        if job["sharpness"] is not None:
            _measure(folder, "sharpness", job["sharpness"])
        if trainer.is_world_process_zero():
            if job.get("survival") is not None:
                _measure(folder, "survival", job["survival"])
            _clear(folder, job)
            if job.get("pause_at") == 0:
                write_json(folder / LENGTH_NAME, {"max_steps": trainer.state.max_steps})
    except Exception as error:
        traceback.print_exc()
        if type(error).__name__ == "FolderInUseError":  # the run goes on elsewhere: it has not failed
            sys.exit(1)
        if int(os.environ.get("RANK", "0")) == 0:
            mark_failed(folder, job["names"], error)


def _measure(folder: Path, task: str, settings: dict[str, Any]) -> None:
    """Sharpness (by all processes of the run) or survival (by the first) of the trained model, into the run's record."""
    try:
        if task == "sharpness":
            PartialState().wait_for_everyone()  # the first one has written the model
        words = command_line(None, settings, folder / task)
        load_task(task).main(["--checkpoints", str(folder), "--disable_tqdm=true", *words])
    except Exception:  # the run itself is finished and stays so; the report says that this was not measured
        traceback.print_exc()


def _clear(folder: Path, job: dict[str, Any]) -> None:
    """Removes what need not stay."""
    if not job["keep_model"]:
        if job.get("pause_at") is None:  # a paused run goes on from its checkpoint
            remove_checkpoints(folder)
        for pattern in WEIGHTS:
            for path in folder.glob(pattern):
                path.unlink()


def remove_checkpoints(folder: Path) -> None:
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def has_ended(folder: Path) -> bool:
    """Whether the run in `folder` has a record that says so."""
    try:
        return read_record(folder / RECORD_NAME).status in ENDED
    except RecordError:
        return False


def take_up(folder: Path, submission: str) -> bool:
    """
    Note that the run begins here, unless it belongs to another job: one that was submitted by a driver that died
    before it could note the job's name is found out when it starts, and leaves the run alone.

    Args:
        folder (`Path`): Of the run.
        submission (`str`): Name that the executor gave this job.
    """
    stated = read_json(folder / SUBMISSION_NAME)
    if stated is not None and stated["id"] != submission:
        return False
    write_place(folder, submission, os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    return True


def write_place(folder: Path, submission: str, pid: int, gpus: str | None) -> None:
    """Note on which machine, and with which GPUs, a run is being made."""
    place = {"id": submission, "host": socket.gethostname(), "pid": pid, "gpus": gpus or None}
    write_json(folder / PLACE_NAME, place)


def read_json(path: Path) -> Any:
    """The content of a small file beside a run; `None` where there is none that can be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def mark_failed(folder: Path, names: dict[str, Any], error: Exception) -> None:
    """Leaves a failed record, unless the recipe has done so itself."""
    try:
        record = read_record(folder / RECORD_NAME)
    except RecordError:
        record = RunRecord(**names, path=folder / RECORD_NAME)
    if record.status in OPEN:
        record.fail(error)
        record.write()


def main(argv: Sequence[str] | None = None) -> None:
    """One process of a run that a launcher started."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="Of the run; `run.json` in it says what is run.")
    parser.add_argument("--parent", type=int, help="Process that the run ends with.")
    parser.add_argument("--submission", help="Job of a cluster that the run is made in.")
    args = parser.parse_args(argv)
    if args.parent:
        end_with(args.parent)
    if args.submission and int(os.environ.get("RANK", "0")) == 0 and not take_up(args.folder, args.submission):
        sys.exit(f"{args.folder} is made by another job than {args.submission}.")
    execute(args.folder)


if __name__ == "__main__":
    main()
