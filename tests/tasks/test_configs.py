"""Every committed configuration loads, and trains two steps on a stand-in with the columns of its data set."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import stand_ins
from conftest import ROOT

from hf_sam import SAMConfig
from hf_sam.tasks import TRAINING
from hf_sam.tasks.command_line.arguments import read_config
from hf_sam.tasks.data.texts import GLUE

# The stand-in for data of the user's own, and the fixture that makes a small model.
TASKS = {
    "image_classification": ("images", "vision"),
    "text_classification": ("texts", "encoder"),
    "causal_lm": ("corpus", "decoder"),
    "seq2seq": ("texts", "text_to_text"),
    "token_classification": ("words", "encoder"),
}
CONFIGS = [path for task in TASKS for path in sorted((ROOT / "configs" / task).glob("*.yaml"))]
TINY_RESNET = '{"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic"}'
TINY_VIT = (
    '{"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, '
    '"image_size": 16, "patch_size": 8}'
)


def stand_in_for(path: Path, values: dict) -> str:
    if "glue_task" in values:
        return f"{'glue' if values['glue_task'] in GLUE else 'aps/super_glue'}/{values['glue_task']}"
    if "dataset" not in values:
        return TASKS[path.parent.name][0]
    name = values["dataset"]
    return f"{name}/{values['dataset_config']}" if name == "aps/super_glue" else name


def overrides(path: Path, values: dict, folder: Path, request) -> list[str]:
    """What makes a configuration small: other data with the same columns, another model, two steps."""
    model = TASKS[path.parent.name][1]
    data = folder / "data"
    data.mkdir()
    words = [
        f"--dataset={stand_ins.write(stand_in_for(path, values), data)}",
        f"--output_dir={folder / 'out'}",
        "--max_steps=2",
        "--per_device_train_batch_size=2",
        "--gradient_accumulation_steps=1",
        "--dataloader_num_workers=0",
        "--train_samples=8",
        "--save_strategy=no",
        "--logging_steps=2",
        "--disable_tqdm=true",
        "--use_cpu=true",
    ]
    if "test_samples" in values:
        words.append("--test_samples=8")
    if "validation_samples" in values:
        words.append("--validation_samples=8")
    if model == "text_to_text":
        words += ["--max_target_length=4", "--generation_num_beams=2"]
    if values.get("model_type") == "resnet":
        words.append(f"--config_overrides={TINY_RESNET}")
    if values.get("model_type") == "vit" and "dataset" in values:
        words.append(f"--config_overrides={TINY_VIT}")
    if "sam_start" in values:
        words.append("--sam_start=0.5")
    if "model_name_or_path" in values:
        words.append(f"--model_name_or_path={request.getfixturevalue(model)}")
    if "sam_m" in values:
        words.append("--sam_m=1")
    if int(values.get("image_size", 0)) > 32 or ("model_name_or_path" in values and model == "vision"):
        words.append("--image_size=16")
    return words


def test_there_are_configurations_for_every_task():
    assert {path.parent.name for path in CONFIGS} == set(TASKS) == set(TRAINING)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT reads it
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_config_trains_two_steps_on_a_stand_in(path, tmp_path, request):
    values = read_config(path)
    recipe = importlib.import_module(f"hf_sam.tasks.{path.parent.name}")
    trainer = recipe.main([str(path), *overrides(path, values, tmp_path, request)])
    assert trainer.state.global_step == 2
    default = SAMConfig(method=values.get("sam_method", "sam")).rho
    assert trainer.sam_config.rho == float(values.get("sam_rho", default))
    results = json.loads((tmp_path / "out/all_results.json").read_text())
    assert results["test_loss"] > 0
    two_passes = trainer.sam_config.rho > 0 and trainer.sam_config.method in ("sam", "asam", "gsam", "wsam", "friendly")
    assert results.get("sam_passes", 1.0) >= (2 if two_passes else 1)


def test_no_file_restates_the_default_rho():
    """There is one default, the package's; a file names a rho only where it is another one."""
    for path in CONFIGS:
        values = read_config(path)
        if "sam_rho" in values and not values.get("sam_method"):
            assert float(values["sam_rho"]) not in (SAMConfig().rho, 0.01), path
