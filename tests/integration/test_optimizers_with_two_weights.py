"""Optimizers whose `train()` and `eval()` move the weights, as schedule-free ones do, with evaluations between the steps."""

from __future__ import annotations

import pytest
import torch
from integration import equivalence, tiny
from integration.equivalence import FEWER_PASSES, SETTINGS, assert_like_stock, both
from transformers import TrainerCallback

from hf_sam import SAMConfig

METHODS = [{}, *FEWER_PASSES[:2], *FEWER_PASSES[3:]]  # neither optimizer keeps a momentum that msam could read


class ScheduleFree(torch.optim.Optimizer):
    """Schedule-free SGD (Defazio et al. 2024): gradients at y, evaluation at x, steps on z."""

    beta = 0.9

    def __init__(self, parameters, lr=0.1):
        super().__init__(parameters, {"lr": lr, "train_mode": False, "k": 0})

    @torch.no_grad()
    def _move(self, train: bool, weight: float):
        for group in self.param_groups:
            if group["train_mode"] != train:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.lerp_(self.state[p]["z"], weight)
                group["train_mode"] = train

    def train(self):
        self._move(True, 1 - self.beta)

    def eval(self):
        self._move(False, 1 - 1 / self.beta)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            assert group["train_mode"], "the optimizer steps from the weights of training"
            c = 1 / (group["k"] + 1)
            for p in group["params"]:
                if p.grad is None:
                    continue
                z = self.state[p].setdefault("z", p.clone())
                p.lerp_(z, c).add_(p.grad, alpha=group["lr"] * (self.beta * (1 - c) - 1))
                z.sub_(p.grad, alpha=group["lr"])
            group["k"] += 1


class Averaging(torch.optim.SGD):
    """Evaluates at an average of the weights, which it puts in the parameters' place."""

    def __init__(self, parameters, lr=0.1):
        super().__init__(parameters, lr=lr)
        self.averages = {p: p.detach().clone() for group in self.param_groups for p in group["params"]}
        self.is_training = True

    def _swap(self):
        for p, average in self.averages.items():
            self.averages[p], p.data = p.data, average
        self.is_training = not self.is_training

    def train(self):
        if not self.is_training:
            self._swap()

    def eval(self):
        if self.is_training:
            self._swap()

    def step(self, closure=None):
        assert self.is_training, "the optimizer steps from the weights of training"
        super().step(closure)
        with torch.no_grad():
            for p, average in self.averages.items():
                average.lerp_(p, 0.2)


OPTIMIZERS = [ScheduleFree, Averaging]
EVALUATING = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 6, "max_grad_norm": 0.0}


def extra(optimizer):
    return lambda model: {
        "optimizers": (optimizer(list(model.parameters())), None),
        "eval_dataset": tiny.vectors(8),
    }


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: o.__name__)
@pytest.mark.parametrize("eval_steps", [1, 2])
@pytest.mark.parametrize(("scope", "accumulation"), SETTINGS)
def test_evaluation_between_steps_as_in_the_stock_trainer(optimizer, eval_steps, scope, accumulation, tmp_path):
    runs = both(tmp_path, scope, accumulation, extra=extra(optimizer), **{**EVALUATING, "eval_steps": eval_steps})
    assert_like_stock(*runs)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: o.__name__)
@pytest.mark.parametrize("method", METHODS[1:], ids=lambda method: method["method"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_evaluation_between_steps_where_there_are_fewer_passes(optimizer, method, accumulation, tmp_path):
    runs = both(tmp_path, accumulation=accumulation, sam=method, extra=extra(optimizer), **EVALUATING)
    assert_like_stock(*runs, perturbs=False)


class NoteModes(TrainerCallback):
    """What the weights of training are before a step's passes, by the optimizer's own rule, and what they are after."""

    def __init__(self):
        self.expected, self.found = [], []

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        inner = getattr(optimizer, "optimizer", optimizer)
        weights = []
        for group in inner.param_groups:
            for p in group["params"]:
                if isinstance(inner, Averaging):
                    weights.append(p if inner.is_training else inner.averages[p])
                elif group["train_mode"] or "z" not in inner.state[p]:
                    weights.append(p)
                else:
                    weights.append(p.detach().lerp(inner.state[p]["z"], 1 - inner.beta))
        self.expected.append([w.detach().clone() for w in weights])

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found.append([p.detach().clone() for p in model.parameters()])


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: o.__name__)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.get("method", "sam"))
@pytest.mark.parametrize(("scope", "accumulation"), [("device", 1), ("micro", 2), ("device", 2)])
def test_weights_of_training_are_restored_bitwise(optimizer, method, scope, accumulation, tmp_path):
    """At a rho that matters: what the optimizer steps from is what its own `train()` makes of the weights."""
    noted = NoteModes()
    takes_scope = method.get("method") in (None, "periodic")
    trainer = equivalence.trained(
        SAMConfig(rho=0.5, **method, **({"scope": scope} if takes_scope else {})),
        tmp_path,
        extra=extra(optimizer),
        callbacks=lambda: [noted],
        gradient_accumulation_steps=accumulation,
        **EVALUATING,
    )
    assert len(noted.found) == 6
    for expected, found in zip(noted.expected, noted.found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    if method.get("method") not in ("carried", "periodic", "previous"):
        assert tiny.logged(trainer, "sam_perturbation_norm") == pytest.approx([0.5] * 6, rel=1e-4)
