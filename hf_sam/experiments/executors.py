"""
Executors of runs: processes on this machine, a Ray cluster, or Slurm.

An executor queues, places and ends jobs, and reports which jobs have ended, and why. The driver decides which runs to
execute, and a run's outcome is read from its record on disk.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
import yaml

from ..suggestions import did_you_mean
from .execution import exit_code, is_running, start, stop, write_place

KINDS = {"local": "LocalExecutor", "ray": "RayExecutor", "slurm": "SlurmExecutor"}


@dataclass(frozen=True)
class Ending:
    """
    The reason why a job ended.

    Args:
        cause (`str`): The reason in one line.
        is_own_fault (`bool` or `None`, *optional*, defaults to `True`):
            Whether the end counts against the run; false if the machine was taken away or the driver killed. `None` if
            the executor cannot tell; then it counts if the run had started.
    """

    cause: str
    is_own_fault: bool | None = True


@dataclass
class Executor(ABC):
    """
    Executes runs, each from the `run.json` in its folder. Jobs have names by which other processes can query them.

    Args:
        launcher (`Sequence[str]`): Command that starts each run; empty for this Python.
    """

    launcher: Sequence[str]

    kind = ""  # prefix of each job's name, followed by a space
    survives_driver = True  # whether jobs continue without a driver
    patience = 0.0  # seconds until a record written on another machine is visible here

    @property
    @abstractmethod
    def room(self) -> int:
        """Maximum number of jobs queued or running at a time."""

    @abstractmethod
    def submit(self, folders: Sequence[Path]) -> list[str]:
        """Submit runs by their absolute folders; returns the names of the jobs, fewer if no more are accepted now."""

    @abstractmethod
    def ended(self, jobs: Sequence[str]) -> dict[str, Ending]:
        """Return the jobs that are neither queued nor running; empty if the cluster does not answer."""

    @abstractmethod
    def wait(self) -> None:
        """Wait for a while, at most until a job ends."""

    @abstractmethod
    def cancel(self, jobs: Sequence[str]) -> None:
        """Cancel jobs, whether they have started or not."""

    @abstractmethod
    def close(self) -> None:
        """Release resources that would keep this process alive; jobs that survive the driver continue."""


@dataclass
class LocalExecutor(Executor):
    """
    Processes on this machine, which end with this process.

    Args:
        workers (`int`, *optional*, defaults to 1): Number of runs at the same time.
        gpus (`int`, *optional*):
            Number of GPUs visible to each run; by default one, or all of them with a launcher or a single worker. If
            the workers need more GPUs than there are, they share them.
    """

    workers: int = 1
    gpus: int | None = None
    poll: float = 0.1

    kind = "local"
    survives_driver = False

    def __post_init__(self):
        if type(self.workers) is not int or self.workers < 1:
            raise ValueError(f"workers={self.workers!r} must be at least 1.")
        self._running: dict[str, tuple[int, Any]] = {}  # job: its slot and its process

    @property
    def room(self) -> int:
        return self.workers

    def submit(self, folders: Sequence[Path]) -> list[str]:
        names = []
        for folder in folders:
            slot = min(set(range(self.workers)) - {slot for slot, _ in self._running.values()})
            gpus = self._gpus_of(slot)
            process = start(folder, self.launcher, {} if gpus is None else {"CUDA_VISIBLE_DEVICES": gpus})
            name = f"local {socket.gethostname()} {process.pid} {_born(process.pid)}"
            write_place(folder, name, process.pid, gpus)
            self._running[name] = slot, process
            names.append(name)
        return names

    def _gpus_of(self, slot: int) -> str | None:
        """Return the `CUDA_VISIBLE_DEVICES` of a slot; `None` to keep that of this process."""
        devices = visible_gpus()
        if not devices or (self.gpus is None and (self.launcher or self.workers == 1)):
            return None
        count = self.gpus or 1
        return ",".join(devices[(slot * count + index) % len(devices)] for index in range(min(count, len(devices))))

    def ended(self, jobs: Sequence[str]) -> dict[str, Ending]:
        found = {}
        for name in jobs:
            if name not in self._running:  # the job of a driver that was killed
                _, host, pid, born = name.split()
                if host != socket.gethostname() or _born(int(pid)) != born:
                    found[name] = Ending("its driver was ended", is_own_fault=False)
            elif not is_running(self._running[name][1]):
                code = exit_code(self._running.pop(name)[1])
                found[name] = Ending(f"killed by signal {-code}" if code < 0 else f"exit code {code}")
        return found

    def wait(self) -> None:
        time.sleep(self.poll)

    def cancel(self, jobs: Sequence[str]) -> None:
        for name in jobs:
            if name in self._running:
                stop(self._running.pop(name)[1])

    def close(self) -> None:
        self.cancel(list(self._running))


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as in `CUDA_VISIBLE_DEVICES`, without initializing CUDA."""
    stated = os.environ.get("CUDA_VISIBLE_DEVICES")
    if stated is not None:
        return [word.strip() for word in stated.split(",") if word.strip()]
    from torch.cuda import device_count

    return [str(index) for index in range(device_count())]


def _born(pid: int) -> str | None:
    """Return the start time of a process, to distinguish it from later ones with its id; `None` if it has ended."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else str(process.create_time())
    except psutil.NoSuchProcess:
        return None


@dataclass
class Choice:
    """
    The executor to use; its library is imported only when it is created.

    Args:
        kind (`str`): One of `KINDS`.
        options (`dict`): Arguments of the executor, apart from the launcher.
    """

    kind: str = "local"
    options: dict[str, Any] = field(default_factory=dict)

    def make(self, launcher: Sequence[str]) -> Executor:
        return _class_of(self.kind)(launcher, **self.options)


def choose(
    stated: Mapping[str, Any], kind: str | None = None, workers: int | None = None, given: Sequence[str] = ()
) -> Choice:
    """
    Choose the executor of a plan, with overrides from the command line.

    Args:
        stated (`Mapping`): `kind`, and the options of each kind under its name.
        kind (`str`, *optional*): Overrides the kind in the plan.
        workers (`int`, *optional*): Overrides the workers of `local`.
        given (`Sequence[str]`, *optional*): `key=value` pairs that override options of the chosen kind.

    Raises:
        ValueError: If a kind or option is unknown; the message names it and what is allowed.
    """
    for name in stated:
        if name not in ("kind", *KINDS):
            hint = did_you_mean(name, ["kind", *KINDS], f" Allowed: kind, {', '.join(KINDS)}.")
            raise ValueError(f"executor.{name} is unknown.{hint}")
    kind = kind or stated.get("kind", "local")
    if kind not in KINDS:
        raise ValueError(f"executor={kind!r} is unknown. Allowed: {', '.join(KINDS)}.")
    options = stated.get(kind) or {}
    if not isinstance(options, Mapping):
        raise ValueError(f"executor.{kind}={options!r} must map options to values.")
    options = dict(options)
    for word in given:
        if "=" not in word:
            raise ValueError(f"executor_options={word!r} is not a key=value pair.")
        key, value = word.split("=", 1)
        options[key] = yaml.safe_load(value)
    if workers is not None:
        if kind != "local":
            raise ValueError(
                f"workers={workers} applies only to executor=local; with {kind}, give --executor_options queue={workers}."
            )
        options["workers"] = workers
    known = {entry.name: entry.type for entry in dataclasses.fields(_class_of(kind)) if entry.name != "launcher"}
    for key, value in options.items():
        if key not in known:
            hint = did_you_mean(key, known, f" Allowed: {', '.join(known)}.")
            raise ValueError(f"executor.{kind}.{key} is unknown.{hint}")
        least = 1 if key in ("workers", "queue") else 0
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if known[key].startswith(("int", "float")) and value is not None and (not is_number or value < least):
            raise ValueError(f"executor.{kind}.{key}={value!r} must be a number, at least {least}.")
    return Choice(kind, options)


def _class_of(kind: str) -> type[Executor]:
    if kind == "local":
        return LocalExecutor
    return getattr(import_module(f".{kind}_executor", __package__), KINDS[kind])
