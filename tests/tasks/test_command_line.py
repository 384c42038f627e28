"""The scripts as programs of their own, started the way people start them."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import stand_ins
import torch
from conftest import ROOT
from safetensors.torch import load_file

from hf_sam.tasks import TRAINING
from hf_sam.tasks.command_line import early
from hf_sam.tasks.compare import argument_types

QUIET = ["--use_cpu=true", "--disable_tqdm=true", "--per_device_train_batch_size=2", "--save_strategy=no"]
VIT = '{"image_size": 16, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}'


def command(*words: str) -> list[str]:
    return [sys.executable, *words]


def finished(words: list[str], **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment(), **kwargs)


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def recipe(name: str, folder: Path, request) -> list[str]:
    """The words after the interpreter for a two-step run of each recipe."""
    model, data = {
        "image_classification": ("vision", "images"),
        "text_classification": ("encoder", "texts"),
        "causal_lm": ("decoder", "corpus"),
        "seq2seq": ("text_to_text", "texts"),
        "token_classification": ("encoder", "words"),
    }[name]
    (folder / "data").mkdir()
    words = [
        f"recipes/{name}.py",
        f"--dataset={stand_ins.write(data, folder / 'data')}",
        f"--output_dir={folder / 'out'}",
    ]
    words += [f"--model_name_or_path={request.getfixturevalue(model)}", "--max_steps=2", "--sam_rho=0.01", *QUIET]
    return words + (["--activation_checkpointing=false", "--bf16=false"] if name == "causal_lm" else [])


EVERY_TIME = ("image_classification", "causal_lm")  # the others run inside this process in their own tests


@pytest.mark.parametrize(
    "name", [name if name in EVERY_TIME else pytest.param(name, marks=pytest.mark.slow) for name in TRAINING]
)
def test_recipe_runs_as_a_program(name, tmp_path, request):
    done = finished(command(*recipe(name, tmp_path, request)))
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out/all_results.json").read_text())["sam_passes"] == 2
    assert "test metrics" in done.stdout
    assert "SAM: method sam (default), rho 0.01 (command line)\n" in done.stdout
    assert "data: train 12, test 12 examples\n" in done.stdout or "data: test 12, train 12 examples\n" in done.stdout
    classes = name in ("image_classification", "text_classification", "seq2seq")
    assert ("always predicting no gives 50.0 % accuracy" in done.stdout) == classes
    assert ("always predicting O gives" in done.stdout) == (name == "token_classification")
    assert ("images checked" in done.stdout) == (name == "image_classification")
    assert ("max_length=" in done.stdout) == (name != "image_classification")
    assert "%|" not in done.stderr  # quiet where disable_tqdm asks for it


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["image_classification.py", "--sam_roh=1"],
            "'sam_roh' is not an argument of this recipe. Did you mean 'sam_rho'?",
        ),
        (
            ["text_classification.py", "--learning_rate", "fast"],
            "argument --learning_rate: invalid float value: 'fast'",
        ),
        (["causal_lm.py", "--packin=true"], "'packin' is not an argument of this recipe. Did you mean 'packing'?"),
        (["causal_lm.py", "no/where.yaml"], "Configuration file no/where.yaml does not exist."),
        (["compare.py", "no/where.yaml", "--plan"], "Configuration file no/where.yaml does not exist."),
        (
            ["seq2seq.py", "--label_wrods=a"],
            "'label_wrods' is not an argument of this recipe. Did you mean 'label_words'?",
        ),
        (["seq2seq.py", "--generation_num_beams=many"], "argument --generation_num_beams: invalid int value: 'many'"),
        (["token_classification.py", "--max_length", "long"], "argument --max_length: invalid int value: 'long'"),
    ],
)
def test_mistake_prints_one_line_and_fails_before_torch_is_imported(words, message, tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch is imported')")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    words = command(f"recipes/{words[0]}", *words[1:])
    done = subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, timeout=60, env={**environment(), "PYTHONPATH": path}
    )
    assert done.returncode == 2
    assert done.stderr.strip() == f"error: {message}"


@pytest.mark.parametrize(
    "words",
    [["--no_sam_replay_rng"], ["--no-dataloader-pin-memory"], ["--sam-rho", "1e-3"], ["--class_names", "a", "b"]],
)
def test_the_first_look_lets_pass_what_the_parser_takes(words):
    early.check("text_classification", words)


@pytest.mark.parametrize("name", TRAINING)
def test_the_first_look_knows_the_arguments_that_the_parser_has(name):
    fields = {field.name: field for kind in argument_types(name) for field in dataclasses.fields(kind) if field.init}
    assert early.arguments_of(name).keys() == fields.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINING)
def test_two_processes(name, tmp_path, request):
    launch = ["-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu.yaml"]
    done = finished(command(*launch, *recipe(name, tmp_path, request)))
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out/run_record.json").read_text())
    assert record["environment"]["hardware"]["processes"] == 2
    assert record["metrics"]["loss"] > 0
    assert len(pd.read_parquet(tmp_path / "out/test_predictions.parquet")) == stand_ins.ROWS, "each example once"


@pytest.mark.slow
def test_killed_and_resumed_by_the_same_command_is_the_uninterrupted_run(tmp_path):
    (tmp_path / "data").mkdir()
    stand_ins.write("images", tmp_path / "data")
    words = ["recipes/image_classification.py", f"--dataset={tmp_path / 'data'}", "--model_type=vit"]
    words += [f"--config_overrides={VIT}", "--augmentation=crop", "--max_steps=200", "--save_steps=13", "--sam_rho=0.1"]
    words += [*QUIET[:-1], "--resume_from_checkpoint=auto", "--save_total_limit=2"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert finished(command(*words, f"--output_dir={whole}")).returncode == 0

    process = subprocess.Popen(
        command(*words, f"--output_dir={broken}"),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not list(broken.glob("checkpoint-*/trainer_state.json")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (broken / "all_results.json").exists()
    assert json.loads((broken / "run_record.json").read_text())["status"] == "running"
    assert finished(command(*words, f"--output_dir={broken}")).returncode == 0

    weights = [load_file(folder / "model.safetensors") for folder in (whole, broken)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    results = [json.loads((folder / "all_results.json").read_text()) for folder in (whole, broken)]
    assert results[0]["test_nll"] == results[1]["test_nll"]
    assert results[0]["test_accuracy"] == results[1]["test_accuracy"]
    assert results[0]["train_loss"] == pytest.approx(results[1]["train_loss"], rel=1e-4)
    record = json.loads((broken / "run_record.json").read_text())
    assert record["passes"] == 400
    assert sum(part["end"] - part["begin"] for part in record["segments"]) == 200
    again = finished(command(*words, f"--output_dir={broken}"))  # as a requeued job
    assert again.returncode == 0
    assert "finished after 200 steps. Nothing to do." in again.stdout
    assert json.loads((broken / "run_record.json").read_text()) == record


@pytest.mark.slow
def test_a_second_run_in_the_folder_is_refused_and_ctrl_c_ends_the_first_in_a_line(tmp_path):
    (tmp_path / "data").mkdir()
    stand_ins.write("images", tmp_path / "data")
    words = ["recipes/image_classification.py", f"--dataset={tmp_path / 'data'}", "--model_type=vit", "--sam_rho=0.1"]
    words += [f"--config_overrides={VIT}", "--max_steps=100000", *QUIET[:-1], "--save_steps=50"]
    words += [f"--output_dir={tmp_path / 'out'}", "--save_total_limit=1"]
    with open(tmp_path / "errors.txt", "w") as errors:
        process = subprocess.Popen(
            command(*words), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=errors
        )
    try:
        while not list((tmp_path / "out").glob("checkpoint-*/trainer_state.json")):
            assert process.poll() is None
            time.sleep(0.05)
        second = finished(command(*words, "--overwrite_output_dir=true"))
        assert second.returncode == 2
        assert f"is in use by process {process.pid} on " in second.stderr
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    finally:
        process.kill()
        process.wait()
    printed = (tmp_path / "errors.txt").read_text()
    assert "Traceback" not in printed
    assert "--resume_from_checkpoint auto continues from" in printed.splitlines()[-1]
    assert json.loads((tmp_path / "out/run_record.json").read_text())["status"] == "interrupted"
