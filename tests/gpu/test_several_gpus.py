"""DDP, FSDP2 and DeepSpeed on NCCL, two GPUs: the run of one process on the CPU; ranks alike; no rank left waiting."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from distributed.launching import Launched
from engines import deepspeed_runs, sharded_runs
from gpu.several_runs import CHOICES, SAM

pytestmark = pytest.mark.multi_gpu
NEEDS_DEEPSPEED = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs hf-sam[deepspeed]")


def launched(tmp_path_factory, table: str) -> Launched:
    found = torch.cuda.device_count()
    if found < 2:
        pytest.skip(f"needs two CUDA devices, and {found} is visible here")
    return Launched(tmp_path_factory.mktemp("gpus"), f"gpu.several_runs.{table}", on_gpus=True)


def needs_sharding_at_load(layout: str | None) -> None:
    if layout and not sharded_runs.SHARDS_AT_LOAD:
        pytest.skip("needs a model that is sharded as it is loaded: transformers 5.19")


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Launched:
    return launched(tmp_path_factory, "two_gpus")


@pytest.fixture(scope="module")
def zero(tmp_path_factory) -> Launched:
    return launched(tmp_path_factory, "two_gpus_under_deepspeed")


def assert_same_course(ours: dict, alone: dict):
    """The models normalise in float32, which rounds otherwise on another device."""
    torch.testing.assert_close(ours["trajectory"], alone["trajectory"], rtol=1e-5, atol=1e-6)
    for key in ("loss", "sam_ascent_grad_norm", "sam_perturbation_norm", "sam_perturbed_loss"):
        values = [[entry[key] for entry in run["log"] if key in entry] for run in (ours, alone)]
        assert len(values[0]) == 4, key
        assert values[0] == pytest.approx(values[1], rel=1e-4), key


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize(("engine", "layout"), [("ddp", None), ("fsdp", "fsdp")])
def test_two_gpus_take_the_course_of_one_process(two, engine, layout, choice, tmp_path):
    needs_sharding_at_load(layout)
    assert_same_course(two(f"{engine} {choice}"), sharded_runs.chosen(layout, choice, 1, tmp_path))


def test_accelerates_plugin_takes_the_course_of_one_process(two, tmp_path):
    assert_same_course(two("plugin"), sharded_runs.plugin(SAM, False, tmp_path))


def test_a_vanishing_rho_is_bitwise_the_stock_trainer(two):
    assert torch.equal(two("plugin vanishing")["trajectory"], two("plugin stock")["trajectory"])


def test_ranks_hold_the_same_bits_after_every_step_of_every_run(two):
    assert len(two.names) == (9 if sharded_runs.SHARDS_AT_LOAD else 6)
    for name in two.names:
        assert torch.equal(two(name, 0)["trajectory"], two(name, 1)["trajectory"]), name


def test_a_rank_that_fails_in_the_second_pass_ends_the_job_at_once(two):
    two.assert_ended_by_the_failure("plugin failing")


@NEEDS_DEEPSPEED
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_takes_the_course_of_one_process(zero, stage, choice, tmp_path):
    alone = deepspeed_runs.chosen(choice, 0, tmp_path)
    torch.testing.assert_close(
        zero(f"{choice} at stage {stage}")["trajectory"], alone["trajectory"], rtol=1e-5, atol=1e-6
    )
