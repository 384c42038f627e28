"""Metrics against the formula written out, example by example."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics
from transformers import EvalPrediction

from hf_sam.tasks import metrics
from hf_sam.tasks.data.language import sequence_nll

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(200, 4)) * 2
TRUE = RNG.integers(0, 4, 200)
PROBABILITIES = [[math.exp(x) / sum(math.exp(y) for y in row) for x in row] for row in LOGITS]


def measured(**kwargs):
    return metrics.classification_metrics(EvalPrediction(predictions=LOGITS, label_ids=TRUE, **kwargs))


def test_probabilistic_metrics():
    nll = sum(-math.log(row[label]) for row, label in zip(PROBABILITIES, TRUE, strict=True)) / 200
    brier = sum(
        sum((p - (k == label)) ** 2 for k, p in enumerate(row)) for row, label in zip(PROBABILITIES, TRUE, strict=True)
    )
    result = measured()
    assert result["nll"] == pytest.approx(nll, rel=1e-12)
    assert result["brier"] == pytest.approx(brier / 200, rel=1e-12)
    torch_nll = torch.nn.functional.cross_entropy(torch.tensor(LOGITS), torch.tensor(TRUE)).item()
    assert result["nll"] == pytest.approx(torch_nll, rel=1e-12)


def test_calibration_error():
    bins = [[] for _ in range(15)]
    for row, label in zip(PROBABILITIES, TRUE, strict=True):
        confidence = max(row)
        bins[min(b for b in range(15) if confidence <= (b + 1) / 15)].append(
            (confidence, row.index(confidence) == label)
        )
    ece = sum(abs(sum(c for c, _ in b) - sum(hit for _, hit in b)) for b in bins) / 200
    assert measured()["ece"] == pytest.approx(ece, rel=1e-12)


def test_calibration_error_of_a_sure_and_right_model_is_zero():
    prediction = EvalPrediction(predictions=np.eye(3) * 1000, label_ids=np.arange(3))
    result = metrics.classification_metrics(prediction)
    assert (result["ece"], result["accuracy"], result["nll"], result["brier"]) == (0, 1, 0, 0)


def test_class_metrics():
    predicted = LOGITS.argmax(axis=1)
    f1 = []
    for k in range(4):
        hit = ((predicted == k) & (k == TRUE)).sum()
        f1.append(2 * hit / ((predicted == k).sum() + (k == TRUE).sum()))
    confusion = np.array([[((i == TRUE) & (predicted == j)).sum() for j in range(4)] for i in range(4)], dtype=float)
    t, p, c, s = confusion.sum(1), confusion.sum(0), np.trace(confusion), confusion.sum()
    mcc = (c * s - t @ p) / math.sqrt((s**2 - p @ p) * (s**2 - t @ t))
    result = measured()
    assert result["accuracy"] == pytest.approx((predicted == TRUE).mean())
    assert result["f1_macro"] == pytest.approx(np.mean(f1))
    assert result["mcc"] == pytest.approx(mcc)


@pytest.mark.parametrize("diverged", [slice(None), slice(0, 50)])
def test_examples_on_which_a_classifier_has_diverged_are_wrong(diverged):
    logits = LOGITS.copy()
    logits[diverged, 2] = np.nan
    predicted = LOGITS.argmax(axis=1)
    predicted[diverged] = -1
    result = metrics.classification_metrics(EvalPrediction(predictions=logits, label_ids=TRUE))
    assert result["accuracy"] == sklearn_metrics.accuracy_score(TRUE, predicted)
    f1 = sklearn_metrics.f1_score(TRUE, predicted, labels=range(4), average="macro", zero_division=0)
    assert result["f1_macro"] == pytest.approx(f1, rel=1e-12)
    assert result["mcc"] == pytest.approx(sklearn_metrics.matthews_corrcoef(TRUE, predicted), rel=1e-12)
    assert math.isnan(result["nll"])


def test_correlations():
    x, y = RNG.normal(size=50), RNG.normal(size=50)
    result = metrics.regression_metrics(EvalPrediction(predictions=x[:, None], label_ids=y))
    ranks = [np.argsort(np.argsort(v)) for v in (x, y)]
    assert result["pearson"] == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert result["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert result["mse"] == pytest.approx(((x - y) ** 2).mean())


def test_correlation_with_a_constant_is_zero_not_nan():
    result = metrics.regression_metrics(EvalPrediction(predictions=np.ones((5, 1)), label_ids=np.arange(5.0)))
    assert (result["pearson"], result["spearman"]) == (0, 0)


def test_a_diverged_regression_has_no_scores_and_no_error():
    diverged = EvalPrediction(predictions=np.array([[1.0], [np.nan]]), label_ids=np.arange(2.0))
    assert all(math.isnan(value) for value in metrics.regression_metrics(diverged).values())


def test_values_of_hub_metrics_that_are_not_numbers_are_left_out():
    class Metric:
        def compute(self, predictions, references):
            return {"f1": np.float64(0.5), "matrix": np.eye(2), "per_class": [0.1, 0.2], "correct": 3}

    assert metrics.of_hub([Metric()], None, None) == {"f1": 0.5, "correct": 3}


def test_label_sets():
    logits, truth = np.array([[1.0, -1], [1, 1], [-1, -1]]), np.array([[1.0, 0], [1, 0], [0, 1]])
    result = metrics.multi_label_metrics(EvalPrediction(predictions=logits, label_ids=truth))
    assert result["subset_accuracy"] == pytest.approx(1 / 3)
    assert result["f1_micro"] == pytest.approx(2 * 2 / (3 + 3))
    assert result["f1_macro"] == pytest.approx((1 + 0) / 2)


@pytest.fixture
def language_batch():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, 11, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 11, (3, 7), generator=generator)
    labels[0, 5:] = -100
    labels[1, :3] = -100
    return logits, labels


def test_perplexity_weighs_tokens_not_sequences(language_batch):
    logits, labels = language_batch
    sums, counts = sequence_nll(logits, labels)
    result = metrics.perplexity_metrics(EvalPrediction(predictions=sums.numpy(), label_ids=counts.numpy()))
    losses = [
        -torch.log_softmax(logits[i, t - 1].float(), -1)[labels[i, t]].item()
        for i in range(3)
        for t in range(1, 7)
        if labels[i, t] != -100
    ]
    assert result["tokens"] == len(losses) == 4 + 4 + 6
    assert result["nll_per_token"] == pytest.approx(np.mean(losses), rel=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-6)


def test_sequences_in_one_row_count_as_they_do_apart(language_batch):
    logits, labels = language_batch
    apart = sequence_nll(logits, labels)
    flat = labels.clone()
    flat[:, 0] = -100  # as TRL's collator does without padding
    positions = torch.arange(7).repeat(3)[None]
    together = sequence_nll(logits.reshape(1, 21, 11), flat.reshape(1, 21), positions)
    assert torch.allclose(together[0], apart[0])
    assert torch.equal(together[1], apart[1])
