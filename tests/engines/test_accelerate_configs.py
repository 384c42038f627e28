"""The configurations for `accelerate launch`: read by Accelerate itself, and started where a machine without GPUs can."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from accelerate.commands.config import load_config_from_file
from distributed.launching import Launched

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
# Name, number of processes, and whether they form several machines.
EXPECTED = {
    "cpu": ("MULTI_GPU", 2, 1),
    "ddp": ("MULTI_GPU", 8, 1),
    "deepspeed_zero2": ("DEEPSPEED", 8, 1),
    "deepspeed_zero3": ("DEEPSPEED", 8, 1),
    "fsdp2": ("FSDP", 8, 1),
    "multi_node_ddp": ("MULTI_GPU", 32, 4),
    "multi_node_fsdp2": ("FSDP", 32, 4),
    "one_gpu": ("NO", 1, 1),
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_it(path):
    config = load_config_from_file(str(path))  # which raises on keys it does not know
    assert (config.distributed_type.value, config.num_processes, config.num_machines) == EXPECTED[path.stem]
    if config.distributed_type == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_offload_params"] is False
    if config.distributed_type == "DEEPSPEED":
        assert config.deepspeed_config["zero_stage"] == int(path.stem[-1])
        assert config.deepspeed_config["offload_optimizer_device"] == "none"


def test_there_is_one_for_every_way_to_train():
    assert {path.stem for path in CONFIGS} == EXPECTED.keys()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"),
    [("cpu", "DDP"), ("fsdp2", "FSDP2"), ("deepspeed_zero2", "ZeRO-0, 1, 2"), ("deepspeed_zero3", "ZeRO-3")],
)
def test_two_processes_train_under_it(name, kind, tmp_path):
    if "deepspeed" in name and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs hf-sam[deepspeed]")
    config = ROOT / "configs" / "accelerate" / f"{name}.yaml"
    result = Launched(tmp_path, "engines.configured_runs.as_configured", config=config)("trained")
    assert result["kind"] == kind
    assert result["norms"] == pytest.approx([0.05] * 3, rel=0.02)  # ZeRO keeps bfloat16 weights
