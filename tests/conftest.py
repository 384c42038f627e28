import gc
import os
import sys
from pathlib import Path

import pytest

# Before torch is imported: tests run in parallel, one core each, and never ask a model hub.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session", autouse=True)
def _imports_stay():
    """The Trainer collects garbage at the start of each run, which would visit every imported module."""
    import hf_sam  # noqa: F401

    gc.freeze()


@pytest.fixture
def make_trainer(tmp_path):
    """A Trainer of a linear classifier: small enough for every test of what lies around training."""
    from linear import trainer_in

    return lambda seed=0, output_dir=tmp_path / "run", **arguments: trainer_in(output_dir, seed, **arguments)
