"""The driver before an engine that loses jobs, refuses them and answers late; and what a run itself checks."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

import pytest
import yaml
from filelock import FileLock, Timeout
from toy_driver import open_workshop

from hf_sam.experiments import executors
from hf_sam.experiments.driver import MAX_DEATHS, Driver, StudyInUseError, cancel_all, jobs_of, study_lock
from hf_sam.experiments.execution import (
    HELD_NAME,
    PLACE_NAME,
    SUBMISSION_NAME,
    execute,
    follow,
    has_ended,
    hold,
    take_up,
    write_place,
)
from hf_sam.experiments.executors import Choice, Ending, Executor, LocalExecutor, choose
from hf_sam.experiments.json_files import write_json
from hf_sam.experiments.ray_executor import answers
from hf_sam.experiments.records import RECORD_NAME, RunRecord, read_record
from hf_sam.experiments.standing import describe_standing, standing_of
from hf_sam.experiments.workshop import counts, records_of
from hf_sam.tasks.command_line.parsers import EXECUTORS


@dataclass
class Engine(Executor):
    """An engine that makes nothing: a test says what becomes of each job."""

    queue: int = 3
    refuses: bool = False
    jobs: dict = field(default_factory=dict)  # name: folder
    over: dict = field(default_factory=dict)  # name: how it ended
    most: int = 0

    kind = "engine"

    @property
    def room(self):
        return self.queue

    def submit(self, folders):
        if self.refuses:
            return []
        names = [f"engine {len(self.jobs) + index}" for index in range(len(folders))]
        self.jobs |= dict(zip(names, folders, strict=True))
        self.most = max(self.most, len(self.jobs) - len(self.over))
        return names

    def ended(self, jobs):
        return {name: self.over[name] for name in jobs if name in self.over}

    def wait(self):
        pass

    def cancel(self, jobs):
        self.over |= dict.fromkeys(jobs, Ending("cancelled"))

    def close(self):
        pass

    def finish(self, name, status="finished"):
        leave_record(self.jobs[name], status)
        self.over[name] = Ending("exit code 0")


def leave_record(folder, status="finished"):
    content = json.loads((folder / "run.json").read_text())
    metrics = {"accuracy": 0.5}
    RunRecord(**content["names"], status=status, metrics=metrics, path=folder / RECORD_NAME).write()


@pytest.fixture
def workshop_of(tmp_path):
    def write(**changes):
        study = {"recipe": "experiments.toy_task", "task": "toy", "arms": {"adamw": {}, "sam": {}}, "seeds": [0, 1, 2]}
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump({**study, "output_dir": str(tmp_path / "out"), **changes}, sort_keys=False))
        return open_workshop(path)

    return write


def test_the_engine_is_never_sent_more_than_it_can_queue_and_runs_keep_their_order(workshop_of):
    workshop, engine = workshop_of(), Engine([])
    driver = Driver(workshop, engine)
    ended = 0
    while driver.advance():
        engine.finish(f"engine {ended}")
        ended += 1
    assert (ended, engine.most) == (6, 3)
    assert list(engine.jobs.values()) == [workshop.folder(run) for run in workshop.runs]
    assert counts(workshop)["finished"] == 6


def test_a_record_that_is_seen_late_is_waited_for_and_a_job_without_one_is_made_again(workshop_of):
    workshop, engine = workshop_of(seeds=[0], arms={"sam": {}}), Engine([])
    engine.patience = 0.3
    driver = Driver(workshop, engine)
    driver.advance()
    engine.over["engine 0"] = Ending("gone")
    assert driver.advance()
    assert len(engine.jobs) == 1  # not submitted again yet
    time.sleep(0.3)
    assert driver.advance()
    assert len(engine.jobs) == 2
    engine.over["engine 1"] = Ending("gone")
    driver.advance()
    leave_record(engine.jobs["engine 1"])
    assert not driver.advance()
    assert counts(workshop)["finished"] == 1


def test_jobs_that_die_by_their_own_fault_fail_in_the_end_and_others_do_not(workshop_of):
    workshop, engine = workshop_of(seeds=[0]), Engine([], queue=2)
    driver = Driver(workshop, engine)
    for _ in range(MAX_DEATHS):
        driver.advance()
        for name in [name for name in engine.jobs if name not in engine.over]:
            is_first = engine.jobs[name] == workshop.folder(workshop.runs[0])
            engine.over[name] = Ending("preempted", is_own_fault=False) if is_first else Ending("out of memory")
    assert driver.advance()
    first, second = map(workshop.record, workshop.runs)
    assert first is None
    assert second.error["message"].startswith("ended 3 times without a result, last: out of memory")
    assert list(driver.jobs.values()) == workshop.runs[:1]


def test_a_job_that_was_lost_counts_against_a_run_only_if_that_had_begun(workshop_of):
    workshop, engine = workshop_of(seeds=[0]), Engine([], queue=2)
    Driver(workshop, engine).advance()
    first, second = engine.jobs.values()
    assert take_up(first, "engine 0")
    engine.over = dict.fromkeys(engine.jobs, Ending("its node was lost", is_own_fault=None))
    driver = Driver(workshop, engine)
    driver.jobs = dict(zip(engine.jobs, workshop.runs, strict=True))
    driver.collect()
    assert (first / "deaths.txt").read_text() == "1"
    assert not (second / "deaths.txt").exists()


def test_an_engine_that_takes_nothing_now_is_asked_again(workshop_of):
    workshop, engine = workshop_of(seeds=[0], arms={"sam": {}}), Engine([], refuses=True)
    driver = Driver(workshop, engine)
    assert driver.advance()
    engine.refuses = False
    assert driver.advance()
    engine.finish("engine 0")
    assert not driver.advance()


def test_a_driver_that_is_opened_again_attaches_to_what_runs_and_submits_nothing_twice(workshop_of, tmp_path):
    engine, said = Engine([]), []
    Driver(workshop_of(), engine).advance()
    engine.finish("engine 0")  # while no driver is there
    engine.over["engine 1"] = Ending("gone")
    lost = engine.jobs["engine 2"] / SUBMISSION_NAME
    lost.unlink()  # the driver died before it could write it, and the run has begun
    assert take_up(lost.parent, "engine 2")
    driver = Driver(workshop_of(), engine, lambda run, what: said.append((str(run.folder), what)))
    driver.attach()
    assert said == [
        ("runs/toy/clean/steps/sam/seed-0", "will be rerun: gone"),
        ("runs/toy/clean/steps/adamw/seed-1", "attached"),
    ]
    driver.advance()
    assert list(engine.jobs.values()).count(engine.jobs["engine 0"]) == 1
    assert list(engine.jobs.values()).count(engine.jobs["engine 1"]) == 2
    assert list(engine.jobs.values()).count(engine.jobs["engine 2"]) == 1


def test_a_job_whose_run_was_given_to_another_one_leaves_it_alone(tmp_path):
    write_json(tmp_path / SUBMISSION_NAME, {"id": "slurm 2"})
    assert not take_up(tmp_path, "slurm 1")
    assert not (tmp_path / PLACE_NAME).exists()
    assert take_up(tmp_path, "slurm 2")
    assert json.loads((tmp_path / PLACE_NAME).read_text())["id"] == "slurm 2"


def test_a_job_waits_for_one_that_its_cluster_has_lost_but_that_still_runs(tmp_path):
    earlier = FileLock(tmp_path / HELD_NAME)
    with earlier:
        assert not hold(tmp_path, 0.1)
    assert hold(tmp_path, 0.1)
    with pytest.raises(Timeout):
        earlier.acquire(timeout=0.1)


def test_further_processes_of_a_run_begin_after_the_first_one(tmp_path):
    write_place(tmp_path, "ray 1", 17, None)
    assert not follow(tmp_path, "ray 2", 0.1)
    write_place(tmp_path, "ray 2", 17, None)
    assert follow(tmp_path, "ray 2", 0.1)


def test_a_head_that_takes_no_connections_is_lost():
    with socket.socket() as head:
        head.bind(("127.0.0.1", 0))
        head.listen()
        address = f"127.0.0.1:{head.getsockname()[1]}"
        assert answers(address, tries=1)
    assert not answers(address, tries=1)


def test_runs_that_are_with_another_executor_are_not_made_here(workshop_of):
    Driver(workshop_of(), Engine([])).advance()
    with pytest.raises(
        StudyInUseError,
        match=r"belongs to job 0 of executor engine\. Continue with --executor engine, or cancel its jobs",
    ):
        Driver(workshop_of(), LocalExecutor([])).attach()


def test_a_study_can_be_cancelled_and_gone_on_with(workshop_of, monkeypatch, tmp_path):
    engine, workshop = Engine([]), workshop_of()
    monkeypatch.setattr(Choice, "make", lambda self, launcher: engine)
    Driver(workshop, engine).advance()
    write_place(engine.jobs["engine 0"], "engine 0", 17, "3")
    standing = standing_of(workshop, Choice("engine"))
    assert (len(standing.under_way), standing.queued) == (1, 2)
    assert "GPU 3, process 17, for 0.0 minutes" in describe_standing(standing)
    with study_lock(tmp_path / "out"), pytest.raises(StudyInUseError):
        cancel_all(workshop, Choice("engine"))
    assert cancel_all(workshop, Choice("engine")) == 3
    assert set(engine.over) == set(engine.jobs)
    assert not jobs_of(workshop_of(), Choice("engine"))


def test_trials_of_an_arm_wait_for_each_other_unless_they_are_parallel(workshop_of):
    for parallel, expected in ((1, ["adamw", "sam"]), (2, ["adamw", "adamw", "sam", "sam"])):
        tuning = {"trials": 3, "space": {"learning_rate": [0.1, 0.2, 0.3]}, "parallel": parallel}
        workshop = workshop_of(tuning=tuning, seeds=[0], output_dir=str(workshop_of().plan.output_dir / str(parallel)))
        engine = Engine([], queue=50)
        driver = Driver(workshop, engine)
        driver.advance()
        assert sorted(run.arm for run in driver.jobs.values()) == expected
        while driver.advance():
            engine.finish(next(name for name in engine.jobs if name not in engine.over))
        assert [folder.name for folder in engine.jobs.values()][-2:] == ["seed-0", "seed-0"]
        assert len(engine.jobs) == 8


def test_ten_thousand_planned_runs_are_planned_submitted_in_part_and_told_about_in_seconds(workshop_of, monkeypatch):
    started = time.process_time()
    workshop, engine = workshop_of(seeds=list(range(5000))), Engine([], queue=100)
    driver = Driver(workshop, engine)
    driver.attach()
    driver.advance()
    for name in list(engine.jobs)[:50]:
        engine.finish(name)
    driver.advance()
    assert (len(workshop.runs), engine.most, len(engine.jobs)) == (10_000, 100, 150)
    monkeypatch.setattr(Choice, "make", lambda self, launcher: engine)
    standing = standing_of(workshop_of(seeds=list(range(5000))), Choice("engine"))
    assert (standing.finished, standing.queued, standing.total) == (50, 100, 10_000)
    assert time.process_time() - started < 15


def test_a_study_that_is_done_is_looked_at_and_reported_with_two_readings_of_each_record(workshop_of, monkeypatch):
    """Planning, status and report of thousands of runs take seconds only if no record is read again and again."""
    workshop, engine = workshop_of(seeds=list(range(20))), Engine([], queue=100)
    driver = Driver(workshop, engine)
    driver.advance()
    monkeypatch.setattr(Choice, "make", lambda self, launcher: engine)
    for name, folder in engine.jobs.items():
        engine.finish(name)
        record = read_record(folder / RECORD_NAME)
        record.curves = [{"step": step, "loss": 1.0} for step in range(1, 201)] + [{"step": 200, "eval_loss": 1.0}]
        record.write()
    assert not driver.advance()

    readings, again = [], workshop_of(seeds=list(range(20)))
    monkeypatch.setattr(
        "hf_sam.experiments.workshop.read_record", lambda path: readings.append(path) or read_record(path)
    )
    monkeypatch.setattr("hf_sam.experiments.workshop.MANY_RUNS", 39)
    again.check_unchanged()
    assert counts(again)["finished"] == standing_of(again, Choice("engine")).finished == 40
    records = records_of(again)
    assert set(Counter(readings).values()) == {2}
    assert [entry["step"] for entry in records[0].curves][:2] == [1, 5]
    assert {len(record.curves) for record in records} == {51}  # 50 losses and the evaluation
    assert records[0].curves[-1] == {"step": 200, "eval_loss": 1.0}


@pytest.mark.parametrize(
    ("visible", "workers", "gpus", "launcher", "expected"),
    [
        ("", 2, None, [], [None, None]),
        ("0,1,2,3", 4, None, [], ["0", "1", "2", "3"]),
        ("4,5", 4, None, [], ["4", "5", "4", "5"]),  # shared
        ("0,1,2,3", 2, 2, ["accelerate", "launch"], ["0,1", "2,3"]),
        ("0,1", 1, None, ["accelerate", "launch"], [None]),  # all that there are
        ("0,1", 1, 4, [], ["0,1"]),
    ],
)
def test_gpus_are_shared_out_among_the_workers(monkeypatch, visible, workers, gpus, launcher, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    executor = LocalExecutor(launcher, workers=workers, gpus=gpus)
    assert [executor._gpus_of(slot) for slot in range(workers)] == expected


def test_a_process_number_that_was_given_to_another_process_is_not_a_run(tmp_path):
    executor = LocalExecutor([])
    host, pid, born = socket.gethostname(), os.getpid(), executors._born(os.getpid())
    jobs = [f"local {host} {pid} {born}", f"local {host} {pid} 1.0", f"local elsewhere {pid} {born}"]
    assert list(executor.ended(jobs)) == jobs[1:]


def test_a_run_that_has_ended_is_not_begun_again(workshop_of):
    workshop, engine = workshop_of(seeds=[0], arms={"sam": {}}), Engine([])
    Driver(workshop, engine).advance()
    folder = engine.jobs["engine 0"]
    leave_record(folder, "failed")
    assert has_ended(folder)
    execute(folder)
    assert not (folder / "begun.txt").exists()


def test_what_an_executor_needs_is_named(monkeypatch):
    for module, kind in (("ray", "ray"), ("submitit", "slurm")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ValueError, match=rf"pip install 'hf-sam\[{kind}\]'"):
            Choice(kind).make([])


@pytest.mark.parametrize(
    ("kind", "option", "least"),
    [("slurm", "queue=many", 1), ("slurm", "queue=0", 1), ("slurm", "minutes=-1", 0), ("local", "gpus=two", 0)],
)
def test_an_option_that_must_be_a_number_is_named(kind, option, least):
    with pytest.raises(ValueError, match=rf"executor\.{kind}\.{option[:4]}.* must be a number, at least {least}"):
        choose({}, kind, given=[option])


def test_the_command_line_knows_every_executor():
    assert tuple(executors.KINDS) == EXECUTORS
