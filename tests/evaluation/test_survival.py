"""The round of treatments: what is tried, in which order, what is refused, and what becomes of the model."""

from __future__ import annotations

import pytest
import torch
from test_alterations import bert, same, state_of
from torch import nn

from hf_sam.evaluation.merging import mergeable_state
from hf_sam.evaluation.survival import SurvivalConfig, Treatment, evaluate_treatments

FEW = {"bits": [4], "pruned_shares": [0.5], "noise_sizes": [0.1], "noise_draws": 2}


def logits(model):
    with torch.no_grad():
        return model(torch.arange(8)[None]).logits


def test_every_treatment_changes_the_model_and_none_stays():
    model = bert()
    before = state_of(model)
    other, start = mergeable_state(bert(seed=1)), mergeable_state(bert(seed=2))
    config = SurvivalConfig(**FEW, merge_with=["b"], merge_start="s", merge_points=[0.5], merge_scales=[1.0])
    found = list(evaluate_treatments(model, logits, config, {"b": other}, start))
    assert [entry.treatment.label for entry in found] == [
        "as trained",
        "4 bits per channel",
        "4 bits per group of 64",
        "dynamic int8",
        "50 % pruned",
        "noise of 0.1 sd",
        "noise of 0.1 sd",
        "merged with b, average",
        "task arithmetic with b, 1",
    ]
    results = [entry.result for entry in found]
    assert len({tuple(result.flatten().tolist()) for result in results}) == len(found) - 1
    assert torch.equal(results[1], results[2])  # 16 inputs are one group
    assert same(before, state_of(model))
    assert torch.equal(logits(model), results[0])


def test_a_library_that_cannot_run_is_named_and_the_rest_goes_on(monkeypatch):
    def missing(kept):
        raise ImportError("no such library")

    monkeypatch.setattr("hf_sam.evaluation.libraries.LIBRARIES", {"torchao-int8": missing})
    found = list(evaluate_treatments(bert(), logits, SurvivalConfig(treatments=["prune"], libraries=["torchao-int8"])))
    assert found[1].problem == "ImportError: no such library"
    assert found[1].result is None
    assert [entry.treatment for entry in found[2:]] == [
        Treatment("pruned", share) for share in (0.3, 0.4, 0.5, 0.6, 0.7)
    ]


def test_an_error_of_the_evaluation_is_no_matter_of_the_treatment():
    def evaluate(model):
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        list(evaluate_treatments(nn.Sequential(nn.Linear(2, 2)), evaluate, SurvivalConfig()))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"treatments": ["burn"]}, "treatments: 'burn' is unknown. Allowed: quantize"),
        ({"libraries": ["gguf"]}, "libraries: 'gguf' is unknown. Allowed: torchao-int8"),
        ({"bits": [4, 0]}, "bits: 0 must be a whole number from 1 to 16"),
        ({"group_sizes": [-1]}, "group_sizes: -1 must be a whole number, at least 0"),
        ({"pruned_shares": [1.0]}, r"pruned_shares: 1.0 must be in \(0, 1\)"),
        ({"noise_sizes": [0.0]}, "noise_sizes: 0.0 must be above 0"),
        ({"noise_draws": 0}, "noise_draws=0 must be a whole number, at least 1"),
        ({"merge_points": [2.0]}, r"merge_points: 2.0 must be in \[0, 1\]"),
        ({"bits": 4}, "bits=4 must be a list"),
        ({"bits": None}, "bits=None must be a list"),
        ({"treatments": "quantize"}, "treatments='quantize' must be a list"),
        ({"pruned_shares": ["5e-1"]}, "pruned_shares: '5e-1' must be in"),
        ({"noise_draws": "3"}, "noise_draws='3' must be a whole number"),
        ({"merge_start": "a"}, "merge_start is used only with merge_with"),
    ],
)
def test_values_out_of_range_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        SurvivalConfig(**values)
