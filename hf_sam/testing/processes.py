"""Run methods, including custom classes, on several local processes."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import SAMConfig
from ..methods.base import Ascent, Descent

# Seconds after which processes count as deadlocked: for the start, and per run.
SECONDS, SECONDS_PER_RUN = 60, 10
# Seconds that a process may run after another has ended.
SECONDS_ALONE = 30
_SCRIPT = "__hf_sam_script__"
Key = tuple[str, str]


class CannotSend(Exception):
    """Raised when a class cannot be sent to another process; the message says why."""


@dataclasses.dataclass
class Sent:
    """A custom object in a form for other processes: the location of its class, and its fields."""

    module: str
    file: str | None
    name: str
    fields: dict[str, Any]

    @classmethod
    def of(cls, part: Ascent | Descent) -> Sent:
        """Describe an object.

        Raises:
            CannotSend: The class is not defined at module level of a file.
        """
        kind = type(part)
        file = getattr(sys.modules.get(kind.__module__), "__file__", None)
        if "<locals>" in kind.__qualname__:
            raise CannotSend(f"{kind.__name__} is defined inside a function: define it at module level")
        if file is None or not Path(file).is_file():
            raise CannotSend(f"{kind.__name__} is not defined in a file")
        fields = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
        return cls(kind.__module__, str(Path(file).resolve()), kind.__qualname__, fields)

    def make(self) -> Ascent | Descent:
        """Create the object."""
        if self.module == "__main__":  # import the script under another name, as multiprocessing does
            module = sys.modules.get(_SCRIPT) or _import_file(_SCRIPT, self.file)
        else:
            try:
                module = importlib.import_module(self.module)
            except ImportError:
                module = _import_file(self.module, self.file)
        found: Any = module
        for part in self.name.split("."):
            found = getattr(found, part)
        return found(**self.fields)


def _import_file(name: str, file: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def packed(config: SAMConfig) -> bytes:
    """Serialise a configuration for another process.

    Raises:
        CannotSend: A custom class or the value of a field cannot be serialised.
    """
    values = {name: getattr(config, name) for name in config.fields() if getattr(config, name) is not None}
    values |= {name: Sent.of(values[name]) for name in ("ascent", "descent") if name in values}
    try:
        return pickle.dumps(values)
    except Exception as error:
        raise CannotSend(f"a field cannot be pickled ({error})") from error


def unpacked(text: bytes) -> SAMConfig:
    """The inverse of `packed`."""
    values = pickle.loads(text)
    return SAMConfig(**{name: value.make() if isinstance(value, Sent) else value for name, value in values.items()})


def run_on_processes(
    runs: Mapping[Key, tuple[SAMConfig, dict]], folder: Path, processes: int
) -> tuple[dict[Key, list[list[Tensor]]], dict[str, str]]:
    """Execute every run on `processes` processes, with gloo.

    Returns:
        For each run, the weights after each step on each rank; and by method, why a run could not be sent.

    Raises:
        AssertionError: A process failed, or the processes deadlocked.
    """
    jobs, unsent = {}, {}
    for key, (config, options) in runs.items():
        try:
            jobs[key] = packed(config), options
        except CannotSend as reason:
            unsent[key[0]] = str(reason)
    if not jobs:
        return {}, unsent
    (folder / "jobs").write_bytes(pickle.dumps(jobs))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    path = os.pathsep.join(dict.fromkeys(str(Path(entry).resolve()) for entry in sys.path))
    common = {**os.environ, **world, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    common["OMP_NUM_THREADS"] = "1"
    started = []
    for rank in range(processes):
        environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes)}
        command = [sys.executable, "-m", "hf_sam.testing.worker", str(folder)]
        with (folder / f"{rank}.log").open("w") as log:
            started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    try:
        failure = _wait(started, SECONDS + SECONDS_PER_RUN * len(jobs))
    finally:
        for process in started:
            process.kill()
            process.wait()
    if failure is not None:
        raise AssertionError(_explained(folder, processes, failure))
    found = [torch.load(folder / f"{rank}.pt") for rank in range(processes)]
    return {key: [rank[key] for rank in found] for key in jobs}, unsent


def _wait(started: list[subprocess.Popen], seconds: float) -> str | None:
    """Wait until all processes have ended; return the failure, if any."""
    deadline = time.monotonic() + seconds
    while True:
        codes = [process.poll() for process in started]
        if all(code == 0 for code in codes):
            return None
        if any(codes):
            return "a process failed"
        if 0 in codes:
            deadline = min(deadline, time.monotonic() + SECONDS_ALONE)
        if time.monotonic() > deadline:
            return "the processes deadlocked"
        time.sleep(0.05)


def _explained(folder: Path, processes: int, failure: str) -> str:
    names = {path.read_text() for path in folder.glob("*.running")}
    lines = []
    for rank in range(processes):
        log = (folder / f"{rank}.log").read_text().strip().splitlines()
        lines += [f"rank {rank}: {line}" for line in log[-12:]]
    return (
        f"{', '.join(sorted(names))}: {failure}. Every rank must run the same passes; an ascent that returns None on some of "
        "them must declare may_skip = True.\n" + "\n".join(lines)
    )
