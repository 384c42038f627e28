"""Two real processes under DDP (gloo): what must equal the stock Trainer, one process, a loop by hand, and each other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distributed import runs
from distributed.launching import Launched
from distributed.runs import EVERY_SETTING, PAIRWISE, SCOPES, WRAPPINGS, Result
from distributed.traffic import COUNTED, in_units_of_the_parameters
from integration import tiny
from torch import Tensor

CPU_CONFIG = Path(__file__).parents[2] / "configs" / "accelerate" / "cpu.yaml"


@pytest.fixture(scope="module")
def ddp(tmp_path_factory) -> Launched:
    return Launched(tmp_path_factory.mktemp("ddp"), "distributed.runs.pairwise")


# --- the stock Trainer ---------------------------------------------------------------------------------------------


def assert_same_run(ours: Result, stock: Result):
    assert torch.equal(ours["trajectory"], stock["trajectory"])
    assert tiny.same_bits(ours["state"], stock["state"])
    for key in ("loss", "grad_norm", "learning_rate"):
        assert [e[key] for e in ours["log"] if key in e] == [e[key] for e in stock["log"] if key in e]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("setting", PAIRWISE, ids=str)
def test_a_vanishing_rho_is_bitwise_the_stock_trainer(ddp, setting, scope, rank):
    ours = ddp(f"matrix {setting} {scope}", rank)
    assert len(ours["passes"]) == 2 * len(ddp(f"matrix {setting} None", rank)["passes"])
    assert_same_run(ours, ddp(f"matrix {setting} None", rank))


@pytest.mark.slow
def test_a_vanishing_rho_is_bitwise_the_stock_trainer_in_every_setting(tmp_path):
    launched = Launched(tmp_path, "distributed.runs.every_setting", config=CPU_CONFIG)
    for setting in EVERY_SETTING:
        for scope in SCOPES:
            for rank in (0, 1):
                stock = launched(f"matrix {setting} None", rank)
                assert_same_run(launched(f"matrix {setting} {scope}", rank), stock)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("rank", [0, 1])
def test_batch_norm_statistics_of_each_rank_are_the_stock_trainers(ddp, scope, rank):
    ours, stock = ddp(f"batch norm {scope}", rank), ddp("batch norm None", rank)
    assert_same_run(ours, stock)
    assert ours["state"]["norm.num_batches_tracked"] == 3 * 2
    assert not torch.equal(ddp("batch norm None", 0)["state"]["norm.running_mean"], torch.zeros(8))


@pytest.mark.parametrize("scope", SCOPES)
def test_a_short_last_window_is_the_stock_trainers(ddp, scope):
    assert_same_run(ddp(f"short window {scope}"), ddp("short window None"))


@pytest.mark.parametrize("scope", SCOPES)
def test_a_stream_that_ends_within_a_window_is_the_stock_trainers(ddp, scope):
    # The stock Trainer averages over the ranks twice here, which rounds differently from once.
    ours, stock = ddp(f"stream {scope}"), ddp("stream None")
    torch.testing.assert_close(ours["trajectory"], stock["trajectory"], rtol=0, atol=1e-7)


# --- one process, and a loop by hand -------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (1, 8)])
@pytest.mark.parametrize("ranks", ["4x1", "2x2"])
def test_global_scope_divides_examples_among_ranks_without_changing_the_run(ddp, ranks, batch, accumulation, tmp_path):
    alone = runs.same_examples("global", batch, accumulation, tmp_path)
    together = ddp(f"examples global {ranks}")
    torch.testing.assert_close(together["trajectory"], alone["trajectory"], rtol=1e-11, atol=1e-12)
    for key in ("loss", "grad_norm", "sam_perturbed_loss", "sam_ascent_grad_norm", "sam_perturbation_norm"):
        values = [[e[key] for e in side["log"] if key in e] for side in (together, alone)]
        assert len(values[0]) == 4
        assert values[0] == pytest.approx(values[1], rel=1e-6)


@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (1, 8)])
@pytest.mark.parametrize("ranks", ["4x1", "1x4"])
def test_global_scope_weighs_every_token_of_all_ranks_alike(ddp, ranks, batch, accumulation, tmp_path):
    alone = runs.same_tokens(batch, accumulation, tmp_path)["trajectory"]
    torch.testing.assert_close(ddp(f"tokens {ranks}")["trajectory"], alone, rtol=1e-10, atol=1e-11)


def loss_gradients(model, rows: list[dict], parameters: list[Tensor]) -> list[Tensor | None]:
    loss = model(torch.stack([row["x"] for row in rows]), torch.tensor([row["labels"] for row in rows]))["loss"]
    return list(torch.autograd.grad(loss, parameters, allow_unused=True))


def total(gradients: list[list[Tensor | None]], factor: float) -> list[Tensor | None]:
    """The sum over the outer list, times `factor`; None where every part is None."""
    sums = []
    for parts in zip(*gradients, strict=True):
        used = [g for g in parts if g is not None]
        sums.append(sum(used) * factor if used else None)
    return sums


def by_hand(model, data, *, rho, batch, accumulation, steps, max_norm, lr, only=None) -> Tensor:
    """Algorithm 1 with one perturbation per rank over its accumulation window, g_s averaged over two ranks, SGD."""
    parameters = list(model.parameters())
    names = [name for name, _ in model.named_parameters()]
    trajectory = []
    for step in range(steps):
        averaged = []
        for rank in (0, 1):
            batches = []
            for k in range(accumulation):
                first = ((step * accumulation + k) * 2 + rank) * batch % len(data)
                batches.append(data[first : first + batch])
            g = total([loss_gradients(model, rows, parameters) for rows in batches], 1 / accumulation)
            g = [x if only is None or name.startswith(only) else None for name, x in zip(names, g, strict=True)]
            norm = torch.sqrt(sum((x**2).sum() for x in g if x is not None) + torch.zeros((), dtype=torch.float64))
            clean = [p.detach().clone() for p in parameters]
            with torch.no_grad():
                for p, x in zip(parameters, g, strict=True):
                    if x is not None:
                        p.add_(rho * x / norm)
            g_s = total([loss_gradients(model, rows, parameters) for rows in batches], 1 / accumulation)
            averaged.append(g_s)
            with torch.no_grad():
                for p, value in zip(parameters, clean, strict=True):
                    p.copy_(value)
        g_s = total(averaged, 1 / 2)
        norm = torch.sqrt(sum((x**2).sum() for x in g_s if x is not None))
        clip = min(1.0, max_norm / (norm + 1e-6))
        with torch.no_grad():
            for p, x in zip(parameters, g_s, strict=True):
                if x is not None:
                    p.sub_(lr * clip * x)
        trajectory.append(tiny.flat(model))
    return torch.stack(trajectory)


@pytest.mark.parametrize(("ranks", "batch", "accumulation"), [("4x1", 4, 1), ("2x2", 2, 2)])
def test_device_scope_is_one_perturbation_per_rank_and_the_mean_of_g_s(ddp, ranks, batch, accumulation):
    expected = by_hand(
        tiny.mlp(torch.float64),
        tiny.vectors(dtype=torch.float64),
        rho=0.1,
        batch=batch,
        accumulation=accumulation,
        steps=4,
        max_norm=0.1,
        lr=1e-2,
    )
    torch.testing.assert_close(ddp(f"examples device {ranks}")["trajectory"], expected, rtol=1e-12, atol=1e-13)


def test_a_layer_that_takes_part_on_one_rank_only_is_perturbed_there(ddp):
    model, data = tiny.mlp(torch.float64, branch=True), tiny.vectors(dtype=torch.float64)
    uses = [row["x"][0] > 0 for row in data[:16]]
    windows = [(uses[i] or uses[i + 2], uses[i + 1] or uses[i + 3]) for i in range(0, 16, 4)]
    assert any(a != b for a, b in windows), "the data must show a step in which the ranks differ"
    expected = by_hand(model, data, rho=0.1, batch=1, accumulation=2, steps=4, max_norm=1.0, lr=1e-2)
    torch.testing.assert_close(ddp("branch device")["trajectory"], expected, rtol=1e-12, atol=1e-13)


def test_a_layer_that_alone_is_perturbed_may_be_missing_on_one_rank(ddp):
    model, data = tiny.mlp(torch.float64, branch=True), tiny.vectors(dtype=torch.float64)
    expected = by_hand(model, data, rho=0.1, batch=1, accumulation=2, steps=4, max_norm=1.0, lr=1e-2, only="branch")
    torch.testing.assert_close(ddp("only the branch")["trajectory"], expected, rtol=1e-12, atol=1e-13)


# --- the ranks among each other ------------------------------------------------------------------------------------


def test_ranks_hold_the_same_bits_after_every_step_of_every_run(ddp):
    names = ddp.names
    assert len(names) > 60
    for name in names:
        assert torch.equal(ddp(name, 0)["trajectory"], ddp(name, 1)["trajectory"]), name


@pytest.mark.parametrize(("ranks", "micro_batches"), [("4x1", 1), ("2x2", 2)])
def test_ranks_perturb_differently_unless_the_scope_is_global(ddp, ranks, micro_batches):
    for scope in ("device", "global"):
        each = [ddp(f"examples {scope} {ranks}", rank)["passes"] for rank in (0, 1)]
        assert len(each[0]) == 4 * 2 * micro_batches
        for i, (left, right) in enumerate(zip(*each, strict=True)):
            perturbed = i % (2 * micro_batches) >= micro_batches
            assert torch.equal(left, right) == (scope == "global" or not perturbed)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("wrapping", [name for name in WRAPPINGS if name != "default"])
def test_the_way_the_model_is_wrapped_changes_nothing(ddp, wrapping, scope):
    assert torch.equal(ddp(f"wrapped {scope} {wrapping}")["trajectory"], ddp(f"wrapped {scope} default")["trajectory"])


def test_only_global_scope_reduces_gradients_twice(ddp):
    runs = {scope: ddp(f"communication {scope}") for scope in COUNTED["DDP"]}
    assert {scope: in_units_of_the_parameters(run) for scope, run in runs.items()} == COUNTED["DDP"]
    stock = runs[None]["bytes"]
    for scope in ("micro", "device"):  # not one byte more
        assert runs[scope]["bytes"] == stock
    twice = {kind: 2 * stock[kind] for kind in ("allreduce", "broadcast")}  # gradients, and buffers before a pass
    assert runs["global"]["bytes"] == {**stock, **twice}


# --- interruptions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("scope", SCOPES)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(ddp, scope, rank):
    run = ddp(f"resumed {scope}", rank)
    assert run["trajectory"].shape[0] == 6
    assert torch.equal(run["second_half"], run["trajectory"][3:])


def test_a_rank_that_fails_in_the_second_pass_ends_the_job_at_once(ddp):
    ddp.assert_ended_by_the_failure("failing")
