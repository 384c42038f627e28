"""Comparisons and the search for rho on the tasks that train sequence-to-sequence models and token classifiers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import stand_ins
import yaml
from conftest import ROOT

from hf_sam.experiments.records import find_records
from hf_sam.tasks import find_rho

TASKS = {
    "seq2seq": ("texts", "text_to_text", "accuracy", {"max_target_length": 4}),
    "token_classification": ("words", "encoder", "entity_f1", {}),
}
SMALL = {"max_steps": 4, "per_device_train_batch_size": 4, "use_cpu": True, "logging_steps": 2, "learning_rate": 1e-2}


def settings(task: str, folder: Path, request) -> dict:
    data, model, _, more = TASKS[task]
    (folder / "data").mkdir()
    where = stand_ins.write(data, folder / "data")
    return {"dataset": where, "model_name_or_path": request.getfixturevalue(model), **SMALL, **more}


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_a_comparison_through_its_command_line(task, tmp_path, request):
    metric = TASKS[task][2]
    study = {
        "recipe": task,
        "task": task,
        "settings": settings(task, tmp_path, request),
        "arms": {"adamw": {"sam_rho": 0}, "none": {"sam_rho": 1e-30}, "sam": {"sam_rho": 0.05}},
        "seeds": [0, 1],
        "question": {"metric": metric, "control": "adamw", "treatment": "sam"},
        "sharpness": {"measures": ["sam"], "rho": [0.05], "num_examples": 8},
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    words = [sys.executable, str(ROOT / "recipes/compare.py"), str(path), "--output_dir", str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=580)
    assert done.returncode == 0, done.stdout + done.stderr
    records, problems = find_records(tmp_path / "out")
    assert not problems
    runs = {(run.arm, run.seed): run for run in records}
    assert {run.status for run in records} == {"finished"}
    assert len(runs) == 6
    for seed in (0, 1):
        assert runs["adamw", seed].metrics == runs["none", seed].metrics
        assert runs["adamw", seed].sharpness == runs["none", seed].sharpness
        assert runs["sam", seed].metrics["loss"] != runs["adamw", seed].metrics["loss"]
    text = (tmp_path / "out/report/report.md").read_text()
    assert {"accuracy": "accuracy", "entity_f1": "entity F1"}[metric] in text


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_a_search_for_rho_compares_what_is_kept_of_each_example(task, tmp_path, request):
    words = [f"--{name}={value}" for name, value in {**settings(task, tmp_path, request), "max_steps": 24}.items()]
    search = ["--rhos", "0.01", "0.1", "--seeds=2", "--budget=1.45"]
    found = find_rho.main([task, *words, f"--output_dir={tmp_path / 'out'}", "--validation_size=0.34", *search])
    assert found["metric"] == "accuracy"
    assert 0 < found["floor"] < 1
    runs = json.loads((tmp_path / "out/find_rho/find_rho.json").read_text())["runs"]
    assert len(runs) in (5, 7)  # one pair in the confirmation if it settles the question, else two
