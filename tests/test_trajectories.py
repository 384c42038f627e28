"""Every method's steps are those of the recorded runs. A change that means to alter one records it anew and says so."""

from __future__ import annotations

import json

import pytest
import torch
import trajectories
from distributed.launching import Launched

from hf_sam.update import buckets, step

RECORDED = json.loads(trajectories.GOLDEN.read_text(encoding="utf-8"))
# Relative to a run's numbers. In lower precision another order of a sum may round a weight to its neighbour.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
LOGGED = 1e-6  # what is logged has been added up in float32


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> Launched:
    return Launched(tmp_path_factory.mktemp("trajectories"), "trajectories.process_runs")


def assert_as_recorded(result, recorded, dtype):
    found, tolerance = trajectories.summary(result), TOLERANCES[dtype]
    size = recorded["weights"][-1]
    assert found["weights"] == pytest.approx(recorded["weights"], rel=tolerance, abs=tolerance * size)
    assert found["losses"] == pytest.approx(recorded["losses"], rel=tolerance)
    assert found["log"].keys() == recorded["log"].keys()
    for key, values in recorded["log"].items():
        near = max(tolerance, LOGGED)
        assert found["log"][key] == pytest.approx(values, rel=near, abs=near), key


def is_drawn_alike(name: str) -> bool:
    """One case of each kind, but for those whose random numbers are drawn a list at a time, and one that begins at rho = 0.

    A size of 0 is logged where it is known to the device alone, and not where the host knows that nothing moves.
    """
    draws = name.startswith("random") or "rounded at random" in name
    repeats = "defaults" in name or name.endswith(("micro", "micro 2", "device 1", "global 2"))
    return not (draws or repeats or name == "cosine device")


@pytest.mark.parametrize("name", trajectories.cases())
def test_one_process(name, tmp_path):
    case = trajectories.cases()[name]
    assert_as_recorded(trajectories.run(case, tmp_path), RECORDED[name], case.dtype)


@pytest.mark.parametrize("name", [name for name in trajectories.cases() if is_drawn_alike(name)])
def test_one_process_that_works_on_whole_lists_as_an_accelerator_does(name, tmp_path, monkeypatch):
    monkeypatch.setattr(step, "IN_BUCKETS", True)
    monkeypatch.setattr(buckets, "BUCKET_BYTES", 64)
    case = trajectories.cases()[name]
    assert_as_recorded(trajectories.run(case, tmp_path), RECORDED[name], case.dtype)


@pytest.mark.slow
@pytest.mark.parametrize("name", trajectories.process_cases())
def test_two_processes(processes, name):
    case = trajectories.process_cases()[name]
    assert_as_recorded(processes(name, 0), RECORDED[f"{name} rank 0"], case.dtype)
    ranks = [processes(name, rank)["weights"] for rank in (0, 1)]
    assert all(torch.equal(ranks[0][key], ranks[1][key]) for key in ranks[0])


def test_every_recorded_run_is_compared():
    compared = {*trajectories.cases(), *(f"{name} rank 0" for name in trajectories.process_cases())}
    assert compared == RECORDED.keys()
