"""Processes that share the work get the numbers of one process alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .worker import measure_all


def numbers(value, path: str = "") -> dict[str, float]:
    """The numbers of nested results by their place, without the seconds they took."""
    if isinstance(value, dict):
        parts = [numbers(v, f"{path}/{k}") for k, v in value.items() if k not in ("seconds", "passes")]
    elif isinstance(value, list):
        parts = [numbers(v, f"{path}/{i}") for i, v in enumerate(value)]
    else:
        return {path: value}
    return {place: number for part in parts for place, number in part.items() if number is not None}


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path):
    tests = Path(__file__).parents[1]
    words = [str(tmp_path / "rendezvous"), str(tmp_path / "result")]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "sharpness.worker", str(rank), "2", *words],
            cwd=tests,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    alone = numbers(measure_all())
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    first, second = (json.loads((tmp_path / f"result.{rank}").read_text()) for rank in range(2))
    assert numbers(first) == numbers(second), "all processes hold the same"
    assert numbers(first) == pytest.approx(alone, rel=1e-6, abs=1e-10)
