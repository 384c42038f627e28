"""`recipes/find_rho.py`: through its real command line, killed and resumed, and what it refuses."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

from hf_sam.experiments.driver import make_one, prepare
from hf_sam.experiments.execution import execute
from hf_sam.experiments.executors import LocalExecutor
from hf_sam.experiments.records import RECORD_NAME, read_record
from hf_sam.reporting.document import escape_markdown
from hf_sam.rho_search.halving import Rung, SearchPlan
from hf_sam.rho_search.phases import Phase, RhoWorkshop, Search, passes_spent
from hf_sam.tasks import find_rho
from hf_sam.tasks.command_line.errors import UserError
from hf_sam.tasks.command_line.parsers import parse_search

DIGITS = str(ROOT / "configs/image_classification/digits.yaml")
TINY = [
    "--train_samples=64",
    "--max_steps=24",
    "--use_cpu=true",
    '--config_overrides={"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, '
    '"num_attention_heads": 2, "intermediate_size": 16}',
]
# Rung 1: 3 runs to step 2, 10 passes; confirmation: 2 seeds of 0 and the best to step 4, 24 passes.
SEARCH = ["--rhos", "0.01", "0.1", "--seeds=2", "--budget=1.45"]


def command(folder: Path, *words: str) -> list[str]:
    script = [sys.executable, str(ROOT / "recipes/find_rho.py"), "image_classification", DIGITS]
    return [*script, *TINY, f"--output_dir={folder}", *SEARCH, *words]


def start(folder: Path, log: Path) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("w") as out:
        return subprocess.Popen(command(folder), cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT)


def wait_for(condition, process: subprocess.Popen, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the search ended early"
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def forked(monkeypatch):
    """Runs are children of this process, which has everything imported; raises instead of starting the `stop_at`-th."""
    starts = {"made": 0, "stop_at": 0}

    def start_forked(folder, launcher, environment):
        starts["made"] += 1
        if starts["made"] == starts["stop_at"]:
            raise KeyboardInterrupt
        process = multiprocessing.get_context("fork").Process(target=execute, args=(folder,))
        process.start()
        return process

    monkeypatch.setattr("hf_sam.experiments.executors.start", start_forked)
    return starts


@pytest.fixture
def never_ends_early(monkeypatch):
    """Whether the first pair settles the question depends on the machine; all pairs are run."""
    monkeypatch.setattr("hf_sam.rho_search.phases.looks", lambda seeds: [])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork")
def test_an_interrupted_search_goes_on_as_planned_and_a_rho_that_diverges_is_kept(
    forked, never_ends_early, tmp_path, capsys
):
    """
    Rung 1: 4 runs to step 1, 7 passes. Rung 2: 3 go on to step 2, 5 passes. Confirmation: 2 seeds of 0 and the best to
    step 4, 24 passes.
    """
    folder = tmp_path / "find_rho"
    words = ["image_classification", DIGITS, *TINY, f"--output_dir={tmp_path}", "--metric=nll"]
    words += ["--rhos", "0.01", "0.1", "1e30", "--seeds=2", "--budget=1.5"]
    forked["stop_at"] = 7  # after the length, rung 1 and one run of rung 2
    with pytest.raises(SystemExit):
        find_rho.main(words)
    before = {path: path.read_text() for path in folder.glob("runs/*/*/*/run_record.json")}
    assert len(before) == 5
    kept = {path.parent.parent.parent.name for path in folder.rglob("checkpoint-1")}
    assert {"rho-0.01", "rho-0.1"} <= kept  # what goes on has its checkpoint
    assert "Interrupted. Repeat the command to resume." in capsys.readouterr().err

    found = find_rho.main(words)
    assert forked["made"] == 7 + 11 - 5
    assert {path: path.read_text() for path in before} == before  # not made again
    assert found["passes"] == {"allowed": 36, "planned": 36, "spent": 36}
    phases = [(run["rho"], run["seed"], run["begin"], run["end"], run["passes"]) for run in found["runs"]]
    assert phases[:4] == [(0, 42, 0, 1, 1), (0.01, 42, 0, 1, 2), (0.1, 42, 0, 1, 2), (1e30, 42, 0, 1, 2)]
    assert sorted(phases[4:7]) == [(0, 42, 1, 2, 1), (0.01, 42, 1, 2, 2), (0.1, 42, 1, 2, 2)]
    best = phases[-1][0]
    assert phases[7:] == [(0, 43, 0, 4, 4), (best, 43, 0, 4, 8), (0, 44, 0, 4, 4), (best, 44, 0, 4, 8)]
    (diverged,) = (row for row in found["curve"] if row["rho"] == 1e30)
    assert diverged["error"]
    assert diverged["value"] is None
    with (folder / "find_rho.csv").open() as file:
        assert [(row["stage"], float(row["rho"])) for row in csv.DictReader(file)] == [
            (row["stage"], row["rho"]) for row in found["curve"]
        ]
    printed = capsys.readouterr().out
    assert re.search(r"rung 1 +1 +1e\+30 +0 +- +- +failed, " + re.escape(diverged["error"]), printed)
    assert "Spent: 36 of 36 gradient passes." in printed
    assert found["sentence"] in printed
    with pytest.raises(UserError, match=r"contains a search with other settings \(metric\)"):
        find_rho.main([*words, "--metric=brier"])


@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_search_in_which_nothing_is_learnt_says_so_and_not_that_sam_does_not_help(forked, tmp_path, capsys):
    words = ["image_classification", DIGITS, *TINY, f"--output_dir={tmp_path}", "--learning_rate=1e-30"]
    words += ["--rhos", "0.01", "--seeds=2", "--budget=1"]
    found = find_rho.main(words)
    assert (found["recommended_rho"], found["learnt"]) == (0, False)
    assert 0.1 <= found["floor"] <= 0.2  # the most frequent digit
    assert "Nothing is learned yet after 4 of 24 steps" in found["sentence"]
    assert re.search(
        r"\(accuracy \d+\.\d %\).*give --budget 6, which pays for whole runs of 24 steps", found["sentence"]
    )
    assert "SAM does not help" not in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*fork")
@pytest.mark.parametrize(("learning_rate", "learned"), [("1e-30", False), ("1e-2", True)])
def test_a_language_model_has_learned_once_it_beats_the_model_before_its_first_step(
    forked, tmp_path, learning_rate, learned
):
    (tmp_path / "texts.csv").write_text("text\n" + "the cat sat on the mat\n" * 48)
    small = '{"n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 32}'
    words = ["causal_lm", "--trainer=plain", "--model_type=gpt2", f"--config_overrides={small}"]
    words += ["--tokenizer_name=bytes", f"--dataset={tmp_path / 'texts.csv'}", "--test_size=0.25", "--max_length=32"]
    words += ["--bf16=false", "--activation_checkpointing=false", "--use_cpu=true", "--max_steps=24"]
    words += [f"--learning_rate={learning_rate}", "--lr_scheduler_type=constant", f"--output_dir={tmp_path / 'out'}"]
    found = find_rho.main([*words, "--rhos", "0.01", "--seeds=2", "--budget=1"])
    assert found["learnt"] == learned
    assert not (tmp_path / "out/find_rho/untrained/trainer_state.json").exists()  # nothing trained, nothing saved
    assert found["floor"] == pytest.approx(5.56, abs=0.05)  # log 259: nothing is known of the next byte
    assert ("better than the model before its first step" in found["sentence"]) == (not learned)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_confirmation_in_which_runs_without_sam_failed_has_no_answer_until_they_are_retried(
    forked, never_ends_early, tmp_path
):
    words = ["image_classification", DIGITS, *TINY, f"--output_dir={tmp_path}", "--rhos", "0.01", "--seeds=2"]
    words += ["--budget=1"]
    before = find_rho.main(words)
    made, pair = forked["made"], list((tmp_path / "find_rho/runs").glob("*/seed-44/*/run_record.json"))
    assert len(pair) == 2
    for path in pair:
        record = read_record(path)
        record.fail(RuntimeError("the disk was full"))
        record.write()
    with pytest.raises(UserError, match=r"rho=0 and seed 44 failed.* no answer: the disk was full.*--retry_failed"):
        find_rho.main(words)
    assert forked["made"] == made
    after = find_rho.main([*words, "--retry_failed"])
    assert forked["made"] == made + 2
    assert (after["recommended_rho"], after["gain"]) == (before["recommended_rho"], before["gain"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork")
def test_the_values_are_around_the_rho_at_which_sharpness_is_a_tenth_of_the_loss(forked, tmp_path, capsys):
    words = ["image_classification", DIGITS, *TINY, f"--output_dir={tmp_path}", "--seeds=2", "--budget=2.5"]
    found = find_rho.main(words)
    curves = read_record(tmp_path / "find_rho/probe" / RECORD_NAME).curves
    ratios = [entry["sam_sharpness"] / entry["loss"] for entry in curves if "sam_sharpness" in entry]
    assert len(ratios) == 4
    middle = 0.005 * 0.1 / sorted(ratios)[1]
    values = sorted({run["rho"] for run in found["runs"]} - {0})
    assert values[2] == pytest.approx(middle, rel=0.3)
    assert [value / values[2] for value in values] == pytest.approx([0.1, 10**-0.5, 1, 10**0.5], rel=0.1)
    assert found["passes"]["spent"] == 8 + sum(run["passes"] for run in found["runs"]) <= found["passes"]["planned"]
    assert not list((tmp_path / "find_rho/probe").glob("checkpoint-*"))
    made = forked["made"]
    assert find_rho.main(words)["curve"] == found["curve"]
    assert forked["made"] == made
    (tmp_path / "find_rho/untrained/length.json").unlink()  # as if killed before it was written
    assert find_rho.main(words)["curve"] == found["curve"]
    assert forked["made"] == made + 1


@pytest.mark.slow
def test_a_search_that_is_killed_goes_on_and_counts_its_passes(tmp_path):
    folder, log = tmp_path / "out/find_rho", tmp_path / "log.txt"
    first = start(tmp_path / "out", log)
    confirming = folder / "runs/rho-0/seed-43/to-4/run.json"
    wait_for(confirming.exists, first)
    before = {path: path.read_text() for path in folder.glob("runs/*/seed-42/*/run_record.json")}
    assert len(before) == 3
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not (folder / "find_rho.json").exists()

    second = start(tmp_path / "out", log)
    assert second.wait(timeout=240) == 0, log.read_text()
    assert {path: path.read_text() for path in before} == before  # not made again
    printed, found = log.read_text(), json.loads((folder / "find_rho.json").read_text())
    pairs = 2 if len(found["runs"]) > 5 else 1  # one if it settles the question
    assert found["passes"] == {"allowed": pytest.approx(34.8), "planned": 34, "spent": 10 + 12 * pairs}
    assert [(run["rho"], run["seed"], run["begin"], run["end"], run["status"]) for run in found["runs"]][:3] == [
        (rho, 42, 0, 2, "finished") for rho in (0, 0.01, 0.1)
    ]
    assert [(run["seed"], run["end"], run["passes"]) for run in found["runs"][3:]] == [
        (43, 4, 4),
        (43, 4, 8),
        (44, 4, 4),
        (44, 4, 8),
    ][: 2 * pairs]
    assert found["recommended_rho"] in (0, 0.01, 0.1)
    assert found["sentence"] in printed
    assert found["command"].startswith("python recipes/image_classification.py ")
    assert found["command"].endswith(f"--sam_rho={found['recommended_rho']:g}")
    assert found["command"] in printed
    assert {row["stage"] for row in csv.DictReader((folder / "find_rho.csv").read_text().splitlines())} == {
        "rung 1",
        "confirmation",
    }
    page = (folder / "report.md").read_text()
    assert f"> **{escape_markdown(found['sentence'])}**" in page
    assert found["command"] in page
    assert (folder / "figures/search.svg").stat().st_size > 1000
    assert not list(folder.rglob("checkpoint-*"))
    assert not list(folder.rglob("*.safetensors"))
    validation = json.loads(next(iter(before.values())))["data"]
    assert set(validation) == {"train", "validation", "test"}
    scored = {run["metrics"]["accuracy"] * validation["validation"]["examples"] for run in found["runs"]}
    assert all(count == pytest.approx(round(count)) for count in scored)  # shares of the validation examples


@pytest.mark.slow
def test_a_promoted_run_is_the_run_that_was_never_paused(tmp_path):
    """Paused at step 3 and taken up again to step 6: the weights and the predictions of one that went there at once."""
    ends = []
    for name, phases in {
        "whole": [Phase(0, 0.1, 42, 0, 6)],
        "halves": [Phase(0, 0.1, 42, 0, 3), Phase(1, 0.1, 42, 3, 6)],
    }.items():
        plan = SearchPlan(24, (Rung(3, 2), Rung(6, 1)), 6, 2, 24, 0.0)
        settings = {"validation_size": 0.2}
        search = Search(tmp_path / name, [], "image_classification", (DIGITS, *TINY), settings, (0.1,), 42, None, plan)
        workshop = RhoWorkshop(search)
        for phase in phases:
            prepare(workshop.folder(phase), workshop.job(phase))
            make_one(workshop.folder(phase), LocalExecutor(search.launcher), RECORD_NAME)
            assert workshop.record(phase).status == "finished", workshop.record(phase).error
        weights = load_file(workshop.folder(phase) / "checkpoint-6/model.safetensors")
        ends.append((weights, workshop.scores(phase)["nll"].totals, passes_spent(workshop.record(phase))))
    (weights, nll, passes), (again, nll_again, passes_again) = ends
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert (nll == nll_again).all()
    assert (passes, passes_again) == (12, 6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([DIGITS], "Give the recipe first, such as image_classification"),
        (
            ["image_clasification", DIGITS],
            r"recipe 'image_clasification' does not exist. Did you mean 'image_classification'",
        ),
        (["image_classification", DIGITS, "--budget=-1"], "budget=-1 must be above 0"),
        (["image_classification", DIGITS, "--budget=nan"], "budget=nan must be above 0"),
        (["image_classification", DIGITS, "--seeds=1"], "seeds=1 must be at least 2"),
        (["image_classification", DIGITS, "--points=0"], "points=0 must be at least 1"),
        (["image_classification", DIGITS, "--reduction=1"], "reduction=1 must be at least 2"),
        (["image_classification", DIGITS, "--rhos", "0"], "rhos must be numbers above 0"),
        (["image_classification", DIGITS, "--rhos", "-1", "0.1"], "rhos must be numbers above 0"),
        (["image_classification", DIGITS, "--low=0"], "low=0 must be a number above 0"),
        (["image_classification", DIGITS, "--low=1"], r"low=1 must be below high=0\.2"),
        (["image_classification", DIGITS, "--metric=acuracy"], "metric=acuracy is not a mean.*Did you mean 'accuracy'"),
        (
            ["image_classification", DIGITS, "--learning_rat=1"],
            "'learning_rat' is not an argument of this recipe. Did you",
        ),
        (["image_classification", DIGITS, "--sam_method=sma"], "sam_method='sma' is unknown. Did you mean 'sam'"),
        (["image_classification", DIGITS, "--sam_rho_schedule=linear", "--sam_rho_min=1"], "sam_rho_min=1"),
        (
            ["image_classification", DIGITS, "--launcher=accelerate 'launch"],
            "launcher=.* is not a command: No closing quotation",
        ),
        (["image_classification", "--dataset=x", "--model_type=vit", "--streaming=true"], "Give --validation_split"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line_before_anything_runs(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        find_rho.main(words)
    assert not list(tmp_path.iterdir())


def test_values_that_share_a_folder_are_one_value():
    options, _ = parse_search(["image-classification", DIGITS, "--rhos", "0.1", "0.10000001", "0"])
    assert options.rhos == [0.1]


@pytest.fixture
def search_of_24_steps(monkeypatch):
    monkeypatch.setattr(find_rho, "find_length", lambda search, choice: 24)
    return ["image_classification", DIGITS, *TINY, "--plan"]


def test_the_plan_is_printed_without_running_anything(search_of_24_steps, tmp_path, capsys):
    words = [*search_of_24_steps, f"--output_dir={tmp_path / 'out'}"]
    assert find_rho.main([*words, *SEARCH, "--validation_samples=8"]) is None  # of the split that a search makes
    printed = capsys.readouterr().out
    assert "rung 1: 0 and 2 values up to step 2, seed 42" in printed
    assert (
        "confirmation: 0 and the best value up to step 4, 2 other seeds; fewer if the first settle the question"
        in printed
    )
    assert "Cost: at most 34 gradient passes, 1.42 ordinary runs; budget 1.45." in printed
    assert find_rho.main([*words, "--sam_method=asam", "--budget=9"]) is None
    assert "rho: 0, and 4 values around the one at which sharpness is a tenth" in capsys.readouterr().out
    assert find_rho.main([*words, "--sam_method=asam", "--budget=9", "--low=0.05", "--points=4"]) is None
    assert "rho: 0, 0.05, 0.17, 0.58, 2\n" in capsys.readouterr().out
    assert find_rho.main([*words, "--sam_method=msam", "--budget=9"]) is None  # which measures no sharpness
    assert "rho: 0, 0.3, 1, 3.5, 12\n" in capsys.readouterr().out
    late = ["--sam_method=late", "--budget=9", "--points=1"]  # which would not perturb in a probe
    assert find_rho.main([*words, *late]) is None
    assert "rho: 0, 0.005\n" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_budget_or_a_method_for_which_the_search_is_too_short(search_of_24_steps):
    with pytest.raises(UserError, match=r"budget=0\.1 .*at least 2\.42"):
        find_rho.main([*search_of_24_steps, "--budget=0.1"])
    with pytest.raises(UserError, match=r"method=late perturbs from step 18 of 24 on.*Raise the budget"):
        find_rho.main([*search_of_24_steps, "--sam_method=late", "--budget=4"])
