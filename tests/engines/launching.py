"""Starts the processes of a distributed test once and hands out what each of its runs left."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


class Launched:
    """The results of all runs of one launch; one that is missing fails with the output of the processes.

    Args:
        folder (`Path`): Where results and checkpoints go.
        table (`str`): The function of `sharded_runs` or `deepspeed_runs` that names the runs, as `module.function`.
        processes (`int`, *optional*, defaults to 2): How many ranks, on the CPU.
    """

    def __init__(self, folder: Path, table: str, processes: int = 2):
        self._folder = folder
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command += [str(HERE / "worker.py"), str(folder), table]
        self._process = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=900)

    def __call__(self, name: str, rank: int = 0) -> dict[str, Any]:
        path = self._folder / f"{name}.{rank}.pt"
        if not path.is_file():
            failure = [line for line in self._process.stderr.splitlines() if line.startswith("[rank")]
            pytest.fail(f"the run {name!r} left no result:\n" + "\n".join(failure[-40:]), pytrace=False)
        return torch.load(path)

    @property
    def names(self) -> list[str]:
        return sorted({path.name.rsplit(".", 2)[0] for path in self._folder.glob("*.pt")})
