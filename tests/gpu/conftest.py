"""Where the tests of this folder run: on the CPU in every suite where that shows something, on CUDA by `make test-gpu`."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_finish(session):
    """A run that is to test GPUs fails where there are none, instead of passing over them."""
    chosen = [item for item in session.items if item.get_closest_marker("gpu") or item.get_closest_marker("multi_gpu")]
    if chosen and not session.config.option.collectonly and not torch.cuda.is_available():
        pytest.exit(f"no CUDA device is visible here: not one of {len(chosen)} GPU tests was run", returncode=1)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _compiler_settings_stay_here(monkeypatch):
    """`torch_compile=True` writes them into the environment, where the next trainer would find them."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    monkeypatch.setenv("ACCELERATE_DYNAMO_MODE", "default")
