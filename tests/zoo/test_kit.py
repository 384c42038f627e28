"""The comparison itself: what is no stock run is told as such."""

from __future__ import annotations

import random

import pytest
import torch
from integration import tiny
from transformers import Trainer
from zoo import kit

from hf_sam import SAMConfig


def build(tmp_path, model=tiny.mlp):
    def builder(cls, **sam):
        data = tiny.vectors()
        return cls(model=model(), args=kit.arguments(tmp_path), train_dataset=data, eval_dataset=data[:4], **sam)

    return builder


def test_a_perturbation_that_matters_is_told(tmp_path):
    with pytest.raises(AssertionError, match=r"(?s)the stock run repeats itself.*after step 1: model\.first\.weight"):
        kit.assert_same_as_stock(build(tmp_path), sam=SAMConfig(rho=0.5))


def test_one_pass_is_no_run_of_two_passes(tmp_path):
    with pytest.raises(AssertionError, match="no run of two passes"):
        kit.assert_same_as_stock(build(tmp_path), sam=SAMConfig(rho=0))


@pytest.mark.parametrize(
    "where", ["a buffer", "a plain tensor", "a number", "a list", "a generator", "the random state"]
)
def test_whatever_one_kind_of_run_does_more_is_told(where, tmp_path):
    class Moving(Trainer):
        def compute_loss(self, model, *args, **kwargs):
            if "SAM" in type(self).__name__ and model.training:
                if where == "the random state":
                    torch.rand(1)
                elif where == "a number":
                    model.count += 1
                elif where == "a list":
                    model.seen.append(model.count)
                elif where == "a generator":
                    model.dice["own"].random()
                else:
                    model.level.add_(1)
            return super().compute_loss(model, *args, **kwargs)

    def model():
        mlp = tiny.mlp()
        mlp.count, mlp.seen, mlp.dice = 0, [], {"own": random.Random(0)}
        if where == "a buffer":
            mlp.register_buffer("level", torch.zeros(1), persistent=False)
        else:
            mlp.level = torch.zeros(1)
        return mlp

    expected = {
        "a number": r"model\.count",
        "a list": r"model\.seen\[0\]",
        "a generator": r"model\.dice\[own\]",
        "the random state": "random state: torch",
    }.get(where, r"model\.level")
    with pytest.raises(AssertionError, match=expected):
        kit.assert_same_as_stock(build(tmp_path, model), Moving)


def test_runs_that_are_never_the_same_are_told(tmp_path):
    seeds = iter(range(100))

    def model():
        torch.manual_seed(next(seeds))
        return tiny.Mlp()

    with pytest.raises(AssertionError, match="the stock run does not repeat itself either"):
        kit.assert_same_as_stock(build(tmp_path, model))
