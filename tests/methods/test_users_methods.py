"""Methods written outside of the package: composed, checked, stored, resumed, sent to other processes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from typing import ClassVar

import oracles
import pytest
import torch
from models import OrderedSAMTrainer, arguments, examples, stack, tiny_classifier, weights

from hf_sam import Ascent, Descent, Needs, SAMConfig
from hf_sam.methods import (
    Carried,
    Friendly,
    Functional,
    HardestHit,
    Momentum,
    Noise,
    Previous,
    RandomTensors,
    Reused,
    Steepest,
    SurrogateGap,
    ThroughPerturbation,
    Weighted,
    number,
)
from hf_sam.methods.users import load_part
from hf_sam.testing import check_method

LR, RHO = 0.1, 0.2


@dataclass(frozen=True)
class LossBudget(Ascent):
    """The radius at which the linearised loss rises by sigma (LE-SAM, arXiv 2605.10183)."""

    sigma: float = 0.05

    def eps(self, g, step):
        return g * ((self.sigma / g.norm()).clamp(max=step.rho) / g.norm())


class Average(Ascent):
    memory = ("mean",)

    def eps(self, g, step):
        mean = step.memory.get("mean")
        d = g if mean is None else mean
        return d * (step.rho / d.norm())

    def after(self, gradient, step):
        mean = step.memory.get("mean")
        step.memory["mean"] = gradient.clone() if mean is None else mean * 0.9 + gradient * 0.1


class Half(Descent):
    needs = Needs.CLEAN_GRADIENT

    def gradient(self, g, g_s, step):
        return (g + g_s) * 0.5


@dataclass(frozen=True)
class Bounded(Ascent):
    share: float = number(0.5, 0, 1, above=True)

    def eps(self, g, step):
        return g * (step.rho * self.share / g.norm())


def trainer_for(folder, config, *, dropout=0.0, **options):
    return OrderedSAMTrainer(
        model=tiny_classifier(dropout=dropout),
        args=arguments(folder, **{"per_device_train_batch_size": 8, "learning_rate": LR, **options}),
        train_dataset=examples(8),
        sam_config=config,
    )


def trained(folder, config, **options):
    trainer = trainer_for(folder, config, **options)
    trainer.train()
    return oracles.flatten(oracles.used_parameters(trainer.model))


# --- oracles: eps and the descent of every class, written as functions that can be put together --------------------------


def steepest(g, w, state, step):
    return oracles.eps_of(g, RHO, 2)


def friendly(g, w, state, step):
    m = state.get("m", torch.zeros_like(g))
    state["m"] = 0.9 * m + 0.1 * g
    return oracles.eps_of(g - m, RHO, 2)


def previous(g, w, state, step):
    return oracles.eps_of(state["step"], RHO, 2) if "step" in state else torch.zeros_like(w)


def loss_budget(g, w, state, step):
    return min(0.05 / g.norm(), RHO) * g / g.norm()


def average(g, w, state, step):
    d = state.get("mean", g)
    return RHO * d / d.norm()


ASCENTS = {
    "steepest": (Steepest(), steepest),
    "p = 3": (Steepest(p=3), lambda g, w, state, step: oracles.eps_of(g, RHO, 3)),
    "adaptive": (Steepest(adaptive=True), lambda g, w, state, step: oracles.eps_adaptive(g, w, RHO, 0.01)),
    "friendly": (Friendly(), friendly),
    "all tensors": (RandomTensors(beta=1.0), steepest),
    "carried": (Carried(), steepest),
    "previous": (Previous(), previous),
    "loss budget": (LossBudget(), loss_budget),
    "average": (Average(), average),
}
DESCENTS = {
    "plain": (Descent(), lambda g, g_s: g_s),
    "gap": (SurrogateGap(), lambda g, g_s: g_s - 0.4 * (g - (g @ g_s) / (g_s @ g_s) * g_s)),
    "weighted": (Weighted(), lambda g, g_s: (-0.8 * g + 0.9 * g_s) / 0.1),
    "reused": (Reused(), lambda g, g_s: g_s),
    "all examples": (HardestHit(gamma=1.0), lambda g, g_s: g_s),
    "half": (Half(), lambda g, g_s: (g + g_s) / 2),
}


@pytest.mark.parametrize("descent", DESCENTS)
@pytest.mark.parametrize("ascent", ASCENTS)
def test_any_ascent_goes_with_any_descent(tmp_path, ascent, descent):
    """Against the same two functions on one flat vector, over three steps."""
    (own_ascent, eps), (own_descent, combine) = ASCENTS[ascent], DESCENTS[descent]
    actual = trained(tmp_path, SAMConfig(ascent=own_ascent, descent=own_descent, rho=RHO))
    loss = oracles.loss_function(tiny_classifier(), stack(examples(8)))
    w, state = oracles.flatten(oracles.used_parameters(tiny_classifier())), {}
    for step in range(3):
        g = oracles.gradient(loss, w)
        gradient = combine(g, oracles.gradient(loss, w + eps(g, w, state, step)))
        state["step"] = gradient
        state["mean"] = gradient if "mean" not in state else 0.9 * state["mean"] + 0.1 * gradient
        w = w - LR * gradient
    torch.testing.assert_close(actual, w, rtol=0, atol=1e-12)


PAIRS = [
    (Friendly(), Functional()),
    (RandomTensors(), HardestHit()),
    (LossBudget(), Functional()),
    (Average(), HardestHit()),
    (Noise(), Descent()),
    (Noise(), Functional()),
    (Momentum(), HardestHit()),
    (Carried(), SurrogateGap()),
    (Friendly(sigma=0.5), Reused()),
    (LossBudget(), ThroughPerturbation()),
]


@pytest.mark.parametrize(("ascent", "descent"), PAIRS, ids=lambda part: type(part).__name__)
def test_pairs_keep_to_what_every_method_keeps_to(ascent, descent):
    check_method(SAMConfig(ascent=ascent, descent=descent, rho=0.1), processes=1)


@pytest.mark.parametrize(
    "parts", [{"ascent": LossBudget(sigma=0.02)}, {"ascent": Average()}, {"descent": Half()}], ids=str
)
def test_the_classes_of_the_guide_pass_the_conformance_suite(parts):
    check_method(SAMConfig(**parts, rho=0.1), processes=1)


# --- in files ------------------------------------------------------------------------------------------------------------


def test_a_users_class_is_stored_by_its_path_and_fields(tmp_path):
    config = SAMConfig(ascent=LossBudget(sigma=0.02), descent=Half(), rho=0.1)
    trainer_for(tmp_path, config, max_steps=1, save_strategy="steps", save_steps=1).train()
    stored = json.loads((tmp_path / "checkpoint-1" / "sam_config.json").read_text())
    assert stored["ascent"] == {"class": f"{__name__}:LossBudget", "sigma": 0.02}
    assert stored["descent"] == {"class": f"{__name__}:Half"}
    assert SAMConfig.from_json(json.dumps(stored)) == config


def test_resuming_with_other_fields_of_a_users_class_names_the_difference(tmp_path):
    trainer_for(
        tmp_path, SAMConfig(ascent=LossBudget(sigma=0.02)), max_steps=2, save_strategy="steps", save_steps=1
    ).train()
    other = trainer_for(tmp_path, SAMConfig(ascent=LossBudget(sigma=0.03)), max_steps=2)
    with pytest.raises(ValueError, match=r"(?s)another SAM configuration: ascent was .*0\.02.* and is now .*0\.03"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_memory_of_a_users_class_resumes_bitwise(tmp_path):
    options = {"dropout": 0.3, "max_steps": 5, "save_strategy": "steps", "save_steps": 2}
    whole = trainer_for(tmp_path, SAMConfig(ascent=Average(), rho=RHO), **options)
    whole.train()
    resumed = trainer_for(tmp_path / "resumed", SAMConfig(ascent=Average(), rho=RHO), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(map(torch.equal, weights(whole), weights(resumed)))


class AwayFromTheStart(Ascent):
    """Keeps what it is given, without a copy: the first weights, and the last gradient before it is clipped."""

    memory = ("start", "last", "same")

    def eps(self, g, step):
        if "start" not in step.memory:
            step.memory["start"] = step.weights
        d = step.weights - step.memory["start"] + step.memory.get("last", g)
        return d * (step.rho / d.norm())

    def after(self, gradient, step):
        step.memory["last"] = gradient
        step.memory["same"] = step.memory["last"]


def test_memory_of_values_that_change_later_resumes_bitwise(tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "max_grad_norm": 0.01, "learning_rate": 1.0}
    config = SAMConfig(ascent=AwayFromTheStart(), rho=RHO)
    whole = trainer_for(tmp_path, config, **options)
    whole.train()
    resumed = trainer_for(tmp_path / "resumed", config, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(map(torch.equal, weights(whole), weights(resumed)))


def test_a_file_never_imports_a_module(tmp_path, monkeypatch):
    (tmp_path / "never_imported.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    text = json.dumps({"ascent": {"class": "never_imported:Mine"}})
    with pytest.raises(
        ValueError, match=r"never_imported:Mine: the module never_imported is not imported.*import never_imported"
    ):
        SAMConfig.from_json(text)


@pytest.mark.slow
def test_a_class_of_the_script_itself_is_stored_resumed_and_sent(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
            from dataclasses import dataclass
            from hf_sam import Ascent, SAMConfig
            from hf_sam.testing import check_method

            @dataclass(frozen=True)
            class Mine(Ascent):
                share: float = 0.5
                def eps(self, g, step):
                    return g * (step.rho * self.share / g.norm())

            if __name__ == "__main__":
                config = SAMConfig(ascent=Mine(share=0.25))
                assert '"__main__:Mine"' in config.to_json()
                assert SAMConfig.from_json(config.to_json()) == config
                print(check_method(config))
        """)
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "holds     two processes" in done.stdout
    assert "arning" not in done.stderr


# --- errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_module_here:Mine", r"the module no_such_module_here cannot be imported"),
        ("json:loads", r"json:loads is not a subclass of hf_sam\.Ascent"),
        ("hf_sam.methods:Steepst", r"Did you mean 'Steepest'\?"),
        ("hf_sam.methods", r"must be the path of a class, as in my_package\.my_module:MyClass"),
    ],
)
def test_a_path_that_leads_to_no_ascent(path, message):
    with pytest.raises(ValueError, match=message):
        load_part(path, Ascent)


def test_a_path_that_leads_to_an_ascent():
    assert load_part("hf_sam.methods:Friendly", Ascent) is Friendly


@pytest.mark.parametrize("share", [0.0, 1.5, math.nan, "much", True])
def test_a_field_out_of_range_is_named(share):
    with pytest.raises(ValueError, match=r"share=.* must be a number in \(0, 1\]"):
        Bounded(share=share)


class WithItsOwnInit(Ascent):
    def __init__(self, heat=1.0):
        self.heat = heat

    def eps(self, g, step):
        return g * self.heat


class WithoutTheDecorator(Steepest):
    needs: ClassVar = Needs.GRADIENT
    heat: float = 1.0


class Fixed(Steepest):
    """Sets only a field, and is created by its fields as any other."""

    def __init__(self, ascent_steps=2, **fields):
        super().__init__(ascent_steps=ascent_steps, **fields)


@pytest.mark.parametrize("ascent", [WithItsOwnInit(2.0), WithoutTheDecorator()])
def test_a_hyperparameter_that_checkpoints_would_lose_is_an_error(ascent):
    with pytest.raises(ValueError, match=r": heat would be missing in checkpoints.*@dataclass\(frozen=True\).*`heat: "):
        SAMConfig(ascent=ascent)


def test_an_init_that_sets_fields_only_is_kept():
    config = SAMConfig(ascent=Fixed(3))
    assert SAMConfig.from_json(config.to_json()).ascent.ascent_steps == 3


def test_a_class_instead_of_an_object_is_an_error_that_shows_the_object():
    with pytest.raises(ValueError, match=r"must be an Ascent: give Bounded\(\)"):
        SAMConfig(ascent=Bounded)


def test_a_field_that_a_users_ascent_has_not_is_an_error():
    with pytest.raises(ValueError, match=r"gamma=0\.5 is not used by method='Bounded'"):
        SAMConfig(ascent=Bounded(), gamma=0.5)


class WrongShape(Ascent):
    def eps(self, g, step):
        return g.map(lambda t: t.reshape(-1))


class ChoosesByMask(Ascent):
    def examples(self, inputs, step):
        return inputs["labels"] == 0

    def eps(self, g, step):
        return g * (step.rho / g.norm())


class ChoosesByList(ChoosesByMask):
    def examples(self, inputs, step):
        return [0, 1]


class PerturbsByMask(ChoosesByMask):
    tail_weight, part = 1.0, None

    def examples(self, inputs, step):
        return None

    def perturbed_examples(self, inputs, step):
        return inputs["labels"] == 0


class ChoosesUnknownNames(PerturbsByMask):
    perturbed_examples = Ascent.perturbed_examples

    def parameters(self, names, step):
        return ["first.weights"]


class Undeclared(Ascent):
    def eps(self, g, step):
        return step.memory["mean"]


@pytest.mark.parametrize(
    ("ascent", "message"),
    [
        (WrongShape(), r"WrongShape\.eps must have the shape of the weights: for first\.weight"),
        (Undeclared(), r"step\.memory\['mean'\] without declaring it: write memory = \('mean',\)"),
        (Ascent(), r"Ascent must define eps\(g, step\)"),
        (ChoosesByMask(), r"ChoosesByMask\.examples must return a 1-dim tensor of the examples' indices.*nonzero"),
        (ChoosesByList(), r"ChoosesByList\.examples must return a 1-dim tensor"),
        (PerturbsByMask(), r"PerturbsByMask\.perturbed_examples must return a 1-dim tensor"),
        (ChoosesUnknownNames(), r"ChoosesUnknownNames\.parameters must return some of the names.*first\.weights"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Ascent) else "",
)
def test_mistakes_of_an_ascent_are_errors_that_name_them(tmp_path, ascent, message):
    with pytest.raises((ValueError, NotImplementedError), match=message):
        trained(tmp_path, SAMConfig(ascent=ascent))


class PlainSam(ChoosesByMask):
    examples = Ascent.examples


class PerturbsAll(PerturbsByMask):
    def perturbed_examples(self, inputs, step):
        return None


def test_an_ascent_that_may_perturb_for_some_examples_perturbs_for_all(tmp_path):
    ours, plain = (trained(tmp_path, SAMConfig(ascent=ascent, rho=RHO)) for ascent in (PerturbsAll(), PlainSam()))
    assert torch.equal(ours, plain)


def test_the_realised_size_is_logged_where_gradients_have_been_accumulated_before(tmp_path):
    """As in ImbSAM, whose common examples go first: the log would otherwise warn of a perturbation that is lost."""
    config = SAMConfig(method="imbsam", rho=RHO, options={"tail_classes": [0]})
    trainer = trainer_for(tmp_path, config, max_steps=2)
    trainer.train()
    assert trainer.state.log_history[0]["sam_perturbation_norm"] == pytest.approx(RHO, rel=1e-5)
