"""`hf-sam demo` without its training: which runs it reports on, and how it ends if one fails."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pandas as pd
import pytest
from fabricate import fabricate_run

from hf_sam.experiments.records import RECORD_NAME
from hf_sam.tasks import demo


@pytest.fixture
def trained(monkeypatch):
    """The names of the runs that the demo trained, in threads and in no time."""
    names = []

    def train(run, folder):
        names.append(run.name)
        record = fabricate_run(folder / run.name / RECORD_NAME, "digits", "clean", 0.0, "steps", run.arm, run.seed)
        record.write()
        scores = {f"accuracy_{bits}_bits": 0.5 for bits in demo.BITS}
        return {"noise": run.noise, "arm": run.arm, "seed": run.seed, "test_accuracy": 0.9, **scores} | {
            "test_ece": 0.1,
            "train_runtime": 1.0,
        }

    monkeypatch.setattr(demo, "train", train)
    monkeypatch.setattr(demo, "ProcessPoolExecutor", lambda workers, mp_context: ThreadPoolExecutor(workers))
    return names


def test_the_report_is_on_the_runs_of_this_call(trained, tmp_path):
    """Those of an earlier call with more seeds may have other lengths."""
    for seeds in ("2", "1"):
        demo.main(["--output_dir", str(tmp_path), "--processes", "1", "--seeds", seeds])
    runs = pd.read_csv(tmp_path / "report/data/runs.csv")
    assert set(runs.seed) == {0}
    assert len(runs) == len(json.loads((tmp_path / "summary.json").read_text())) == len(demo.ARMS) * len(demo.NOISE)


def test_a_run_that_fails_ends_the_demo_without_waiting_for_all_others(trained, monkeypatch, tmp_path):
    def fail(run, folder):
        trained.append(run.name)
        time.sleep(0.05)
        raise RuntimeError("no memory")

    monkeypatch.setattr(demo, "train", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        demo.main(["--output_dir", str(tmp_path), "--processes", "1", "--seeds", "3"])
    assert len(trained) <= 3
