"""Starts the processes of a distributed test once and hands out what each of its runs left."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed.failing import MESSAGE

WORKER = Path(__file__).parent / "worker.py"
# What keeps processes on the CPU of a machine that has accelerators.
ON_THE_CPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
# How long a job may go on after one of its processes has failed.
SECONDS = 20


class Launched:
    """The results of all runs of one launch; one that is missing fails with the output of the processes.

    Args:
        folder (`Path`): Where results and checkpoints go.
        table (`str`): The function that names the runs, as `package.module.function`.
        processes (`int`, *optional*, defaults to 2): How many ranks.
        config (`Path`, *optional*): For `accelerate launch --config_file`; `torchrun` starts the processes without one.
        on_gpus (`bool`, *optional*, defaults to `False`): Show the processes the accelerators of the machine.
    """

    def __init__(self, folder: Path, table: str, processes: int = 2, config: Path | None = None, on_gpus: bool = False):
        self._folder = folder
        command = [sys.executable, "-m"]
        if config is None:
            command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        else:
            command += ["accelerate.commands.launch", "--config_file", str(config), "--num_processes", str(processes)]
            command += ["--main_process_port", "0"]
        command += [str(WORKER), str(folder), table]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **({} if on_gpus else ON_THE_CPU)}
        process = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
        self.ended = time.time()
        self.returncode, self.errors = process.returncode, process.stderr

    def __call__(self, name: str, rank: int = 0) -> dict[str, Any]:
        path = self._folder / f"{name}.{rank}.pt"
        if not path.is_file():
            failure = [line for line in self.errors.splitlines() if line.startswith("[rank")]
            pytest.fail(f"the run {name!r} left no result:\n" + "\n".join(failure[-40:]), pytrace=False)
        return torch.load(path)

    @property
    def names(self) -> list[str]:
        """Of the runs that left a result."""
        return sorted({path.name.rsplit(".", 2)[0] for path in self._folder.glob("*.pt")})

    def assert_ended_by_the_failure(self, name: str) -> None:
        """The run `name`, the launch's last, failed as `failing.fail` does, and the job ended within seconds of it."""
        failed = self._folder / name / "failed"
        assert failed.is_file(), f"an earlier run has ended the processes:\n{self.errors[-3000:]}"
        assert self.returncode != 0
        assert MESSAGE in self.errors
        assert self.ended - float(failed.read_text()) < SECONDS
