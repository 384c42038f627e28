"""Whole studies of runs that take milliseconds, on this machine: one at a time, two, and by a driver that is killed."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from toy_driver import open_workshop

from hf_sam.experiments import execution
from hf_sam.experiments.driver import StudyInUseError, count_death, drive, prepare, study_lock
from hf_sam.experiments.executors import Choice, Ending
from hf_sam.experiments.records import RECORD_NAME, find_records, read_record
from hf_sam.experiments.standing import describe_standing, estimate, progress, standing_of
from hf_sam.experiments.workshop import StudyChangedError, counts, records_of, retry_failed

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


def start_driver(study, tmp_path, *options):
    script = Path(__file__).parent / "toy_driver.py"
    words = [sys.executable, str(script), str(study), str(tmp_path / "out"), "local", *options]
    return subprocess.Popen(words, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})


def test_a_study_runs_once_and_a_second_time_does_nothing(study, tmp_path):
    workshop = open_workshop(study())
    drive(workshop)
    records = records_of(workshop)
    assert [(run.arm, run.seed, run.status) for run in records] == [
        (arm, seed, "finished") for seed in (0, 1) for arm in ("adamw", "sam")
    ]
    assert records[0].model["fingerprint"] == records[1].model["fingerprint"] != records[2].model["fingerprint"]
    assert set(begun(tmp_path).values()) == {1}
    assert not list(tmp_path.rglob("*.safetensors"))  # keep_models is off
    seconds, known = estimate(workshop)
    assert (seconds, known) == (0.0, 4)
    assert not list(tmp_path.rglob("submission.json"))
    drive(open_workshop(study()))
    assert set(begun(tmp_path).values()) == {1}
    drive(open_workshop(study(seeds=[0, 1, 2])))  # more seeds: only what is new
    assert list(begun(tmp_path).values()) == [1] * 6


def test_a_run_that_somebody_removes_meanwhile_does_not_end_the_study(study, tmp_path):
    workshop = open_workshop(study())
    removed = []

    def remove_the_first(run, what):
        if what == "finished" and not removed:
            removed.append(run)
            shutil.rmtree(workshop.folder(run))
        assert progress(workshop).startswith(f"{counts(workshop)['finished']} of 4")

    drive(workshop, report=remove_the_first)
    assert removed
    drive(open_workshop(study()))  # the same command makes it again
    assert len(records_of(open_workshop(study()))) == 4


def test_failed_runs_keep_their_error_and_the_others_go_on(study, tmp_path):
    arms = {"early": {"trouble": "early"}, "late": {"trouble": "late"}, "death": {"trouble": "death"}, "sam": {}}
    path = study(arms=arms, seeds=[0])
    workshop = open_workshop(path)
    drive(workshop)
    found = {run.arm: run for run in records_of(workshop)}
    assert found["sam"].status == "finished"
    assert found["early"].status == found["late"].status == found["death"].status == "failed"
    assert found["early"].error["message"] == "nothing to train on"
    assert found["late"].error["message"] == "loss is nan"
    assert found["death"].error["message"].startswith("ended 3 times without a result, last: killed by signal 9")
    assert list(begun(tmp_path).values()) == [3, 1, 1, 1]
    drive(open_workshop(path))
    assert list(begun(tmp_path).values()) == [3, 1, 1, 1]  # failed runs are not made again by themselves
    again = open_workshop(path)
    other = open_workshop(study(arms={**arms, "death": {"lr": 1e-3}}, seeds=[0]))
    with pytest.raises(
        StudyChangedError, match=r"was run with other settings .* or give --retry_failed to run it again"
    ):
        other.check_unchanged()
    assert retry_failed(again) == 3
    open_workshop(study(arms={**arms, "death": {"lr": 1e-3}}, seeds=[0])).check_unchanged()
    assert counts(again)["waiting"] == 3


def test_an_interrupted_run_goes_on_from_its_checkpoint_or_from_the_start(study, tmp_path):
    workshop = open_workshop(study(seeds=[0], arms={"sam": {}}))
    drive(workshop)
    record = read_record(next(tmp_path.rglob(RECORD_NAME)))
    record.status = "running"  # what a kill leaves behind
    record.write()
    drive(open_workshop(study(seeds=[0], arms={"sam": {}})))
    again = read_record(record.path)
    assert again.status == "finished"
    assert again.metrics == record.metrics


def test_changed_settings_are_refused_for_runs_that_are_done(study):
    drive(open_workshop(study(seeds=[0])))
    with pytest.raises(StudyChangedError, match=r"--sleep=0\.0.*output_dir, or delete that folder"):
        open_workshop(study(seeds=[0], arms={"adamw": {}, "sam": {"sleep": 0.0}})).check_unchanged()
    open_workshop(study(seeds=[0, 5])).check_unchanged()


def test_a_study_that_was_moved_is_the_same_study(study, tmp_path):
    drive(open_workshop(study(seeds=[0])))
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    moved = open_workshop(study(seeds=[0], output_dir=str(tmp_path / "elsewhere")))
    moved.check_unchanged()
    assert counts(moved)["finished"] == 2


def test_a_moved_run_keeps_its_checkpoints_and_a_changed_one_does_not(tmp_path):
    checkpoint = tmp_path / "checkpoint-5"
    for argv, stays in (
        (["--lr=1", "--output_dir=a"], True),
        (["--lr=1", "--output_dir=b"], True),
        (["--lr=2"], False),
    ):
        checkpoint.mkdir(exist_ok=True)
        prepare(tmp_path, {"argv": argv})
        assert checkpoint.exists() is stays, argv


def test_a_run_that_was_killed_while_it_was_measured_is_only_measured(study, monkeypatch):
    workshop = open_workshop(study(seeds=[0], arms={"sam": {}}, sharpness={"measures": ["sam"]}))
    (run,), folder = workshop.runs, workshop.folder(workshop.runs[0])
    prepare(folder, workshop.job(run))

    def killed(*_):
        raise SystemExit

    monkeypatch.setattr(execution, "_measure", killed)
    with pytest.raises(SystemExit):
        execution.execute(folder)
    workshop.forget(run)
    assert list(workshop.open_runs()) == [run]
    with pytest.raises(StudyChangedError):
        open_workshop(study(seeds=[0], arms={"sam": {"sleep": 0.0}}, sharpness=True)).check_unchanged()

    measured = []
    monkeypatch.setattr(execution, "_measure", lambda folder, task, settings: measured.append((task, settings)))
    execution.execute(folder)
    workshop.forget(run)
    assert workshop.has_ended(run)
    assert measured == [("sharpness", {"measures": ["sam"]})]
    assert (folder / "begun.txt").read_text().count("\n") == 1
    assert not list(folder.glob("*.safetensors"))


def test_a_run_whose_measures_end_its_process_stays_finished_without_them(study, tmp_path):
    workshop = open_workshop(study(seeds=[0], arms={"sam": {}}))
    (run,), folder = workshop.runs, workshop.folder(workshop.runs[0])
    drive(workshop)
    (folder / "unmeasured").touch()
    (folder / "deaths.txt").write_text("2")
    count_death(folder, Ending("killed by signal 9"))
    workshop.forget(run)
    assert workshop.record(run).status == "finished"


def test_an_empty_count_of_deaths_is_none(tmp_path):
    (tmp_path / "deaths.txt").touch()  # as a full disk leaves it
    count_death(tmp_path, Ending("killed"))
    assert (tmp_path / "deaths.txt").read_text() == "1"


def test_a_base_configuration_may_be_moved_but_not_edited(study, tmp_path):
    for name in ("old", "new"):
        (tmp_path / f"{name}.yaml").write_text("lr: 1e-3\n")

    def opened(config, lr="1e-3"):
        workshop = open_workshop(study(seeds=[0], config=f"{config}.yaml"))
        workshop.bases = {"toy": {"lr": lr}}
        return workshop

    drive(opened("old"))
    opened("new").check_unchanged()
    with pytest.raises(StudyChangedError, match=r"was run with other settings \(lr\)"):
        opened("old", lr="1e-4").check_unchanged()


@pytest.mark.slow
def test_the_runs_of_a_killed_driver_end_with_it_and_the_next_one_makes_them_again(study, tmp_path):
    """No run is lost; none begins twice but those that were under way, and these only after their first end."""
    path, out = study(seeds=list(range(3)), settings={"sleep": 1.0}), tmp_path / "out"
    killed = start_driver(path, tmp_path, "workers=2")
    try:
        wait_for(lambda: len(begun(out)) >= 4, "the third and fourth run to begin")
        workshop = open_workshop(path)
        with pytest.raises(StudyInUseError, match=rf"out is driven by process {killed.pid} on "):
            drive(workshop)
        standing = standing_of(workshop, Choice())
        assert (standing.total, len(standing.under_way), standing.queued) == (6, 2, 0)
        assert re.search(r"running: runs/toy/clean/steps/adamw/seed-1: .*, process \d+", describe_standing(standing))
    finally:
        killed.kill()
        killed.wait()
    interrupted = {str(workshop.folder(run)) for run in workshop.runs if run.folder in standing.under_way}
    said = []
    drive(open_workshop(path), report=lambda run, what: said.append(what))
    records, problems = find_records(out)
    assert not problems
    assert [run.status for run in records] == ["finished"] * 6
    twice = {folder for folder, times in begun(out).items() if times == 2}
    assert twice <= interrupted
    assert set(begun(out).values()) <= {1, 2}
    assert said.count("attached") + said.count("will be rerun: its driver was ended") >= len(twice)
    assert not list(out.rglob("submission.json"))
    assert not list(out.rglob("deaths.txt"))  # nothing of it was the fault of a run


def wait_for(condition, what, seconds=240):
    """What `condition` returns once it is true."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    return pytest.fail(f"waited {seconds} s for {what}")


def test_a_second_driver_is_refused_until_the_first_has_ended(study, tmp_path):
    workshop = open_workshop(study(seeds=[0]))
    with study_lock(tmp_path / "out"), pytest.raises(StudyInUseError, match="--status shows the state of its runs"):
        drive(workshop)
    assert not begun(tmp_path)


def test_trials_come_first_choose_on_validation_and_win(study, tmp_path):
    tuning = {"trials": 6, "space": {"learning_rate": {"low": 0.0001, "high": 1.0, "log": True}}}
    path = study(tuning=tuning, seeds=[0])
    workshop = open_workshop(path)
    drive(workshop)
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
    drive(open_workshop(path))
    open_workshop(path).check_unchanged()
    assert begun(tmp_path) == before
