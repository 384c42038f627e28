"""Fixtures of the integration tests."""

from __future__ import annotations

import gc

import pytest
from transformers.utils import logging


@pytest.fixture(scope="session", autouse=True)
def fast_runs():
    """The Trainer collects garbage at the start of each run, which would visit every object of every imported module."""
    logging.disable_progress_bar()
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
