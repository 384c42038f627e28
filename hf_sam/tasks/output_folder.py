"""The folder of a run: locked while the run goes on, and searched for a complete checkpoint when it is resumed."""

from __future__ import annotations

import json
import logging
import os
import socket
import zipfile
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from transformers import TrainingArguments

from ..experiments.records import RECORD_NAME, RecordError, read_record
from .command_line.errors import FolderInUseError, UserError, one_line

logger = logging.getLogger(__name__)
LOCK_NAME = "_run.lock"  # files whose names start with an underscore are not pushed to the hub
LOCK_SECONDS = 6.0  # DataLoader workers outlive a killed run by up to five seconds
_LOCKS: dict[Path, FileLock] = {}


def is_finished(folder: Path) -> bool:
    """Whether the folder contains the record of a finished run."""
    try:
        return read_record(folder / RECORD_NAME).status == "finished"
    except RecordError:
        return False


def lock_folder(folder: Path) -> None:
    """
    Keep other runs out of `output_dir` until this process ends.

    The operating system releases the lock when the process ends, however it ends, so a lock is never stale. The file
    `_run.owner` names the process that holds it.

    Raises:
        FolderInUseError: If another run holds the lock; the message names the process.
        UserError: If the folder cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_dir={folder} cannot be created ({error.strerror}); choose another folder.") from None
    path = folder / LOCK_NAME
    try:
        lock = _LOCKS.setdefault(
            path.resolve(), FileLock(path, thread_local=False)
        )  # a lock that is garbage-collected is released
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout:
        try:
            owner = path.with_suffix(".owner").read_text(encoding="utf-8").strip()
        except OSError:
            owner = "another process"
        raise FolderInUseError(
            f"output_dir={folder} is in use by {owner}. Wait for that run or stop it, or choose another folder."
        ) from None
    except (NotImplementedError, OSError) as error:  # a file system without locks
        logger.warning("%s cannot be locked (%s); do not start a second run in it.", folder, one_line(error))
        return
    started = datetime.now().astimezone().isoformat(timespec="seconds")
    path.with_suffix(".owner").write_text(f"process {os.getpid()} on {socket.gethostname()}, since {started}\n")


def last_complete_checkpoint(folder: Path, args: TrainingArguments) -> str | None:
    """Return the newest complete checkpoint, if any; a killed run may leave an incomplete one."""
    numbered = [
        (int(path.name.split("-")[1]), path)
        for path in folder.glob("checkpoint-*")
        if path.name.split("-")[1].isdigit()
    ]
    for _, path in sorted(numbered, reverse=True):
        missing = missing_from_checkpoint(path, args)
        if missing is None:
            return str(path)
        logger.warning("%s is incomplete (%s); trying the checkpoint before it.", path, missing)
    return None


def missing_from_checkpoint(path: Path, args: TrainingArguments) -> str | None:
    """Describe what a checkpoint lacks, `None` if it is complete. The Trainer writes `trainer_state.json` last."""
    if not path.is_dir():
        return "there is no such folder"
    weights = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*", "global_step*")
    ranks = [""] if args.world_size == 1 else [f"_{rank}" for rank in range(args.world_size)]
    wanted = [] if args.save_only_model else ["scheduler.pt", *(f"rng_state{rank}.pth" for rank in ranks)]
    missing = [name for name in wanted if not (path / name).is_file()]
    if not any(next(path.glob(pattern), None) for pattern in weights):
        missing.append("the weights")
    missing += [file.name for file in sorted(path.iterdir()) if is_cut_off(file)]
    for index in path.glob("*.safetensors.index.json"):
        with suppress(ValueError, KeyError):
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            missing += sorted(shard for shard in shards if not (path / shard).is_file())
    try:
        json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        missing.append("trainer_state.json")
    return f"{', '.join(missing)} missing or incomplete" if missing else None


def is_cut_off(file: Path) -> bool:
    """Whether a file of weights or state is truncated, as a full disk or a killed run leaves it."""
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="np"):
                return False
        except (SafetensorError, OSError):
            return True
    return file.suffix in (".pt", ".pth") and not zipfile.is_zipfile(file)
