"""What cannot be right is refused before training, in one readable line."""

from __future__ import annotations

import pytest
import torch
from integration import tiny

from hf_sam import SAMConfig, SAMTrainer


def refused(tmp_path, *, extra=None, sam=None, **args) -> str:
    with pytest.raises((ValueError, TypeError)) as error:
        trainer = tiny.trainer_for(tiny.mlp(), tiny.vectors(), tmp_path, sam or SAMConfig(), extra=extra, **args)
        trainer.train()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "optim",
    [
        "lomo",
        "adalomo",
        "galore_adamw_layerwise",
        "galore_adamw_8bit_layerwise",
        "galore_adafactor_layerwise",
        "apollo_adamw_layerwise",
    ],
)
def test_optimizers_that_step_inside_backward(optim, tmp_path):
    message = refused(tmp_path, optim=optim, optim_target_modules=["first"])
    assert optim in message
    assert "adamw_torch" in message


def test_an_optimizer_object_that_steps_inside_backward(tmp_path):
    class AdaLomo(torch.optim.SGD):
        """Stands for the package's class of this name."""

    model = tiny.mlp()
    extra = {"model": model, "optimizers": (AdaLomo(model.parameters(), lr=0.1), None)}
    assert "backward" in refused(tmp_path, extra=extra)


def test_rho_zero_refuses_no_optimizer(tmp_path):
    SAMTrainer(tiny.mlp(), tiny.arguments(tmp_path, optim="lomo"), sam_config=SAMConfig(rho=0))


@pytest.mark.parametrize("wrong", [{"rho": 0.05}, "sam", 0.05, SAMConfig])
def test_a_sam_config_of_another_type(wrong, tmp_path):
    with pytest.raises(TypeError, match="SAMConfig"):
        SAMTrainer(tiny.mlp(), tiny.arguments(tmp_path), sam_config=wrong)


@pytest.mark.parametrize("perturb", [["weight"], ["frist.*"], "encoder.*"])
def test_a_pattern_that_matches_nothing_shows_names(perturb, tmp_path):
    message = refused(tmp_path, sam=SAMConfig(perturb=perturb))
    assert "first.weight" in message


def test_normalisation_layers_of_a_model_without_any(tmp_path):
    model = torch.nn.Linear(6, 3)
    assert "norm" in refused(tmp_path, extra={"model": model}, sam=SAMConfig(perturb="norm"))


@pytest.mark.parametrize("window", [{"start": 3}, {"start": 50}, {"end": 0}, {"start": 1.0}, {"start": 2, "end": 0.5}])
def test_a_phase_that_never_starts(window, tmp_path):
    with pytest.raises(ValueError, match=r"start|end"):
        tiny.trained(tiny.mlp(), tiny.vectors(), tmp_path, SAMConfig(**window), max_steps=3)


def test_several_devices_in_one_process(tmp_path):
    trainer = tiny.trainer_for(tiny.mlp(), tiny.vectors(), tmp_path, SAMConfig())
    trainer.args._n_gpu = 2
    with pytest.raises(ValueError, match="accelerate launch"):
        trainer.train()


def test_a_frozen_model(tmp_path):
    model = tiny.mlp().requires_grad_(False)
    with pytest.raises(ValueError):  # noqa: PT011 - the Trainer's own message or ours
        tiny.trained(model, tiny.vectors(), tmp_path, SAMConfig())
