"""Entropy-SGD through the Trainer, against its algorithm on one flat float64 vector."""

import oracles
import pytest
import torch
from models import OrderedTrainer, arguments, examples, stack, tiny_classifier, weights

from hf_sam.baselines.entropy_sgd import EntropySGD


def trainer(folder, callback, **kwargs):
    return OrderedTrainer(
        model=tiny_classifier(), args=arguments(folder, **kwargs), train_dataset=examples(8), callbacks=[callback]
    )


@pytest.mark.parametrize("outer_lr", [1.0, 0.5])
def test_walks_average_and_step(tmp_path, outer_lr):
    settings = {"inner_steps": 3, "gamma": 0.2, "average": 0.6, "noise": 0.0, "outer_lr": outer_lr}
    run = trainer(tmp_path, EntropySGD(**settings), max_steps=7)
    run.train()

    losses = [oracles.loss_function(tiny_classifier(), stack(examples(8)[i : i + 4])) for i in (0, 4)]
    x = oracles.flatten(oracles.used_parameters(tiny_classifier()))
    inner, mu = x.clone(), x.clone()
    for step in range(7):
        inner = inner - 0.1 * (oracles.gradient(losses[step % 2], inner) - 0.2 * (x - inner))
        mu = 0.4 * mu + 0.6 * inner
        if step % 3 == 2:
            x = x - outer_lr * (x - mu)
            inner, mu = x.clone(), x.clone()
    torch.testing.assert_close(oracles.flatten(oracles.used_parameters(run.model)), inner, rtol=0, atol=1e-12)


def test_noise_has_the_stated_size(tmp_path):
    quiet = trainer(tmp_path, EntropySGD(noise=0.0), max_steps=1)
    loud = trainer(tmp_path, EntropySGD(noise=0.5), max_steps=1)
    for run in (quiet, loud):
        run.train()
    difference = [a - b for a, b in zip(weights(loud), weights(quiet), strict=True)]
    values = torch.cat([d.flatten() for d in difference])
    values = values[values != 0]  # the unused parameter does not walk
    assert len(values) == 47
    assert values.std().item() == pytest.approx(0.1**0.5 * 0.5, rel=0.3)


@pytest.mark.parametrize("elsewhere", [True, False])
def test_resumed_is_bitwise_uninterrupted(tmp_path, elsewhere):
    whole = trainer(tmp_path, EntropySGD(inner_steps=3), max_steps=5, save_strategy="steps", save_steps=2)
    whole.train()
    checkpoint = str(tmp_path / "checkpoint-2")
    folder, options = (tmp_path / "again", {"resume_from_checkpoint": checkpoint}) if elsewhere else (tmp_path, {})
    again = trainer(folder, EntropySGD(inner_steps=3), max_steps=5, **options)
    again.train(resume_from_checkpoint=checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(again), strict=True))


@pytest.mark.parametrize("wrong", [{"inner_steps": 0}, {"gamma": -1}, {"average": 0}, {"noise": -1}, {"outer_lr": 0}])
def test_wrong_values_name_the_field(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
        EntropySGD(**wrong)
