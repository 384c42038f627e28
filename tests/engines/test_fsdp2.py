"""Sharded parameters: the same run as one process, whatever the mesh; ranks alike; the stock Trainer at a vanishing rho.

FSDP2 and tensor parallelism run on real processes on the CPU (gloo).
"""

from __future__ import annotations

import pytest
import torch
from distributed.launching import Launched
from distributed.traffic import COUNTED, in_units_of_the_parameters
from engines import sharded_runs
from engines.sharded_runs import CHOICES, IN_EVERY_SUITE, OF_ACCELERATE, SHARDS_AT_LOAD

# PEFT asks transformers for a property by a name that is about to go.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

LOGGED = ("loss", "grad_norm", "sam_ascent_grad_norm", "sam_perturbation_norm", "sam_perturbed_loss", "sam_cosine")


class LaunchedSharded(Launched):
    """Without what older versions of transformers cannot do."""

    def __call__(self, name: str, rank: int = 0):
        if not SHARDS_AT_LOAD and not name.startswith(OF_ACCELERATE):
            pytest.skip("needs a model that is sharded as it is loaded: transformers 5.19")
        return super().__call__(name, rank)


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Launched:
    return LaunchedSharded(tmp_path_factory.mktemp("two"), "engines.sharded_runs.two_processes")


def assert_same_course(sharded: dict, alone: dict, keys=LOGGED, **tolerance):
    torch.testing.assert_close(sharded["trajectory"], alone["trajectory"], **tolerance)
    assert (alone["trajectory"][-1] - alone["trajectory"][0]).norm() > 1e-3, "the run must move the weights"
    for key in keys:
        values = [[entry[key] for entry in run["log"] if key in entry] for run in (sharded, alone)]
        assert values[0] == pytest.approx(values[1], rel=2e-6), key


# --- one process ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", IN_EVERY_SUITE)
def test_a_run_on_shards_is_the_run_of_one_process(two, choice, tmp_path):
    alone = sharded_runs.chosen("fsdp", choice, 1, tmp_path)
    assert_same_course(two(f"fsdp {choice}"), alone, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fsdp", "tp"])
@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_on_shards_is_the_run_of_one_process(at_length, layout, choice, tmp_path):
    alone = sharded_runs.chosen(layout, choice, 1, tmp_path)
    assert_same_course(at_length(f"{layout} {choice}"), alone, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_examples_chosen_by_a_forward_pass_at_the_perturbed_shards(at_length, tmp_path):
    alone = sharded_runs.hardest_hit("fsdp", tmp_path)
    assert_same_course(at_length("fsdp hardest hit"), alone, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_tied_weights_count_once(at_length, tmp_path):
    assert_same_course(at_length("fsdp tied"), sharded_runs.tied("fsdp", tmp_path), rtol=1e-10, atol=1e-12)


def test_adapters_that_every_rank_holds_whole_count_once(two, tmp_path):
    assert_same_course(two("fsdp lora"), sharded_runs.adapters(tmp_path), rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_weights_gathered_for_an_evaluation_do_not_hide_the_next_perturbation(at_length, tmp_path):
    alone = sharded_runs.along_momentum("fsdp", tmp_path)
    assert_same_course(at_length("fsdp msam"), alone, keys=("loss", "sam_perturbation_norm"), rtol=1e-8, atol=1e-10)


def test_tensor_parallel_shards_and_replicas_have_the_norm_of_the_whole(two, tmp_path):
    alone = sharded_runs.chosen("tp", "asam", 1, tmp_path)
    assert_same_course(two("tp asam"), alone, rtol=1e-10, atol=1e-12)


def assert_same_in_float32(sharded: dict, alone: dict):
    assert sharded["scope"] == "global"
    torch.testing.assert_close(sharded["trajectory"], alone["trajectory"], rtol=1e-5, atol=1e-6)
    for key in ("loss", "sam_ascent_grad_norm", "sam_perturbation_norm"):
        values = [[entry[key] for entry in run["log"] if key in entry] for run in (sharded, alone)]
        assert values[0] == pytest.approx(values[1], rel=1e-5), key


def test_accelerates_plugin_is_the_run_of_one_process(two, tmp_path):
    alone = sharded_runs.plugin({"rho": 0.1, "scope": "global"}, False, tmp_path)
    assert_same_in_float32(two("plugin sam"), alone)


@pytest.mark.slow
def test_sharded_adapters_are_the_run_of_one_process(at_length, tmp_path):
    alone = sharded_runs.plugin({"rho": 0.1, "scope": "global"}, True, tmp_path)
    assert_same_in_float32(at_length("plugin lora"), alone)


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["sam", "p=1", "p=inf", "asam", "gsam"])
@pytest.mark.parametrize(("layout", "batches"), [("hsdp", 4), ("fsdp and tp", 2)])
def test_meshes_of_two_dimensions(four, layout, batches, choice, tmp_path):
    alone = sharded_runs.chosen(layout, choice, 1, tmp_path)
    assert_same_course(four(f"{layout} {choice}"), alone, rtol=1e-10, atol=1e-12)


@pytest.fixture(scope="module")
def at_length(tmp_path_factory) -> Launched:
    return Launched(tmp_path_factory.mktemp("at_length"), "engines.sharded_runs.two_processes_at_length")


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> Launched:
    return Launched(tmp_path_factory.mktemp("four"), "engines.sharded_runs.four_processes", processes=4)


# --- the stock Trainer ---------------------------------------------------------------------------------------------


def assert_same_bits(ours: dict, stock: dict):
    assert torch.equal(ours["trajectory"], stock["trajectory"])
    for key in ("loss", "grad_norm", "learning_rate"):
        assert [e[key] for e in ours["log"] if key in e] == [e[key] for e in stock["log"] if key in e]


@pytest.mark.parametrize("pair", [("vanishing True", "vanishing False"), ("plugin vanishing", "plugin stock")])
def test_a_vanishing_rho_is_bitwise_the_stock_trainer(two, pair):
    assert_same_bits(*map(two, pair))


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["bf16", "checkpointing"])
def test_a_vanishing_rho_is_bitwise_the_stock_trainer_in_this_setting(at_length, setting):
    assert_same_bits(at_length(f"vanishing {setting} True"), at_length(f"vanishing {setting} False"))


# --- fp16 ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_scaling_the_loss_changes_nothing(at_length, engine):
    assert torch.equal(at_length(f"scaled {engine}")["trajectory"], at_length(f"not scaled {engine}")["trajectory"])


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
@pytest.mark.parametrize(("which", "skipped", "scale"), [("clean", [], 2.0**20), ("perturbed", [1], 2.0**19)])
def test_an_overflow_on_one_rank_is_one_on_all(at_length, which, skipped, scale, engine, rank):
    """In the clean pass the perturbation of that step is 0; in the perturbed one the step is skipped, once."""
    run = at_length(f"overflow in the {which} pass {engine}", rank)
    points = run["trajectory"]
    assert torch.isfinite(points).all()
    assert [i for i in range(1, len(points)) if torch.equal(points[i], points[i - 1])] == skipped
    assert run["scale"] == scale


# --- ranks, interruptions, traffic ---------------------------------------------------------------------------------


def test_ranks_hold_the_same_bits_after_every_step_of_every_run(two):
    assert len(two.names) > (12 if SHARDS_AT_LOAD else 5)
    for name in two.names:
        assert torch.equal(two(name, 0)["trajectory"], two(name, 1)["trajectory"]), name


@pytest.mark.parametrize("rank", [0, 1])
def test_shards_are_restored_bitwise_when_the_second_pass_raises(two, rank):
    run = two("interrupted", rank)
    assert torch.equal(run["before"], run["after"])


def test_a_rank_that_fails_in_the_second_pass_ends_the_job_at_once(two):
    two.assert_ended_by_the_failure("plugin failing")


@pytest.mark.slow
def test_a_rank_that_fails_in_the_second_pass_of_a_model_loaded_sharded_ends_the_job_at_once(tmp_path):
    Launched(tmp_path, "engines.sharded_runs.loaded_failing").assert_ended_by_the_failure("fsdp failing")


def test_a_resumed_run_with_state_is_bitwise_the_uninterrupted_one(two):
    run = two("plugin resumed friendly")
    assert run["trajectory"].shape[0] == 6
    assert torch.equal(run["second_half"], run["trajectory"][3:])


@pytest.mark.slow
def test_ranks_hold_the_same_bits_after_every_step_of_every_run_at_length(at_length):
    assert len(at_length.names) > 40
    for name in at_length.names:
        assert torch.equal(at_length(name, 0)["trajectory"], at_length(name, 1)["trajectory"]), name


@pytest.mark.parametrize(
    ("rho", "stochastic", "warning"),
    [(1e-5, False, "bfloat16 loses"), (1e-3, True, "bfloat16 adds"), (0.5, True, None)],
)
def test_bfloat16_shards_are_perturbed_by_rho_or_a_warning_says_that_rounding_interferes(two, rho, stochastic, warning):
    run = two(f"bfloat16 {rho} {stochastic}")
    norms = [entry["sam_perturbation_norm"] for entry in run["log"] if "sam_rho" in entry]
    assert len(norms) == 4
    is_right = norms == pytest.approx([rho] * 4, rel=0.1)
    assert is_right == (warning is None)
    about_rounding = [message for message in run["messages"] if message.startswith("Rounding")]
    assert [warning in message for message in about_rounding] == [True] * (warning is not None)


@pytest.mark.slow
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(at_length):
    run = at_length("plugin resumed sam")
    assert torch.equal(run["second_half"], run["trajectory"][3:])


def test_sam_gathers_and_reduces_twice_what_the_stock_trainer_does_and_its_norms(two):
    runs = {scope: two(f"communication {scope}") for scope in COUNTED["FSDP2"]}
    if SHARDS_AT_LOAD:  # before transformers 5.19 the stock Trainer, too, reduces in every micro-batch
        assert {scope: in_units_of_the_parameters(run) for scope, run in runs.items()} == COUNTED["FSDP2"]
    ours, stock = runs["global"]["bytes"], runs[None]["bytes"]
    assert ours["reduce_scatter"] == 2 * stock["reduce_scatter"]
    assert 0 <= 2 * stock["allgather"] - ours["allgather"] < 64  # the number of labels, which is gathered once a step
    assert ours["allreduce"] - stock.get("allreduce", 0) < 64  # norms
