"""Metrics with the interface of `evaluate` that need no network: scikit-learn and scipy underneath."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import evaluate
import numpy as np
from datasets import Features, Value
from datasets import Sequence as SequenceOf
from scipy import special, stats
from sklearn import metrics as sklearn_metrics
from transformers import EvalPrediction

from .command_line.errors import UserError, one_line

ECE_BINS = 15
# What is measured of each kind of prediction, beside the loss; a comparison asks about one of them.
CLASSIFICATION = ("accuracy", "f1_macro", "mcc", "nll", "ece", "brier", "loss")
MULTI_LABEL = ("subset_accuracy", "f1_micro", "f1_macro", "loss")
REGRESSION = ("pearson", "spearman", "mse", "loss")
LANGUAGE = ("perplexity", "nll_per_token", "loss")
_CLASS = Value("int64")
_NUMBER = Value("float64")


class _Local(evaluate.Metric):
    """A metric computed here, from predictions and references that fit in memory."""

    predictions: Any = _CLASS
    references: Any = _CLASS

    def __init__(self):
        super().__init__(keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation="",
            inputs_description="predictions and references, one entry an example",
            features=Features({"predictions": self.predictions, "references": self.references}),
        )


class Accuracy(_Local):
    """Share of examples whose class is predicted."""

    def _compute(self, predictions, references):
        return {"accuracy": float(sklearn_metrics.accuracy_score(references, predictions))}


class MacroF1(_Local):
    """F1 of each class that occurs or is predicted, averaged with equal weights."""

    def _compute(self, predictions, references):
        return {"f1_macro": float(sklearn_metrics.f1_score(references, predictions, average="macro", zero_division=0))}


class MCC(_Local):
    """Matthews correlation coefficient, in [-1, 1]; 0 is chance, also where classes are unbalanced."""

    def _compute(self, predictions, references):
        return {"mcc": float(sklearn_metrics.matthews_corrcoef(references, predictions))}


class _OfProbabilities(_Local):
    predictions = SequenceOf(_NUMBER)  # one probability a class, each row sums to 1


class NLL(_OfProbabilities):
    """Mean negative log-likelihood of the true class, in nats."""

    def _compute(self, predictions, references):
        true = np.take_along_axis(np.asarray(predictions), np.asarray(references)[:, None], axis=1)
        return {"nll": float(-np.log(np.maximum(true, np.finfo(float).tiny)).mean())}


class ECE(_OfProbabilities):
    """Expected calibration error of the predicted class in 15 equal-width bins (Guo et al. 2017, Equation 3)."""

    def _compute(self, predictions, references):
        probabilities, references = np.asarray(predictions), np.asarray(references)
        confidence = probabilities.max(axis=1)
        correct = probabilities.argmax(axis=1) == references
        bins = np.clip(np.ceil(confidence * ECE_BINS).astype(int) - 1, 0, ECE_BINS - 1)  # (low, high]
        gap = np.bincount(bins, weights=correct - confidence, minlength=ECE_BINS)
        return {"ece": float(np.abs(gap).sum() / len(references))}


class Brier(_OfProbabilities):
    """Squared distance of the probabilities from the one-hot truth, summed over classes (Brier 1950), in [0, 2]."""

    def _compute(self, predictions, references):
        probabilities = np.asarray(predictions)
        truth = np.eye(probabilities.shape[1])[np.asarray(references)]
        return {"brier": float(((probabilities - truth) ** 2).sum(axis=1).mean())}


class _OfNumbers(_Local):
    predictions = _NUMBER
    references = _NUMBER


class Pearson(_OfNumbers):
    """Linear correlation; 0 where one side is constant."""

    def _compute(self, predictions, references):
        return {"pearson": _correlation(stats.pearsonr, predictions, references)}


class Spearman(_OfNumbers):
    """Rank correlation; 0 where one side is constant."""

    def _compute(self, predictions, references):
        return {"spearman": _correlation(stats.spearmanr, predictions, references)}


class MSE(_OfNumbers):
    """Mean squared error."""

    def _compute(self, predictions, references):
        return {"mse": float(sklearn_metrics.mean_squared_error(references, predictions))}


class Perplexity(_Local):
    """exp of the negative log-likelihood a token: predictions are its sums, references the tokens of each example."""

    predictions = _NUMBER

    def _compute(self, predictions, references):
        nll = float(np.sum(predictions) / max(1, np.sum(references)))
        return {"nll_per_token": nll, "perplexity": float(np.exp(nll)), "tokens": int(np.sum(references))}


class _OfSets(_Local):
    predictions = SequenceOf(_CLASS)  # 0 or 1 for every label
    references = SequenceOf(_CLASS)


class SubsetAccuracy(_OfSets):
    """Share of examples all of whose labels are predicted, and no other."""

    def _compute(self, predictions, references):
        return {"subset_accuracy": float(sklearn_metrics.accuracy_score(np.array(references), np.array(predictions)))}


class MultiLabelF1(_OfSets):
    """F1 over all pairs of example and label, and averaged over labels."""

    def _compute(self, predictions, references):
        truth, predicted = np.array(references), np.array(predictions)
        return {
            f"f1_{average}": float(sklearn_metrics.f1_score(truth, predicted, average=average, zero_division=0))
            for average in ("micro", "macro")
        }


def _correlation(function: Callable, predictions, references) -> float:
    if np.ptp(predictions) == 0 or np.ptp(references) == 0:
        return 0.0
    return float(function(predictions, references).statistic)


# --- what Trainer calls --------------------------------------------------------------------------------------------


def classification_metrics(prediction: EvalPrediction, hub: Sequence[evaluate.EvaluationModule] = ()) -> dict:
    """All metrics of single-label classification from logits `(n, classes)` and labels `(n,)`."""
    probabilities, labels = class_probabilities(prediction.predictions), prediction.label_ids
    classes = probabilities.argmax(axis=1)
    return _compute((Accuracy(), MacroF1(), MCC(), *hub), classes, labels) | _compute(
        (NLL(), ECE(), Brier()), probabilities, labels
    )


def regression_metrics(prediction: EvalPrediction, hub: Sequence[evaluate.EvaluationModule] = ()) -> dict:
    """Pearson, Spearman and squared error from outputs `(n, 1)` and labels `(n,)`."""
    values = np.asarray(logits_of(prediction.predictions), dtype=float).reshape(-1)
    return _compute((Pearson(), Spearman(), MSE(), *hub), values, np.reshape(prediction.label_ids, -1))


def multi_label_metrics(prediction: EvalPrediction, hub: Sequence[evaluate.EvaluationModule] = ()) -> dict:
    """Subset accuracy and F1 from logits and 0 / 1 labels, both `(n, labels)`; a label is predicted above 1/2."""
    predicted = (logits_of(prediction.predictions) > 0).astype(int)
    return _compute((SubsetAccuracy(), MultiLabelF1(), *hub), predicted, prediction.label_ids.astype(int))


def perplexity_metrics(prediction: EvalPrediction, hub: Sequence[evaluate.EvaluationModule] = ()) -> dict:
    """Token-weighted loss and perplexity from what `TokenWeightedEvaluation` predicts, both `(n,)`."""
    return _compute((Perplexity(), *hub), prediction.predictions, prediction.label_ids)


def logits_of(predictions) -> np.ndarray:
    """The logits, where a model returns more than them."""
    return predictions[0] if isinstance(predictions, tuple) else predictions


def class_probabilities(predictions) -> np.ndarray:
    """Softmax of the logits in float64, `(n, classes)`."""
    return special.softmax(np.asarray(logits_of(predictions), dtype=np.float64), axis=1)


def hub_metrics(names: Sequence[str] | None) -> list[evaluate.EvaluationModule]:
    """
    Metrics of the hub by name.

    Raises:
        UserError: One does not exist, or the hub cannot be reached.
    """
    loaded = []
    for name in names or []:
        try:
            loaded.append(evaluate.load(name))
        except Exception as error:  # many kinds: no file, no network, a package it needs
            raise UserError(f"hub_metrics: {name} cannot be loaded from the hub: {one_line(error)}") from error
    return loaded


def _compute(metrics: Sequence[evaluate.EvaluationModule], predictions, references) -> dict[str, float]:
    result: dict[str, float] = {}
    for metric in metrics:
        result |= metric.compute(predictions=predictions, references=references)
    return result
