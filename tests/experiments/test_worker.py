"""Whole studies of runs that take milliseconds, by one worker, by two, and by one that is killed."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from toy_worker import open_workshop

from hf_sam.experiments.leases import Claims
from hf_sam.experiments.records import RECORD_NAME, find_records, read_record
from hf_sam.experiments.worker import StudyChangedError, counts, estimate, records_of, retry_failed, work

STUDY = {"recipe": "experiments.toy_task", "task": "toy", "arms": {"adamw": {}, "sam": {}}, "seeds": [0, 1]}


@pytest.fixture
def study(tmp_path):
    def write(**changes):
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump({**STUDY, "output_dir": str(tmp_path / "out"), **changes}, sort_keys=False))
        return path

    return write


def begun(folder):
    """How often each run began, by its folder."""
    return {str(path.parent): len(path.read_text().splitlines()) for path in sorted(Path(folder).rglob("begun.txt"))}


def start_worker(study, tmp_path, stale_after):
    script = Path(__file__).parent / "toy_worker.py"
    words = [sys.executable, str(script), str(study), str(tmp_path / "out"), str(stale_after)]
    return subprocess.Popen(words, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})


def test_a_study_runs_once_and_a_second_time_does_nothing(study, tmp_path):
    workshop = open_workshop(study())
    work(workshop)
    records = records_of(workshop)
    assert [(run.arm, run.seed, run.status) for run in records] == [
        (arm, seed, "finished") for seed in (0, 1) for arm in ("adamw", "sam")
    ]
    assert records[0].model["fingerprint"] == records[1].model["fingerprint"] != records[2].model["fingerprint"]
    assert set(begun(tmp_path).values()) == {1}
    assert not list(tmp_path.rglob("*.safetensors"))  # keep_models is off
    seconds, known = estimate(workshop)
    assert (seconds, known) == (0.0, 4)
    work(open_workshop(study()))
    assert set(begun(tmp_path).values()) == {1}
    work(open_workshop(study(seeds=[0, 1, 2])))  # more seeds: only what is new
    assert list(begun(tmp_path).values()) == [1] * 6


def test_failed_runs_keep_their_error_and_the_others_go_on(study, tmp_path):
    arms = {"early": {"trouble": "early"}, "late": {"trouble": "late"}, "death": {"trouble": "death"}, "sam": {}}
    path = study(arms=arms, seeds=[0])
    workshop = open_workshop(path)
    work(workshop)
    found = {run.arm: run for run in records_of(workshop)}
    assert found["sam"].status == "finished"
    assert found["early"].status == found["late"].status == found["death"].status == "failed"
    assert found["early"].error["message"] == "nothing to train on"
    assert found["late"].error["message"] == "loss is nan"
    assert found["death"].error["message"].startswith("ended 3 times without a result, last: killed by signal 9")
    assert list(begun(tmp_path).values()) == [3, 1, 1, 1]
    work(open_workshop(path))
    assert list(begun(tmp_path).values()) == [3, 1, 1, 1]  # failed runs are not made again by themselves
    again = open_workshop(path)
    assert retry_failed(again) == 3
    assert counts(again)["waiting"] == 3


def test_an_interrupted_run_goes_on_from_its_checkpoint_or_from_the_start(study, tmp_path):
    workshop = open_workshop(study(seeds=[0], arms={"sam": {}}))
    work(workshop)
    record = read_record(next(tmp_path.rglob(RECORD_NAME)))
    record.status = "running"  # what a kill leaves behind
    record.write()
    work(open_workshop(study(seeds=[0], arms={"sam": {}})))
    again = read_record(record.path)
    assert again.status == "finished"
    assert again.metrics == record.metrics


def test_changed_settings_are_refused_for_runs_that_are_done(study):
    work(open_workshop(study(seeds=[0])))
    with pytest.raises(StudyChangedError, match=r"--sleep=0\.0.*output_dir, or delete that folder"):
        open_workshop(study(seeds=[0], arms={"adamw": {}, "sam": {"sleep": 0.0}})).check_unchanged()
    open_workshop(study(seeds=[0, 5])).check_unchanged()


def test_a_study_that_was_moved_is_the_same_study(study, tmp_path):
    work(open_workshop(study(seeds=[0])))
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    moved = open_workshop(study(seeds=[0], output_dir=str(tmp_path / "elsewhere")))
    moved.check_unchanged()
    assert counts(moved)["finished"] == 2


def test_two_workers_share_a_study_and_the_run_of_a_killed_one_is_taken_over(study, tmp_path):
    """No run is lost; none begins twice but the one whose worker was killed, and that one only after its first end."""
    path = study(seeds=list(range(4)), settings={"sleep": 1.0})
    out, stale_after = tmp_path / "out", 15.0
    killed, other = (start_worker(path, tmp_path, stale_after) for _ in range(2))
    try:
        claim = wait_for(lambda: claim_of(killed, out), "a claim of the first worker")
        wait_for(lambda: claim_of(other, out), "a claim of the second worker")
        claim = wait_for(lambda: claim_of(killed, out), "another claim of the first worker")
        wait_for((claim.parent / "begun.txt").exists, "its run to begin")
        child = int((claim.parent / "begun.txt").read_text())
        killed.kill()
        killed.wait()
        wait_for(lambda: not is_alive(child), "the killed worker's run to end with it", seconds=10)
        assert other.wait(timeout=240) == 0
    finally:
        for worker in (killed, other):
            worker.kill()
            worker.wait()
    records, problems = find_records(out)
    assert not problems
    assert [run.status for run in records] == ["finished"] * 8
    ended_before_the_kill = (claim.parent / "ended.json").exists() and begun(claim.parent) == {str(claim.parent): 1}
    assert begun(out) == {str(run.path.parent): 1 for run in records} | (
        {} if ended_before_the_kill else {str(claim.parent): 2}
    )
    assert not list(out.rglob("claim.json"))


def wait_for(condition, what, seconds=240):
    """What `condition` returns once it is true."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    return pytest.fail(f"waited {seconds} s for {what}")


def claim_of(worker, out):
    """The claim file that a worker holds now."""
    for path in out.rglob("claim.json"):
        with contextlib.suppress(OSError):
            if f"-{worker.pid}-" in path.read_text():
                return path
    return None


def is_alive(pid):
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def test_a_claim_that_was_lost_is_noticed_and_not_given_up_twice(tmp_path):
    run = tmp_path / "run"
    mine, theirs = Claims(tmp_path, stale_after=0.6), Claims(tmp_path, stale_after=0.6)
    mine.take(run)
    with mine.kept_alive(run) as lost:
        assert mine.is_taken(run)
        time.sleep(1.0)
        assert theirs.is_taken(run)  # renewed meanwhile
        theirs.take(run)  # as if this worker had been suspended
        assert lost.wait(2)
    mine.release(run)
    assert theirs.owns(run)
    theirs.release(run)
    assert not mine.is_taken(run)


def test_trials_come_first_choose_on_validation_and_win(study, tmp_path):
    tuning = {"trials": 6, "space": {"learning_rate": {"low": 0.0001, "high": 1.0, "log": True}}}
    path = study(tuning=tuning, seeds=[0])
    workshop = open_workshop(path)
    work(workshop)
    trials = [run for run in records_of(workshop) if run.budget == "tuning steps"]
    assert [run.arm for run in trials] == ["adamw"] * 6 + ["sam"] * 6
    assert {run.metrics["examples"] for run in trials} == {8}  # of the validation split
    rates = [run.config["training_arguments"]["learning_rate"] for run in trials]
    assert rates[:6] == rates[6:]  # the same search for both arms, since both score alike
    assert len(set(rates)) == 6
    best = max(trials[:6], key=lambda run: run.metrics["accuracy"])
    for run in records_of(workshop, workshop.runs):
        assert run.metrics["examples"] == 16
        assert run.config["training_arguments"]["learning_rate"] == best.config["training_arguments"]["learning_rate"]
    before = begun(tmp_path)
    work(open_workshop(path))
    open_workshop(path).check_unchanged()
    assert begun(tmp_path) == before
