"""FSDP2 and tensor parallelism in two processes, on the path that an accelerator takes."""

from __future__ import annotations

import pytest
import torch
from distributed.launching import Launched
from engines import sharded_runs
from engines.sharded_runs import IN_WHOLE_LISTS
from engines.test_fsdp2 import assert_same_course

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Launched:
    return Launched(tmp_path_factory.mktemp("whole_lists"), "engines.sharded_runs.on_whole_lists")


@pytest.mark.parametrize(("layout", "choice"), [*(("fsdp", choice) for choice in IN_WHOLE_LISTS), ("tp", "gsam")])
def test_a_run_on_shards_is_the_run_of_one_process(two, layout, choice, tmp_path):
    alone = sharded_runs.chosen(layout, choice, 1, tmp_path)
    assert_same_course(two(f"{layout} {choice}"), alone, rtol=1e-10, atol=1e-12)


def test_a_vanishing_rho_is_bitwise_the_stock_trainer(two):
    ours, stock = two("vanishing True"), two("vanishing False")
    assert torch.equal(ours["trajectory"], stock["trajectory"])


@pytest.mark.parametrize("rank", [0, 1])
def test_shards_are_restored_bitwise_when_the_second_pass_raises(two, rank):
    run = two("interrupted", rank)
    assert torch.equal(run["before"], run["after"])


def test_ranks_hold_the_same_bits_after_every_step_of_every_run(two):
    assert len(two.names) > 8
    for name in two.names:
        assert torch.equal(two(name, 0)["trajectory"], two(name, 1)["trajectory"]), name
