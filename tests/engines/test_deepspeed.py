"""DeepSpeed ZeRO-0 to 3 on two real processes and DeepSpeed's CPU accelerator: `pip install hf-sam[deepspeed]`, then
`pytest -m slow tests/engines/test_deepspeed.py`.
"""

from __future__ import annotations

import importlib.util
import itertools

import pytest
import torch
from distributed.launching import Launched
from distributed.traffic import COUNTED, in_units_of_the_parameters
from engines import deepspeed_runs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs hf-sam[deepspeed]"),
]


@pytest.fixture(scope="module")
def zero(tmp_path_factory) -> Launched:
    return Launched(tmp_path_factory.mktemp("zero"), "engines.deepspeed_runs.every_stage")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process without DeepSpeed, made once for all stages."""
    made: dict[str, dict] = {}

    def run(choice: str) -> dict:
        if choice not in made:
            made[choice] = deepspeed_runs.chosen(choice, 0, tmp_path_factory.mktemp("alone"))
        return made[choice]

    return run


@pytest.mark.parametrize(("stage", "choice"), deepspeed_runs.stages_and_choices())
def test_global_scope_is_the_run_of_one_process(zero, alone, stage, choice):
    ours, expected = zero(f"{choice} at stage {stage}"), alone(choice)
    torch.testing.assert_close(ours["trajectory"], expected["trajectory"], rtol=1e-5, atol=1e-7)
    assert (expected["trajectory"][-1] - expected["trajectory"][0]).norm() > 1e-3
    for key in ("loss", "sam_ascent_grad_norm", "sam_perturbation_norm", "sam_perturbed_loss"):  # where it is logged
        values = [[entry[key] for entry in run["log"] if key in entry] for run in (ours, expected)]
        assert values[0] == pytest.approx(values[1], rel=1e-5), key


@pytest.mark.parametrize(
    ("stage", "scope"), [*itertools.product((0, 1, 2), ("micro", "device", "global")), (3, "global")]
)
def test_a_vanishing_rho_is_bitwise_the_stock_trainer(zero, stage, scope):
    ours, stock = zero(f"vanishing {scope} at stage {stage}"), zero(f"vanishing None at stage {stage}")
    assert torch.equal(ours["trajectory"], stock["trajectory"])
    for key in ("loss", "grad_norm", "learning_rate"):
        assert [e[key] for e in ours["log"] if key in e] == [e[key] for e in stock["log"] if key in e]


def test_a_vanishing_rho_is_bitwise_the_stock_trainer_in_bfloat16(zero):
    assert torch.equal(zero("vanishing bf16 global")["trajectory"], zero("vanishing bf16 None")["trajectory"])


def test_device_scope_perturbs_each_rank_along_its_own_gradient(zero, alone):
    ours = zero("device")
    assert ours["scope"] == "device"
    assert not torch.allclose(ours["trajectory"], alone("sam")["trajectory"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_examples_chosen_by_a_forward_pass_at_the_perturbed_weights(zero, stage, tmp_path):
    expected = deepspeed_runs.hardest_hit(0, tmp_path)["trajectory"]
    torch.testing.assert_close(zero(f"hardest hit at stage {stage}")["trajectory"], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # by PEFT
def test_adapters_are_the_run_of_one_process(zero, tmp_path):
    expected = deepspeed_runs.adapters(tmp_path)
    torch.testing.assert_close(zero("lora")["trajectory"], expected["trajectory"], rtol=1e-5, atol=1e-6)


def test_ranks_hold_the_same_bits_after_every_step_of_every_run(zero):
    names = [name for name in zero.names if not name.startswith("refused")]
    assert len(names) > 40
    for name in names:
        assert torch.equal(zero(name, 0)["trajectory"], zero(name, 1)["trajectory"]), name


@pytest.mark.parametrize("stage", [2, 3])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(zero, stage):
    run = zero(f"resumed at stage {stage}")
    assert run["trajectory"].shape[0] == 6
    assert torch.equal(run["second_half"], run["trajectory"][3:])


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_only_global_scope_sends_more_than_the_stock_trainer(zero, stage):
    counted = COUNTED[f"ZeRO-{stage}"]
    runs = {scope: zero(f"communication {scope} at stage {stage}") for scope in counted}
    assert {scope: in_units_of_the_parameters(run) for scope, run in runs.items()} == counted
    for scope in counted.keys() & {"micro", "device"}:  # not one byte more
        assert runs[scope]["bytes"] == runs[None]["bytes"]


def test_a_rank_that_fails_in_the_second_pass_ends_the_job_at_once(zero):
    zero.assert_ended_by_the_failure("failing at stage 2")


def test_a_rank_that_fails_in_the_second_pass_at_stage_3_ends_the_job_at_once(tmp_path):
    launched = Launched(tmp_path, "engines.deepspeed_runs.failing_at_stage_3")
    launched.assert_ended_by_the_failure("failing at stage 3")


@pytest.mark.parametrize(
    ("name", "words"),
    [("offload", "offload_optimizer"), ("fp16", "Use bf16"), ("gsam", "'gsam', 'wsam', 'looksam' is not supported")],
)
def test_what_cannot_be_right_is_refused(zero, name, words):
    assert words in zero(f"refused {name}")["message"]
