"""TRL's SFTTrainer with the mixin, on two processes under DDP and FSDP2."""

from __future__ import annotations

import pytest
import torch
from distributed.launching import Launched

METRICS = ("loss", "grad_norm", "num_tokens", "mean_token_accuracy", "entropy")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trl(tmp_path_factory) -> Launched:
    return Launched(tmp_path_factory.mktemp("trl"), "engines.trl_runs.two_processes")


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_vanishing_rho_is_bitwise_trls_own_trainer_with_its_metrics(trl, engine):
    ours, stock = trl(f"sft {engine} 1e-30"), trl(f"sft {engine} None")
    assert torch.equal(ours["trajectory"], stock["trajectory"])
    for key in METRICS:
        values = [[entry[key] for entry in run["log"] if key in entry] for run in (ours, stock)]
        assert len(values[0]) == 3, key
        assert values[0] == values[1], key


def test_shards_and_replicas_take_the_same_course(trl):
    sharded, whole, stock = trl("sft fsdp 0.1"), trl("sft ddp 0.1"), trl("sft ddp None")
    torch.testing.assert_close(sharded["trajectory"], whole["trajectory"], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(whole["trajectory"], stock["trajectory"], rtol=1e-4, atol=1e-4)


def test_ranks_hold_the_same_bits(trl):
    assert len(trl.names) == 6
    for name in trl.names:
        assert torch.equal(trl(name, 0)["trajectory"], trl(name, 1)["trajectory"]), name
