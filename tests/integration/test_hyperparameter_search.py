"""`Trainer.hyperparameter_search` over the fields of `SAMConfig`, as `sam_rho` and the like."""

from __future__ import annotations

import json

import optuna
import pytest
import torch
from integration import tiny
from transformers import Trainer, TrainerCallback

from hf_sam import SAMConfig, SAMTrainer, SAMTrainerMixin

optuna.logging.set_verbosity(optuna.logging.WARNING)
STEPS = 3


class PerTrial(TrainerCallback):
    """What each trial trained with, and to which weights."""

    def __init__(self):
        self.rhos, self.weights, self.names = [], [], []

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.rhos.append([entry["sam_rho"] for entry in state.log_history if "sam_rho" in entry])
        self.names.append({key for entry in state.log_history for key in entry if key.startswith("sam_")})
        self.weights.append(tiny.flat(model))


def fresh():  # `model_init` may take a trial, and nothing else
    return tiny.mlp()


def trainer_for(folder, sam=None, model_init=fresh, **args):
    noted = PerTrial()
    trainer = SAMTrainer(
        model=None if model_init else tiny.mlp(),
        model_init=model_init,
        args=tiny.arguments(folder, max_steps=STEPS, eval_strategy="steps", eval_steps=STEPS, **args),
        train_dataset=tiny.vectors(16),
        eval_dataset=tiny.vectors(8),
        sam_config=sam,
        callbacks=[noted],
    )
    return trainer, noted


def search(folder, grid, hp_space=None, sam=None, n_trials=None, **args):
    """Every point of `grid`; returns the trainer, what its trials did, their parameters and the best run."""
    trainer, noted = trainer_for(folder, sam, **args)
    tried = []

    def space(trial):
        chosen = {name: trial.suggest_categorical(name, values) for name, values in grid.items()}
        tried.append(chosen)
        return chosen if hp_space is None else hp_space(chosen)

    sampler = optuna.samplers.GridSampler(grid, seed=0)
    points = n_trials or len(torch.cartesian_prod(*(torch.arange(len(v)) for v in grid.values())))
    best = trainer.hyperparameter_search(hp_space=space, backend="optuna", n_trials=points, sampler=sampler)
    return trainer, noted, tried, best


def trained_alone(folder, sam, **args):
    """The weights of a run of its own under this configuration."""
    trainer, noted = trainer_for(folder, sam, **args)
    trainer.train()
    return noted.weights[0]


def test_each_trial_trains_with_its_rho(tmp_path):
    _, noted, tried, best = search(tmp_path, {"sam_rho": [0.01, 0.1, 0.5]})
    assert sorted(chosen["sam_rho"] for chosen in tried) == [0.01, 0.1, 0.5]
    for chosen, rhos, weights in zip(tried, noted.rhos, noted.weights, strict=True):
        assert rhos == pytest.approx([chosen["sam_rho"]] * STEPS)
        assert torch.equal(weights, trained_alone(tmp_path / "alone", SAMConfig(rho=chosen["sam_rho"])))
    assert best.hyperparameters["sam_rho"] in (0.01, 0.1, 0.5)


def test_beside_the_usual_hyperparameters(tmp_path):
    grid = {"sam_rho": [0.05, 0.5], "learning_rate": [1e-3, 1e-2]}
    _, noted, tried, best = search(tmp_path, grid)
    assert len(noted.weights) == 4
    for chosen, weights in zip(tried, noted.weights, strict=True):
        sam, rate = SAMConfig(rho=chosen["sam_rho"]), chosen["learning_rate"]
        assert torch.equal(weights, trained_alone(tmp_path / "alone", sam, learning_rate=rate))
    assert best.hyperparameters.keys() == {"sam_rho", "learning_rate"}


def test_each_trial_trains_with_its_method_and_that_methods_defaults(tmp_path):
    _, noted, tried, _ = search(tmp_path, {"sam_method": ["sam", "asam", "wsam", "random"]})
    for chosen, weights in zip(tried, noted.weights, strict=True):
        assert torch.equal(weights, trained_alone(tmp_path / "alone", SAMConfig(method=chosen["sam_method"])))


@pytest.mark.parametrize(
    ("grid", "fields"),
    [
        ({"sam_p": ["inf", 1.0]}, {"rho": 0.3}),
        ({"sam_adaptive": [True, False]}, {"rho": 0.3}),
        ({"sam_alpha": [0.1, 0.9]}, {"method": "gsam", "rho": 0.3}),
        ({"sam_interval": [1, 2]}, {"rho": 0.3}),
    ],
    ids=lambda value: ",".join(value),
)
def test_other_fields_are_those_of_the_trainer(grid, fields, tmp_path):
    _, noted, tried, _ = search(tmp_path, grid, sam=SAMConfig(**fields))
    assert not torch.equal(*noted.weights)
    for chosen, weights in zip(tried, noted.weights, strict=True):
        own = {name.removeprefix("sam_"): value for name, value in chosen.items()}
        assert torch.equal(weights, trained_alone(tmp_path / "alone", SAMConfig(**{**fields, **own})))


def test_a_trial_leaves_nothing_to_the_next(tmp_path):
    """The first trial sets the method and a field of its own, the second one neither."""
    calls = []

    def space(chosen):
        calls.append(chosen)
        gsam = {"sam_method": "gsam", "sam_alpha": 0.9, "sam_rho": 0.4}
        return {**chosen, **(gsam if len(calls) == 1 else {})}

    _, noted, tried, _ = search(tmp_path, {"learning_rate": [1e-2, 1e-3]}, space, sam=SAMConfig(rho=0.2))
    rate = tried[1]["learning_rate"]
    alone = trained_alone(tmp_path / "alone", SAMConfig(rho=0.2), learning_rate=rate)
    assert torch.equal(noted.weights[1], alone)
    assert noted.rhos[1] == pytest.approx([0.2] * STEPS)


def test_rho_zero_in_one_trial_is_no_sam_in_that_trial(tmp_path):
    _, noted, tried, _ = search(tmp_path, {"sam_rho": [0.0, 0.5]})
    for chosen, weights, names in zip(tried, noted.weights, noted.names, strict=True):
        assert bool(names) == (chosen["sam_rho"] > 0)
        assert torch.equal(weights, trained_alone(tmp_path / "alone", SAMConfig(rho=chosen["sam_rho"])))


def test_checkpoints_carry_the_trials_configuration(tmp_path):
    search(tmp_path, {"sam_rho": [0.1, 0.5]}, save_strategy="steps", save_steps=STEPS)
    files = sorted(tmp_path.glob(f"run-*/checkpoint-{STEPS}/sam_config.json"))
    assert sorted(json.loads(file.read_text())["rho"] for file in files) == [0.1, 0.5]


def test_fields_that_no_categorical_suggests(tmp_path):
    """`hp_space` may compute what it returns."""
    _, noted, tried, best = search(
        tmp_path, {"log_rho": [-2, -1]}, lambda chosen: {"sam_rho": 10.0 ** chosen["log_rho"]}
    )
    for chosen, rhos in zip(tried, noted.rhos, strict=True):
        assert rhos == pytest.approx([10.0 ** chosen["log_rho"]] * STEPS)
    assert best.hyperparameters.keys() == {"log_rho"}


@pytest.mark.parametrize(
    ("returned", "named"),
    [
        ({"sam_rhoo": 0.1}, "rhoo"),
        ({"sam_learning_rate": 0.1}, "learning_rate"),
        ({"sam_rho": -1.0}, "rho"),
        ({"sam_rho": "large"}, "rho"),
        ({"sam_method": "sham"}, "sham"),
        ({"sam_method": "sam", "sam_alpha": 0.1}, "alpha"),
        ({"sam_scope": "globe"}, "scope"),
    ],
    ids=str,
)
def test_a_field_or_value_that_is_wrong_ends_the_search(returned, named, tmp_path):
    with pytest.raises(ValueError, match=named):
        search(tmp_path, {"learning_rate": [1e-3]}, lambda chosen: {**chosen, **returned})


def test_without_model_init_it_is_the_trainers_own_error(tmp_path):
    trainer, _ = trainer_for(tmp_path, model_init=None)
    with pytest.raises(RuntimeError, match="model_init"):
        trainer.hyperparameter_search(
            hp_space=lambda trial: {"sam_rho": trial.suggest_float("sam_rho", 0.01, 0.1)}, backend="optuna", n_trials=1
        )


def test_a_search_over_no_field_of_sam_is_the_trainers_own(tmp_path):
    _, noted, tried, best = search(tmp_path, {"learning_rate": [1e-3, 1e-2]}, sam=SAMConfig(rho=0.3))
    for chosen, weights, rhos in zip(tried, noted.weights, noted.rhos, strict=True):
        alone = trained_alone(tmp_path / "alone", SAMConfig(rho=0.3), learning_rate=chosen["learning_rate"])
        assert torch.equal(weights, alone)
        assert rhos == pytest.approx([0.3] * STEPS)
    assert best.hyperparameters.keys() == {"learning_rate"}


# --- what is no Trainer --------------------------------------------------------------------------------------------


class OnlyTrains:
    """A trainer of another library, with a method of the same name and no relation."""

    def __init__(self, model=None, args=None, train_dataset=None):
        self.model = model

    def train(self):
        raise AssertionError("must not be reached")


class CallsAnother(OnlyTrains):
    """One that has a Trainer rather than being one."""

    def __init__(self, model=None, args=None, train_dataset=None):
        super().__init__(model)
        self.st_trainer = Trainer(model, args, train_dataset=train_dataset)


@pytest.mark.parametrize("base", [OnlyTrains, CallsAnother, object], ids=lambda base: base.__name__)
def test_a_base_that_is_no_trainer_is_refused(base, tmp_path):
    with pytest.raises(TypeError, match=r"transformers\.Trainer"):
        type("Mixed", (SAMTrainerMixin, base), {})(model=tiny.mlp(), args=tiny.arguments(tmp_path))


def test_a_mixin_of_ones_own_before_a_trainer_is_fine(tmp_path):
    class Mine(SAMTrainerMixin):
        pass

    class Mixed(Mine, Trainer):
        pass

    trainer = Mixed(tiny.mlp(), tiny.arguments(tmp_path), train_dataset=tiny.vectors(), sam_config=SAMConfig(rho=0.1))
    trainer.train()
    assert tiny.logged(trainer, "sam_rho") == pytest.approx([0.1] * 3)
