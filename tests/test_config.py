import copy
import dataclasses
import math
import pickle

import numpy as np
import pytest
import torch
from models import tiny_classifier, train

from hf_sam import METHODS, Ascent, SAMConfig, SAMTrainer

# (arguments, what the message has to name)
WRONG = [
    ({"method": "sma"}, "method.*Did you mean 'sam'"),
    ({"method": None}, "method"),
    ({"method": ["sam"]}, r"method=\['sam'\] is unknown"),
    ({"rho": -0.1}, r"rho=-0\.1 must be a number in \[0, inf\)"),
    ({"rho": math.inf}, "rho"),
    ({"rho": math.nan}, "rho"),
    ({"rho": "small"}, "rho='small'"),
    ({"rho": True}, "rho=True"),
    ({"p": 0.5}, r"p=0\.5 must be a number in \[1, inf\]"),
    ({"p": "two"}, "p='two'"),
    ({"adaptive": 1}, "adaptive=1 must be True or False"),
    ({"adaptive": True, "eta": -1.0}, r"eta=-1\.0"),
    ({"eta": 0.01}, "eta.*only with adaptive=True"),
    ({"scope": "rank"}, "scope='rank'.*auto, micro, device, global"),
    ({"m": 0}, "m=0 must be a whole number, at least 1"),
    ({"m": 2.5}, r"m=2\.5"),
    ({"m": 4, "scope": "global"}, "m=4.*scope='micro'"),
    ({"ascent_steps": 0}, "ascent_steps=0"),
    ({"ascent_fraction": 0.0}, r"ascent_fraction=0\.0 must be a number in \(0, 1\]"),
    ({"ascent_fraction": 1.5}, "ascent_fraction"),
    ({"interval": 0}, "interval=0"),
    ({"start": 1.5}, r"start=1\.5.*fraction"),
    ({"start": -3}, "start=-3"),
    ({"end": "late"}, "end='late'"),
    ({"start": 0.5, "end": 0.5}, "start.*below end"),
    ({"start": 10, "end": 5}, "start.*below end"),
    ({"rho_schedule": "step"}, "rho_schedule='step'.*constant, linear, cosine, lr"),
    ({"rho_min": 0.01}, "rho_min.*rho_schedule other than 'constant'"),
    ({"rho": 0.05, "rho_schedule": "lr", "rho_min": 0.1}, r"rho_min=0\.1 must be at most rho=0\.05"),
    ({"alpha": 0.4}, "alpha.*method='sam'.*gsam"),
    ({"method": "gsam", "alpha": -1.0}, "alpha"),
    ({"method": "gsam", "gamma": 0.5}, "gamma.*method='gsam'"),
    ({"method": "wsam", "gamma": 1.0}, "gamma"),
    ({"method": "esam", "beta": 0.0}, "beta"),
    ({"method": "esam", "gamma": 0.0}, "gamma"),
    ({"method": "friendly", "sigma": -0.5}, "sigma"),
    ({"method": "friendly", "ema_decay": 1.0}, r"ema_decay=1\.0 must be a number in \[0, 1\)"),
    ({"method": "msam", "p": 1.0}, "p.*method='msam'"),
    ({"method": "msam", "scope": "micro"}, "scope.*method='msam'"),
    ({"method": "looksam", "scope": "micro"}, "scope.*looksam"),
    ({"method": "looksam", "m": 4}, "m=4.*looksam"),
    ({"method": "gsam", "ascent_fraction": 0.5}, "ascent_fraction.*gsam"),
    ({"method": "asam", "second_order": True}, "second_order.*asam"),
    ({"second_order": True, "p": 1.5}, "second_order.*p"),
    ({"second_order": True, "ascent_steps": 2}, "second_order.*ascent_steps"),
    ({"perturb": ""}, "perturb"),
    ({"perturb": []}, "perturb"),
    ({"perturb": 3}, "perturb=3"),
    ({"replay_rng": "yes"}, "replay_rng='yes' must be True or False"),
    ({"stochastic_rounding": 0.5}, "stochastic_rounding"),
    ({"weight_decay_in_ascent": "no"}, "weight_decay_in_ascent"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_wrong_values_name_the_field_and_what_is_allowed(arguments, message):
    with pytest.raises(ValueError, match=message):
        SAMConfig(**arguments)


def test_defaults_are_plain_sam():
    config = SAMConfig()
    assert (config.method, config.rho, config.p, config.scope, config.perturb) == ("sam", 0.005, 2.0, "auto", "all")
    assert config.eta is config.alpha is config.gamma is config.rho_min is None


def test_the_default_rho_is_bounded_by_the_rise_of_the_loss_and_a_chosen_one_is_not():
    bounds = {method: SAMConfig(method=method).sigma for method in METHODS}
    bounded = {"sam", "wsam", "looksam", "periodic", "late", "subset", "functional"}
    assert {method for method, sigma in bounds.items() if sigma == 0.03} == bounded
    assert SAMConfig(rho=0.005).sigma is SAMConfig(method="asam").sigma is SAMConfig(method="late", rho=1).sigma is None
    assert SAMConfig(sigma=0.2).sigma == SAMConfig(sigma=0.2, rho=0.1).sigma == 0.2
    assert SAMConfig().changed(rho=0.1).sigma is SAMConfig(second_order=True).sigma is None
    with pytest.raises(ValueError, match=r"derived for plain sam only: sigma=0\.1 must be None"):
        SAMConfig(second_order=True, sigma=0.1)
    config = SAMConfig()
    config.rho = 0.1
    assert config.sigma is config.parts.ascent.sigma is None
    assert SAMConfig.from_dict(config.to_dict()) == config
    config = SAMConfig(sigma=0.2)
    config.rho = 0.1
    assert config.sigma == config.parts.ascent.sigma == 0.2


@pytest.mark.parametrize("method", METHODS)
def test_json_round_trip_of_every_method(method):
    config = SAMConfig(method=method)
    assert SAMConfig.from_json(config.to_json()) == config


def test_infinity_survives_json():
    config = SAMConfig(p=math.inf)
    assert '"inf"' in config.to_json()
    assert SAMConfig.from_json(config.to_json()).p == math.inf


def test_unknown_key_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"'roh' is not a field.*Did you mean 'rho'"):
        SAMConfig.from_dict({"roh": 0.1})


def test_method_defaults_come_from_the_table_and_give_way():
    assert (SAMConfig(method="asam").rho, SAMConfig(method="asam").eta) == (0.5, 0.01)
    assert SAMConfig(method="asam", rho=2).rho == 2.0
    gsam = SAMConfig(method="gsam", rho=0.05)
    assert gsam.rho_min == 0.05  # the paper's 0.1 would lie above the chosen rho
    assert SAMConfig(method="gsam", rho_schedule="constant").rho_min is None


def test_a_neutral_value_may_be_said_aloud():
    assert SAMConfig(method="msam", second_order=False, p=2.0) == SAMConfig(method="msam")


def test_start_keeps_steps_and_fractions_apart():
    assert SAMConfig(start=1).start == 1
    assert isinstance(SAMConfig(start=1).start, int)
    assert isinstance(SAMConfig(start=0.5, end=1.0).end, float)


@pytest.mark.parametrize("rho", [0.05, "5e-2", np.float64(0.05), np.float32(0.05)], ids=repr)
def test_the_default_of_rho_min_gives_way_to_any_form_of_a_small_rho(rho):
    config = SAMConfig(method="gsam", rho=rho)  # YAML reads 5e-2 as a string
    assert config.rho_min == config.rho == pytest.approx(0.05)


def test_numbers_of_numpy_are_numbers():
    config = SAMConfig(m=np.int64(4), start=np.int64(1), end=np.float64(0.5), ascent_steps=np.int32(2))
    assert (config.m, config.start, config.end, config.parts.ascent.ascent_steps) == (4, 1, 0.5, 2)
    assert {type(value) for value in (config.m, config.start, config.ascent_steps)} == {int}
    assert SAMConfig.from_json(config.to_json()) == config


@dataclasses.dataclass(frozen=True)
class AlongATensor(Ascent):
    direction: torch.Tensor = None


def test_a_configuration_that_no_checkpoint_can_hold_is_an_error_before_training(tmp_path):
    with pytest.raises(ValueError, match=r"AlongATensor.*cannot be written to sam_config\.json.*Tensor"):
        train(tmp_path, SAMConfig(ascent=AlongATensor(torch.ones(2))))


def test_a_field_that_is_set_too_late_is_an_error_that_shows_the_remedy():
    """Set after construction, it would be written to checkpoints without any effect on the run."""
    config = SAMConfig()
    with pytest.raises(AttributeError, match=r"p cannot be set after construction.*config\.changed\(p=1\.5\)"):
        config.p = 1.5
    assert config.changed(p=1.5).parts.ascent.p == 1.5
    with pytest.raises(ValueError, match=r"rho=-1 must be a number"):
        config.rho = -1
    config.rho = "0.1"
    assert copy.deepcopy(config).rho == pickle.loads(pickle.dumps(config)).rho == 0.1


def test_every_field_is_documented():
    for field in dataclasses.fields(SAMConfig):
        assert f"{field.name} (`" in SAMConfig.__doc__ or f"{field.name}, " in SAMConfig.__doc__


def test_sam_config_of_another_type_is_an_error(tmp_path):
    with pytest.raises(TypeError, match="sam_config must be a SAMConfig, not dict"):
        SAMTrainer(model=tiny_classifier(), sam_config={"rho": 0.05})


def test_pattern_that_matches_nothing_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"perturb: the pattern 'encoder\.\*' matches none.*first\.weight"):
        train(tmp_path, SAMConfig(perturb="encoder.*"))


def test_phase_that_never_starts_is_an_error_at_the_start_of_training(tmp_path):
    with pytest.raises(ValueError, match=r"start=100 and end=1\.0 leave no step to perturb in a run of 3 steps"):
        train(tmp_path, SAMConfig(start=100))
