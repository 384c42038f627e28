"""Two processes under DDP on the path that an accelerator takes."""

from __future__ import annotations

import pytest
import torch
from distributed import runs
from distributed.launching import Launched
from distributed.runs import SCOPES
from distributed.whole_list_runs import SETTING
from integration import tiny


@pytest.fixture(scope="module")
def ddp(tmp_path_factory) -> Launched:
    return Launched(tmp_path_factory.mktemp("whole_lists"), "distributed.whole_list_runs.in_whole_lists")


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("scope", SCOPES)
def test_a_vanishing_rho_is_bitwise_the_stock_trainer(ddp, scope, rank):
    ours, stock = ddp(f"matrix {SETTING} {scope}", rank), ddp(f"matrix {SETTING} None", rank)
    assert len(ours["passes"]) == 2 * len(stock["passes"])
    assert torch.equal(ours["trajectory"], stock["trajectory"])
    assert tiny.same_bits(ours["state"], stock["state"])


@pytest.mark.parametrize("scope", SCOPES)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(ddp, scope):
    run = ddp(f"resumed {scope}")
    assert torch.equal(run["second_half"], run["trajectory"][3:])


@pytest.mark.parametrize("scope", SCOPES)
def test_gradients_that_are_views_of_buckets_change_nothing(ddp, scope):
    left, right = (ddp(f"wrapped {scope} {wrapping}") for wrapping in ("default", "gradient as bucket view"))
    assert torch.equal(left["trajectory"], right["trajectory"])


def test_global_scope_is_the_run_of_one_process(ddp, tmp_path):
    alone = runs.same_examples("global", 8, 1, tmp_path)
    torch.testing.assert_close(ddp("examples global 2x2")["trajectory"], alone["trajectory"], rtol=1e-11, atol=1e-12)


def test_ranks_hold_the_same_bits_after_every_step_of_every_run(ddp):
    assert len(ddp.names) > 15
    for name in ddp.names:
        assert torch.equal(ddp(name, 0)["trajectory"], ddp(name, 1)["trajectory"]), name
