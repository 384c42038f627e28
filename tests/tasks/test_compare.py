"""`recipes/compare.py` with a real recipe on the embedded digits."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from hf_sam.experiments.execution import execute
from hf_sam.experiments.json_files import write_json
from hf_sam.experiments.records import find_records
from hf_sam.experiments.workshop import counts
from hf_sam.tasks import compare
from hf_sam.tasks.command_line.errors import UserError
from hf_sam.tasks.command_line.parsers import parse_study

ROOT = Path(__file__).parents[2]

STUDY = {
    "recipe": "image_classification",
    "config": str(ROOT / "configs/image_classification/digits.yaml"),
    "task": "digits",
    "settings": {"max_steps": 6, "train_samples": 64, "logging_steps": 2, "use_cpu": True},
    "conditions": {"noise 0.4": {"label_noise": 0.4}},
    "arms": {"adamw": {"sam_rho": 0}, "sam": {"sam_rho": 0.05}},
}


@pytest.fixture
def study(tmp_path):
    def write(**changes):
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump({**STUDY, **changes}, sort_keys=False))
        return str(path)

    return write


def numbers(folder):
    """What a comparison measured, without what depends on the clock."""
    records, problems = find_records(folder)
    assert not problems
    assert all(run.status == "finished" for run in records), [run.error for run in records]
    losses = {(run.arm, run.seed): [entry["loss"] for entry in run.curves if "loss" in entry] for run in records}
    return {(run.arm, run.seed): run for run in records}, losses


def test_pairs_are_real_and_a_rerun_gives_the_same_numbers(study, tmp_path):
    """
    A perturbation of size 1e-30 changes no weight, so the arm that has it must end where AdamW does, to the last bit:
    if it began from the same head, saw the same examples in the same order with the same wrong labels, and was tested
    on the same split. Another seed ends elsewhere.
    """
    path = study(arms={"adamw": {"sam_rho": 0}, "none": {"sam_rho": 1e-30}}, seeds=[0, 1])
    report = compare.main([path, "--output_dir", str(tmp_path / "first")])
    compare.main([path, "--output_dir", str(tmp_path / "again"), "--seeds", "0"])
    runs, losses = numbers(tmp_path / "first")
    for seed in (0, 1):
        assert losses["adamw", seed] == losses["none", seed]
        assert runs["adamw", seed].metrics == runs["none", seed].metrics
        assert runs["adamw", seed].model["fingerprint"] == runs["none", seed].model["fingerprint"]
        assert runs["adamw", seed].data == runs["none", seed].data
        assert (runs["adamw", seed].passes, runs["none", seed].passes) == (6, 12)
    first, second = runs["adamw", 0], runs["adamw", 1]
    assert losses["adamw", 0] != losses["adamw", 1]
    assert first.model["fingerprint"] != second.model["fingerprint"]
    assert first.data["train"]["fingerprint"] != second.data["train"]["fingerprint"]
    assert first.data["test"]["fingerprint"] == second.data["test"]["fingerprint"]
    again, losses_again = numbers(tmp_path / "again")
    assert len(again) == 2
    for key, run in again.items():
        assert losses_again[key] == losses[key]
        assert run.metrics == runs[key].metrics
    text = report.with_name("report.md").read_text()
    assert "equivalent. none and adamw differ by less than" in text
    assert "Not a true pair" not in text


def test_an_arm_with_early_stopping_ends_with_its_best_checkpoint(study, tmp_path):
    """At this learning rate every step makes the model worse."""
    worse = {"sam_rho": 0, "learning_rate": 3, "warmup_steps": 0, "eval_strategy": "steps", "eval_steps": 1}
    stopped = {**worse, "load_best_model_at_end": True, "metric_for_best_model": "nll"}
    path = study(
        arms={"final": worse, "stopped": stopped},
        settings={**STUDY["settings"], "validation_size": 0.3},
        question={"control": "final", "treatment": "stopped"},
        checkpoint_every=1,
        seeds=[0],
    )
    compare.main([path, "--output_dir", str(tmp_path / "out")])
    runs, _ = numbers(tmp_path / "out")
    validated = [entry["eval_nll"] for entry in runs["final", 0].curves if "eval_nll" in entry]
    assert min(validated) < validated[-1]
    assert runs["stopped", 0].metrics["nll"] < runs["final", 0].metrics["nll"]
    assert not list((tmp_path / "out").rglob("checkpoint-*"))


def test_the_plan_is_printed_without_running_anything(study, tmp_path, capsys):
    arms = {
        "adamw": {"sam_rho": 0},
        "late": {"sam_method": "late", "sam_rho": 0.1, "sam_start": 0.5},
        "sam": {"sam_rho": 0.1},
    }
    path = study(arms=arms, budgets=["steps", "passes"], seeds=[0, 1, 2])
    assert compare.main([path, "--output_dir", str(tmp_path / "out"), "--plan"]) is None
    printed = capsys.readouterr().out
    assert "15 runs in" in printed  # 3 seeds x (adamw 2, late 2, sam 1 that serves both budgets)
    assert "remaining time unknown until one has finished" in printed
    rows = {tuple(line.split()[:3]): line.split() for line in printed.splitlines()}
    assert rows["late", "equal", "passes"][3:5] == ["1.33", "2"]
    assert (
        "With 3 seeds, a difference is significant (paired t-test at 5 %) if it exceeds 2.5 standard deviations"
        in printed
    )
    assert "A true difference of 3.3 is detected four times in five; with 6 seeds, one of 1.4" in printed
    compare.main([path, "--output_dir", str(tmp_path / "out"), "--plan", "--seeds", "0"])
    assert "With one seed, no verdict is possible" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_an_arm_that_names_a_method_has_that_methods_rho_and_the_plan_says_so(study, tmp_path, capsys):
    arms = {
        "adamw": {"sam_rho": 0},
        "sam": {"sam_rho": 0.05},
        "asam": {"sam_method": "asam"},
        "msam": {"sam_method": "msam", "sam_rho": 0.2},
    }
    path = study(arms=arms, settings={**STUDY["settings"], "sam_rho": 0.01})
    compare.main([path, "--output_dir", str(tmp_path / "out"), "--plan"])
    printed = capsys.readouterr().out
    assert "adamw: no SAM: rho 0 (arm adamw)" in printed
    assert "sam: method sam (default), rho 0.05 (arm sam)\n" in printed
    assert "asam: method asam (arm asam), rho 0.5 (default of asam)" in printed
    assert "left out: sam_rho=0.01 of settings of the study, which was for sam" in printed
    assert "msam: method msam (arm msam), rho 0.2 (arm msam)" in printed
    workshop = compare.open_workshop(compare.plan_of(parse_study([path])))
    made = {run.arm: " ".join(workshop.job(run)["argv"]) for run in workshop.runs}
    assert "--sam_rho" not in made["asam"]
    assert "--sam_rho=0.2" in made["msam"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"arms": {"sam": {"sam_rhoo": 1}}},
            "arm sam: 'sam_rhoo' is not an argument of this recipe. Did you mean 'sam_rho'",
        ),
        ({"arms": {"sam": {"sam_rho": -1}}}, "arm sam: .*rho=-1"),
        ({"arms": {"sam": {"sam_scope": "micro"}}}, "arm sam: sam_scope has no effect with sam_rho=0"),
        ({"arms": {"sam": {"sam_method": "sma"}}}, "arm sam: sam_method='sma' is unknown. Did you mean 'sam'"),
        ({"conditions": {"noise": {"label_noise": 1.5}}}, "condition noise, arm adamw: label_noise=1.5"),
        (
            {"question": {"metric": "acuracy"}},
            "metric='acuracy' is not measured by .* Did you mean 'accuracy'.* Allowed: .*f1_macro",
        ),
        ({"question": {"metric": "train_nll"}}, "metric='train_nll' is not measured by image_classification"),
        ({"settings": {"subset_seed": 4}}, "settings of the study: subset_seed is set for each run, from `seeds`"),
        ({"settings": {"save_strategy": "epoch"}}, "save_strategy is set for each run, from `checkpoint_every`"),
        ({"arms": {"sam": {"output_dir": "x"}}}, "arm sam: output_dir is set for each run, from `output_dir`"),
        ({"settings": {"validation_samples": 4}}, "validation_samples=4 needs a validation split"),
        ({"sharpness": {"measure": ["sam"]}}, "sharpness: 'measure' is not an argument .* Did you mean 'measures'"),
        ({"sharpness": {"num_examples": 0}}, "sharpness: num_examples=0 must be at least 1"),
        ({"recipe": "digits"}, "recipe 'digits' does not exist. Allowed: .*image_classification"),
    ],
)
def test_an_arm_that_its_recipe_would_refuse_is_refused_before_anything_runs(study, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        compare.main([study(**changes), "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_runs_that_fail_end_in_an_error_with_the_reason_and_the_remedy(study, tmp_path, capsys):
    """All of them, and then one of two: that one is reported without comparing an arm with itself."""
    wrong = {"settings": {**STUDY["settings"], "label_column": "lable"}, "seeds": [0]}
    with pytest.raises(
        UserError, match=r"2 of 2 runs failed: UserError: label_column=lable is not a column .*2 x.*--retry_failed"
    ):
        compare.main([study(**wrong), "--output_dir", str(tmp_path / "out")])
    assert "UserError: label_column=lable is not a column" in capsys.readouterr().out
    assert not (tmp_path / "out/report").exists()
    with pytest.raises(UserError, match="2 of 2 runs failed"):
        compare.main([study(**wrong), "--output_dir", str(tmp_path / "out"), "--report"])
    arms = {"adamw": {"sam_rho": 0}, "sam": {"sam_rho": 0.05, "label_column": "lable"}}
    with pytest.raises(UserError, match=r"1 of 2 runs failed: .*fix the cause"):
        compare.main([study(arms=arms, seeds=[0]), "--output_dir", str(tmp_path / "part")])
    text = (tmp_path / "part/report/report.md").read_text()
    assert "No answer yet: only adamw has finished runs." in text
    assert "better accuracy than adamw" not in text
    del arms["sam"]["label_column"]
    mended = [study(arms=arms, seeds=[0]), "--output_dir", str(tmp_path / "part"), "--retry_failed"]
    compare.main([*mended, "--plan"])
    assert "1 of 2 runs finished, 1 failed" in capsys.readouterr().out, "a plan removes nothing"
    compare.main(mended)
    assert "2 of 2 runs finished, 0 failed" in capsys.readouterr().out


def test_a_run_that_another_process_still_makes_is_not_marked_as_failed(study, tmp_path, monkeypatch):
    """As when a worker was suspended for so long that its run was taken over, and its process has not ended yet."""
    monkeypatch.setattr("hf_sam.tasks.output_folder.LOCK_SECONDS", 0.0)
    workshop = compare.open_workshop(compare.plan_of(parse_study([study(), "--output_dir", str(tmp_path / "out")])))
    run = workshop.runs[0]
    write_json(workshop.folder(run) / "run.json", workshop.job(run))
    with FileLock(workshop.folder(run) / "_run.lock"), pytest.raises(SystemExit):
        execute(workshop.folder(run))
    assert workshop.record(run) is None


def test_outputs_of_a_plain_trainer_stand_beside(study, tmp_path):
    theirs = tmp_path / "theirs" / "adafactor-seed-0"
    theirs.mkdir(parents=True)
    (theirs / "trainer_state.json").write_text('{"global_step": 6, "log_history": [{"loss": 1.0, "step": 6}]}')
    (theirs / "all_results.json").write_text('{"eval_accuracy": 0.5, "train_runtime": 3.0}')
    path = study(seeds=[0])
    folders = ["--external", str(tmp_path / "theirs")]
    text = compare.main([path, "--output_dir", str(tmp_path / "out"), *folders]).with_name("report.md").read_text()
    assert re.search(r"\| adafactor \| 1 \| 50.0 .*not paired", text)
    with pytest.raises(UserError, match=r"external=.*nowhere is not a folder"):
        compare.main([path, "--output_dir", str(tmp_path / "out"), "--external", str(tmp_path / "nowhere")])


def test_a_report_is_rewritten_as_runs_end_and_the_status_says_where_it_stands(study, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "REPORT_SECONDS", 0.0)
    monkeypatch.setattr(compare, "REPORT_SHARE", 1e9)
    arms = {"adamw": {"sam_rho": 0}, "sam": {"sam_rho": 0.05, "label_column": "lable"}}
    path = study(seeds=[0], arms=arms)
    written = []
    monkeypatch.setattr(compare, "report_on", lambda workshop, *_, **__: written.append(counts(workshop)))
    words = [path, "--output_dir", str(tmp_path / "out")]
    assert compare.main([*words, "--status"]) is None
    assert (
        "0 of 2 runs finished, 0 failed; remaining time unknown until one has finished.\n0 running"
        in capsys.readouterr().out
    )
    with pytest.raises(UserError, match="1 of 2 runs failed"):
        compare.main(words)
    assert [(count["finished"], count["failed"]) for count in written] == [(1, 0), (1, 1), (1, 1)]
    capsys.readouterr()
    assert compare.main([*words, "--status"]) is None
    printed = capsys.readouterr().out
    assert re.search(r"(?m)1 of 2 runs finished, 1 failed\.$", printed)
    assert re.search(r"failed: runs/digits/noise-0.4/steps/sam/seed-0: UserError: label_column=lable is no", printed)
    assert compare.main([*words, "--cancel"]) is None
    assert "Cancelled 0 jobs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "words", "message"),
    [
        ({"executor": "slrum"}, [], "executor='slrum' is unknown. Allowed: local, ray, slurm"),
        ({"executor": {"slrum": {}}}, [], "executor.slrum is unknown. Did you mean 'slurm'"),
        ({"executor": {"local": {"worker": 2}}}, [], "executor.local.worker is unknown.* Did you mean 'workers'"),
        ({"executor": {"kind": "ray", "ray": 3}}, [], "executor.ray=3 must map options to values"),
        ({}, ["--workers", "0"], "workers=0 must be at least 1"),
        ({}, ["--executor_options", "workers"], "executor_options='workers' is not a key=value pair"),
    ],
)
def test_an_executor_that_cannot_be_is_refused_before_anything_runs(study, tmp_path, changes, words, message):
    with pytest.raises((ValueError, UserError), match=message):
        compare.main([study(**changes), "--output_dir", str(tmp_path / "out"), *words])
    assert not list(tmp_path.rglob("run.json"))


@pytest.mark.slow
def test_two_workers_end_with_the_command_that_started_them(study, tmp_path):
    path = study(seeds=list(range(8)), settings={**STUDY["settings"], "max_steps": 400})
    words = [sys.executable, str(ROOT / "recipes" / "compare.py"), path, "--output_dir", str(tmp_path / "out")]
    command = subprocess.Popen([*words, "--workers", "2"], start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while len(list((tmp_path / "out").rglob("submission.json"))) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert len(group_of(command.pid)) > 3  # the driver, two runs and what starts them
        command.kill()
        command.wait()
        deadline = time.monotonic() + 30
        while left := group_of(command.pid):
            assert time.monotonic() < deadline, left
            time.sleep(0.1)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(command.pid, signal.SIGKILL)


def group_of(leader):
    """Command lines of all processes, none of them dead, that a command has started."""
    lines = subprocess.run(["ps", "-eo", "pgid=,stat=,args="], capture_output=True, text=True, check=True).stdout
    fields = [line.split(maxsplit=2) for line in lines.splitlines()]
    return [args for group, state, *args in fields if int(group) == leader and not state.startswith("Z")]


@pytest.mark.slow
def test_a_run_of_two_processes_is_measured_by_both(study, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    launcher = ["accelerate", "launch", "--config_file", str(ROOT / "configs" / "accelerate" / "cpu.yaml")]
    sharpness = {"measures": ["sam"], "rho": [0.05], "num_examples": 32}
    path = study(launcher=launcher, sharpness=sharpness, seeds=[0])
    report = compare.main([path, "--output_dir", str(tmp_path / "out")])
    records, _ = find_records(tmp_path / "out")
    assert [run.status for run in records] == ["finished"] * 2
    assert all(run.environment["hardware"]["processes"] == 2 for run in records)
    assert all(run.sharpness["sam_0.05"] > 0 for run in records)
    assert "SAM sharpness, rho = 0.05" in report.with_name("report.md").read_text()


def test_a_report_on_a_part_says_that_it_is_one(study, tmp_path):
    path = study(seeds=[0, 1])
    words = [path, "--output_dir", str(tmp_path / "out")]
    compare.main([*words, "--seeds", "0", "--arms", "adamw"])
    made = {record: record.read_text() for record in (tmp_path / "out").rglob("run_record.json")}
    assert len(made) == 1
    compare.main([*words, "--seeds", "0"])
    assert {record: record.read_text() for record in made} == made
    report = compare.main([*words, "--report"])
    text = report.with_name("report.md").read_text()
    assert "2 of 4 runs" in text
    assert "0 runs unfinished and 2 not started" in text
    assert "One seed gives no interval" in text


def test_some_arms_and_tasks_are_the_same_runs_as_in_the_whole(study, tmp_path, capsys):
    """The longest arm sets the passes of all others, whether it is among those chosen or not."""
    arms = {"adamw": {"sam_rho": 0}, "sam": {"sam_rho": 0.1}, "two": {"sam_rho": 0.1, "sam_ascent_steps": 2}}
    path = study(arms=arms, seeds=[0, 1], budgets=["passes"])
    words = [path, "--output_dir", str(tmp_path)]
    whole = compare.open_workshop(compare.plan_of(parse_study(words))).runs
    part = compare.open_workshop(compare.plan_of(parse_study(words)), arms=["sam", "adamw"]).runs
    assert part == [run for run in whole if run.arm != "two"]
    assert {run.arm: run.stretch for run in part} == {"adamw": 3, "sam": 1.5}
    compare.main([*words, "--plan", "--arms", "sam"])
    printed = capsys.readouterr().out
    assert "2 runs in" in printed
    assert "\n  sam " in printed
    assert "\n  two" not in printed
    with pytest.raises(UserError, match=r"--arms: 'Sam' is unknown. Did you mean 'sam'\? Allowed: adamw, sam, two"):
        compare.main([*words, "--arms", "Sam"])
    with pytest.raises(UserError, match=r"--tasks: 'nothing' is unknown\. Allowed: "):
        compare.main([*words, "--tasks", "nothing"])


@pytest.mark.parametrize("study_path", sorted((ROOT / "configs/comparison").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_committed_comparison_can_be_planned(study_path, capsys):
    assert compare.main([str(study_path), "--plan"]) is None
    assert " runs" in capsys.readouterr().out


def test_settings_of_every_run_can_be_overridden(study, tmp_path, capsys):
    path = study(arms={"adamw": {"sam_rho": 0}, "sam": {"sam_rho": 0.1}})
    with pytest.raises(UserError, match=r"--set takes key=value pairs, not 'max_steps'"):
        compare.main([path, "--plan", "--set", "max_steps"])
    with pytest.raises(UserError, match=r"seeds=\[1, 1\] must be distinct whole numbers"):
        compare.main([path, "--plan", "--seeds", "1", "1"])
    with pytest.raises(UserError, match=r"'max_step' is not an argument of this recipe. Did you mean 'max_steps'"):
        compare.main([path, "--plan", "--set", "max_step=3"])
    arguments = parse_study([path, "--set", "max_steps=3", "label_column=a=b"])
    assert (
        compare.plan_of(arguments).settings | {"max_steps": "3", "label_column": "a=b"}
        == compare.plan_of(arguments).settings
    )


def test_the_page_on_comparisons_names_every_committed_one():
    text = (ROOT / "docs/comparison.md").read_text()
    for path in (ROOT / "configs/comparison").glob("*.yaml"):
        assert f"configs/comparison/{path.name}" in text, path.name


def test_no_study_is_a_message():
    with pytest.raises(UserError, match="Give the YAML file of a comparison"):
        compare.main([])
