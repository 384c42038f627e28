"""What the library needs, and what only some of its tasks need: shown in processes in which the rest cannot be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OPTIONAL = ("peft", "datasets", "evaluate", "dill", "multiprocess", "trl", "optuna", "sklearn", "scipy", "pandas")
OPTIONAL += ("matplotlib", "jinja2", "PIL", "deepspeed", "torchvision", "pyarrow", "pytorch_optimizer")
DATA = ("datasets", "evaluate", "dill", "multiprocess", "pyarrow", "trl", "optuna", "peft", "pytorch_optimizer")
# None in `sys.modules` is a package that is not there, for whoever imports it and for whoever asks whether it can be.
WITHOUT = "import sys; sys.modules.update(dict.fromkeys({names!r}))\n"
TRAINING = """
import torch
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification
import hf_sam
model = ViTForImageClassification(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8,
    patch_size=4, intermediate_size=8, num_labels=2))
before = model.classifier.weight.detach().clone()
data = [{"pixel_values": torch.randn(3, 8, 8), "labels": i % 2} for i in range(8)]
args = TrainingArguments(sys.argv[1], max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True,
    dataloader_pin_memory=False)
trainer = hf_sam.SAMTrainer(model=model, args=args, train_dataset=data, sam_config=hf_sam.SAMConfig(method="gsam"))
trainer.train()
trainer.save_model()
assert trainer.state.global_step == 2 and not torch.equal(before, model.classifier.weight)
assert any("sam_passes" in entry for entry in trainer.state.log_history)
"""
BENCHMARK = """
from hf_sam.tasks.benchmark import main
rows = main(sys.argv[2:] + ["--output_dir", sys.argv[1]])
assert rows.variant.tolist() == ["trainer", "sam"] and (rows.step_seconds > 0).all()
"""
COLLECTION = """
import pytest
sys.exit(pytest.main(["tests/gpu", "-m", "gpu or multi_gpu", "--collect-only", "-q", "-p", "no:cacheprovider"]))
"""


def run(code: str, names: tuple[str, ...], *words: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", WITHOUT.format(names=names) + code, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_hard_dependencies_are_what_training_needs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {word.partition(">")[0] for word in project["dependencies"]}
    assert names == {"torch", "transformers", "accelerate", "safetensors"}


def test_training_needs_torch_transformers_accelerate_and_safetensors_alone(tmp_path):
    run(TRAINING, OPTIONAL, str(tmp_path))


def test_a_benchmark_on_made_up_data_needs_no_library_for_data(tmp_path):
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    small |= {"image_size": 8, "patch_size": 4}
    words = [
        "--task=image-classification",
        "--synthetic=true",
        f"--config_overrides={json.dumps(small)}",
        "--use_cpu=true",
    ]
    words += ["--steps=2", "--warmup=1", "--methods", "sam", "--per_device_train_batch_size=2", "--disable_tqdm=true"]
    run(BENCHMARK, DATA, str(tmp_path), *words)


@pytest.mark.slow
def test_the_tests_on_gpus_are_collected_without_libraries_for_data():
    run(COLLECTION, tuple(name for name in DATA if name != "peft"))
