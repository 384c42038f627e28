"""What a checkpoint holds, what may go on from it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from integration import tiny
from transformers import ViTForImageClassification

from hf_sam import SAMConfig

SCOPES = ("micro", "device", "global")
HALVES = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}


def resumed(model, data, folder, sam, checkpoint, **options):
    trainer = tiny.trainer_for(model, data, folder, sam, **{**HALVES, **options})
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return trainer


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(
    ("make", "data"),
    [
        (lambda: tiny.mlp(dropout=0.2, batch_norm=True), tiny.vectors()),
        (lambda: tiny.gpt2(dropout=0.2), tiny.texts()),
        (lambda: tiny.vit(dropout=0.2), tiny.images()),
        (lambda: tiny.with_lora(tiny.bert(dropout=0.2), ["query", "value"], dropout=0.2), tiny.sentences()),
    ],
    ids=["batch norm", "tied weights", "vit", "lora"],
)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(make, data, scope, tmp_path):
    sam, options = SAMConfig(rho=0.1, scope=scope), {**HALVES, "train_sampling_strategy": "random"}
    whole = tiny.trained(make(), data, tmp_path, sam, **options)
    again = resumed(make(), data, tmp_path, sam, tmp_path / "checkpoint-3", train_sampling_strategy="random")
    assert len(again.trajectory) == 3
    assert torch.equal(torch.stack(again.trajectory), torch.stack(whole.trajectory[3:]))
    assert tiny.same_bits(tiny.state(again.model), tiny.state(whole.model))
    for key in ("loss", "sam_perturbed_loss", "sam_sharpness", "sam_perturbation_norm"):
        assert tiny.logged(again, key) == tiny.logged(whole, key)
    assert again.state.total_flos == whole.state.total_flos


def test_every_checkpoint_and_the_final_model_carry_the_configuration(tmp_path):
    sam = SAMConfig(method="asam", rho=0.3, scope="micro", m=2, p="inf", perturb=["last.*"])
    trainer = tiny.trained(tiny.mlp(), tiny.vectors(), tmp_path, sam, **HALVES)
    trainer.save_model(str(tmp_path / "final"))
    for folder in ("checkpoint-3", "checkpoint-6", "final"):
        assert SAMConfig.from_json((tmp_path / folder / "sam_config.json").read_text()) == sam


@pytest.mark.parametrize(
    ("before", "now", "named"),
    [
        ({"rho": 0.1}, {"rho": 0.2}, ["rho", "0.1", "0.2"]),
        ({}, {"scope": "micro"}, ["scope", "micro"]),
        ({}, {"method": "asam", "rho": 0.05}, ["method", "asam"]),
        ({}, {"p": "inf"}, ["p was 2.0 and is now 'inf'"]),
        ({}, {"perturb": ["last.*", "first.*"]}, ["perturb", "last.*"]),
        ({}, {"replay_rng": False}, ["replay_rng"]),
        ({"rho": 0.1}, {"rho": 0}, ["rho"]),
    ],
)
def test_resuming_under_another_configuration_names_the_difference(before, now, named, tmp_path):
    tiny.trained(tiny.mlp(), tiny.vectors(), tmp_path, SAMConfig(**before), **HALVES)
    with pytest.raises(ValueError, match="another SAM configuration") as error:
        resumed(tiny.mlp(), tiny.vectors(), tmp_path, SAMConfig(**now), tmp_path / "checkpoint-3")
    assert all(word in str(error.value) for word in named)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"rho": "much"}', '{"rhoo": 0.1}', '{"method": "sam2"}'])
def test_a_damaged_configuration_in_a_checkpoint_is_one_line_that_names_the_file(content, tmp_path):
    tiny.trained(tiny.mlp(), tiny.vectors(), tmp_path, SAMConfig(), **HALVES)
    (tmp_path / "checkpoint-3" / "sam_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"sam_config\.json") as error:
        resumed(tiny.mlp(), tiny.vectors(), tmp_path, SAMConfig(), tmp_path / "checkpoint-3")
    assert "\n" not in str(error.value)


def test_a_stock_trainer_goes_on_from_our_checkpoint(tmp_path):
    """Under a vanishing rho ours is the stock Trainer, so the mixed run must be the stock one throughout."""
    whole = tiny.trained(tiny.bert(0.2), tiny.sentences(), tmp_path / "stock", None, **HALVES)
    tiny.trained(tiny.bert(0.2), tiny.sentences(), tmp_path / "sam", SAMConfig(rho=1e-30), **HALVES)
    mixed = resumed(tiny.bert(0.2), tiny.sentences(), tmp_path / "sam", None, tmp_path / "sam" / "checkpoint-3")
    assert torch.equal(torch.stack(mixed.trajectory), torch.stack(whole.trajectory[3:]))


def test_we_go_on_from_a_stock_checkpoint(tmp_path):
    whole = tiny.trained(tiny.bert(0.2), tiny.sentences(), tmp_path, None, **HALVES)
    sam = SAMConfig(rho=1e-30)
    mixed = resumed(tiny.bert(0.2), tiny.sentences(), tmp_path, sam, tmp_path / "checkpoint-3")
    assert torch.equal(torch.stack(mixed.trajectory), torch.stack(whole.trajectory[3:]))
    assert len(mixed.passes) == 3 * 2 * 2


def test_a_checkpoint_of_weights_alone_can_be_gone_on_from(tmp_path):
    options = {**HALVES, "save_only_model": True}
    sam = SAMConfig()
    whole = tiny.trained(tiny.mlp(), tiny.vectors(), tmp_path, sam, **options, optim="sgd")
    again = resumed(tiny.mlp(), tiny.vectors(), tmp_path, sam, tmp_path / "checkpoint-3", optim="sgd")
    assert torch.equal(torch.stack(again.trajectory), torch.stack(whole.trajectory[3:]))


@pytest.mark.parametrize("make", [lambda: tiny.mlp(), lambda: tiny.vit()], ids=["mlp", "vit"])
def test_the_best_model_is_loaded_at_the_end(make, tmp_path):
    data = tiny.images() if isinstance(make(), ViTForImageClassification) else tiny.vectors()
    scores = iter([0.3, 0.9, 0.2])

    class Scored(tiny.WatchedSAMTrainer):
        def evaluate(self, *args, **kwargs):
            metrics = {**super().evaluate(*args, **kwargs), "eval_score": next(scores)}
            return metrics

    tiny.set_seed(2)
    args = tiny.arguments(
        tmp_path,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
    )
    trainer = Scored(model=make(), args=args, train_dataset=data, eval_dataset=data[:8], sam_config=SAMConfig(rho=0.5))
    trainer.train()
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-2"
    assert torch.equal(tiny.flat(trainer.model), trainer.trajectory[1])
    assert not torch.equal(trainer.trajectory[1], trainer.trajectory[2])


def test_training_twice_with_one_trainer(tmp_path):
    """The second call goes on as the stock Trainer does, and counts its own passes."""

    def twice(sam):
        trainer = tiny.trained(tiny.mlp(dropout=0.2), tiny.vectors(), tmp_path, sam, max_steps=2)
        trainer.train()
        return trainer

    ours, stock = twice(SAMConfig(rho=1e-30)), twice(None)
    assert torch.equal(torch.stack(ours.trajectory), torch.stack(stock.trajectory))
    assert ours.state.log_history[-1]["sam_passes"] == 2


def test_a_model_built_anew_by_model_init(tmp_path):
    """The update follows the Trainer to the new model."""
    extra = {"model_init": lambda: tiny.mlp(dropout=0.2)}
    trainer = tiny.trainer_for(None, tiny.vectors(), tmp_path, SAMConfig(rho=0.1), extra=extra)
    trainer.train()
    trainer.train()
    assert torch.equal(torch.stack(trainer.trajectory[3:]), torch.stack(trainer.trajectory[:3]))


def test_the_trainers_own_state_is_readable_json(tmp_path):
    tiny.trained(tiny.mlp(), tiny.vectors(), tmp_path, SAMConfig(), **HALVES)
    history = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    assert all(isinstance(entry["sam_sharpness"], float) for entry in history if "loss" in entry)
