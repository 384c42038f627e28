"""A run that goes wrong says so while it trains, by `logger.warning`; one that is well says nothing."""

from __future__ import annotations

import pytest
import torch
from integration import tiny
from transformers import TrainerCallback

from hf_sam import SAMConfig, SAMTrainer
from hf_sam.update import diagnosis


@pytest.fixture
def warnings(monkeypatch):
    said = []
    monkeypatch.setattr(diagnosis.logger, "warning", said.append)
    return said


def train(model, data, tmp_path, sam, callbacks=(), **options):
    defaults = {"max_steps": 16, "logging_steps": 2, "learning_rate": 1e-3, "optim": "adamw_torch_fused"}
    args = tiny.arguments(tmp_path, **{**defaults, **options})
    trainer = SAMTrainer(model, args, train_dataset=data, sam_config=SAMConfig(**sam), callbacks=list(callbacks))
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "sam", [{}, {"rho": 0.05}, {"method": "late"}, {"method": "previous"}, {"perturb": "norm"}], ids=str
)
@pytest.mark.parametrize(("model", "data"), [(tiny.vit, tiny.images), (tiny.bert, tiny.sentences)])
def test_runs_that_are_well_say_nothing(model, data, sam, warnings, tmp_path):
    train(model(), data(), tmp_path, sam)
    assert warnings == []


def test_a_rho_that_leaves_nothing_of_the_model(warnings, tmp_path):
    train(tiny.vit(), tiny.images(), tmp_path, {"rho": 20.0})
    (message,) = warnings
    assert "rho=20 is too large" in message


def test_a_rho_that_rounding_hides(warnings, tmp_path):
    train(tiny.vit(), tiny.images(), tmp_path, {"rho": 1e-7})
    (message,) = warnings
    assert "rho=1e-07 is too small to matter" in message


def test_sixteen_bit_weights_that_do_not_move(warnings, tmp_path):
    data = tiny.vectors(dtype=torch.bfloat16)
    train(tiny.mlp(torch.bfloat16), data, tmp_path, {"rho": 1e-3})
    assert any("bfloat16 loses more than a tenth" in message for message in warnings)


def test_a_head_that_takes_the_whole_perturbation(warnings, tmp_path):
    model = tiny.vit()

    def hold_back(module, inputs, outputs):
        outputs.last_hidden_state.register_hook(lambda gradient: 0.01 * gradient)

    model.vit.register_forward_hook(hold_back)
    trainer = train(model, tiny.images(), tmp_path, {"rho": 0.05})
    (message,) = warnings
    assert "lies in the head" in message
    assert not any(key.startswith("sam_share") for entry in trainer.state.log_history for key in entry)


def test_passes_that_are_spent_on_what_is_learned(warnings, tmp_path):
    data = [{**example, "labels": 0} for example in tiny.images()]
    train(tiny.vit(), data, tmp_path, {"rho": 0.005}, max_steps=40, learning_rate=0.03, lr_scheduler_type="constant")
    assert any("change little. Set end=0." in message for message in warnings)


class StopsEarly(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= 4


def test_a_run_that_stops_before_it_perturbs(warnings, tmp_path):
    train(tiny.vit(), tiny.images(), tmp_path, {"start": 0.75}, [StopsEarly()])
    (message,) = warnings
    assert "None of the 4 steps of this run was perturbed (start=0.75" in message


def test_the_stock_trainer_is_not_watched(warnings, tmp_path):
    train(tiny.vit(), tiny.images(), tmp_path, {"rho": 0.0})
    assert warnings == []


@pytest.mark.parametrize("rho", [0.05, 20.0])
def test_a_run_that_does_not_log_reads_nothing(rho, warnings, monkeypatch, tmp_path):
    monkeypatch.setattr(diagnosis.Diagnosis, "check", lambda *_: pytest.fail("nothing was logged"))
    train(tiny.vit(), tiny.images(), tmp_path, {"rho": rho}, logging_strategy="no")
    assert warnings == []
