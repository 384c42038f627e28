"""What the Trainer calls to measure predictions; needs no network, unless metrics of the hub are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import special, stats
from sklearn import metrics as sklearn_metrics
from transformers import EvalPrediction

from ..evaluation import classification
from ..evaluation.predictions import Predictions
from .command_line.errors import UserError, one_line

# What is measured of each kind of prediction, beside the loss; a comparison asks about one of them.
CLASSIFICATION = (*classification.CLASSIFICATION, "loss")
MULTI_LABEL = ("subset_accuracy", "f1_micro", "f1_macro", "loss")
REGRESSION = ("pearson", "spearman", "mse", "loss")
LANGUAGE = ("perplexity", "nll_per_token", "loss")


def classification_metrics(prediction: EvalPrediction, hub: Sequence[Any] = ()) -> dict[str, float]:
    """All metrics of single-label classification from logits `(n, classes)` and labels `(n,)`."""
    kept = Predictions(prediction.label_ids, class_probabilities(prediction.predictions))
    found = {name: metric(kept) for name, metric in classification.CLASSIFICATION.items()}
    return found | of_hub(hub, kept.predicted, kept.labels)


def regression_metrics(prediction: EvalPrediction, hub: Sequence[Any] = ()) -> dict[str, float]:
    """Pearson, Spearman and squared error from outputs `(n, 1)` and labels `(n,)`."""
    values = np.asarray(logits_of(prediction.predictions), dtype=float).reshape(-1)
    labels = np.reshape(prediction.label_ids, -1)
    return {
        "pearson": _correlation(stats.pearsonr, values, labels),
        "spearman": _correlation(stats.spearmanr, values, labels),
        "mse": float(sklearn_metrics.mean_squared_error(labels, values)),
        **of_hub(hub, values, labels),
    }


def multi_label_metrics(prediction: EvalPrediction, hub: Sequence[Any] = ()) -> dict[str, float]:
    """Subset accuracy and F1 from logits and 0 / 1 labels, both `(n, labels)`; a label is predicted above 1/2."""
    predicted = (logits_of(prediction.predictions) > 0).astype(int)
    labels = prediction.label_ids.astype(int)
    found = {"subset_accuracy": float(sklearn_metrics.accuracy_score(labels, predicted))}
    for average in ("micro", "macro"):
        f1 = sklearn_metrics.f1_score(labels, predicted, average=average, zero_division=0)
        found[f"f1_{average}"] = float(f1)
    return found | of_hub(hub, predicted, labels)


def perplexity_metrics(prediction: EvalPrediction, hub: Sequence[Any] = ()) -> dict[str, float]:
    """
    Token-weighted loss and perplexity from what `TokenWeightedEvaluation` predicts: the summed negative log-likelihood
    of each example and its number of tokens, both `(n,)`.
    """
    sums, tokens = prediction.predictions, prediction.label_ids
    return perplexity(sums, tokens) | of_hub(hub, sums, tokens)


def perplexity(sums: np.ndarray, tokens: np.ndarray) -> dict[str, float]:
    """Loss and perplexity, every token alike, from the summed loss of each example and its number of tokens, both `(n,)`."""
    nll = float(np.sum(sums) / max(1, np.sum(tokens)))
    return {"nll_per_token": nll, "perplexity": float(np.exp(nll)), "tokens": int(np.sum(tokens))}


def logits_of(predictions) -> np.ndarray:
    """The logits, where a model returns more than them."""
    return predictions[0] if isinstance(predictions, tuple) else predictions


def class_probabilities(predictions) -> np.ndarray:
    """Softmax of the logits in float64, `(n, classes)`."""
    return special.softmax(np.asarray(logits_of(predictions), dtype=np.float64), axis=1)


def hub_metrics(names: Sequence[str] | None) -> list[Any]:
    """
    Metrics of the hub by name, through `evaluate`.

    Raises:
        UserError: One does not exist, the hub cannot be reached, or `evaluate` is not installed.
    """
    loaded = []
    for name in names or []:
        try:
            import evaluate

            loaded.append(evaluate.load(name))
        except Exception as error:  # many kinds: no file, no network, a package it needs
            raise UserError(f"hub_metrics: {name} cannot be loaded from the hub: {one_line(error)}") from error
    return loaded


def of_hub(metrics: Sequence[Any], predictions: Any, references: Any) -> dict[str, float]:
    """The results of metrics that `hub_metrics` loaded."""
    found: dict[str, float] = {}
    for metric in metrics:
        found |= metric.compute(predictions=predictions, references=references)
    return found


def _correlation(function: Callable, values: np.ndarray, labels: np.ndarray) -> float:
    """0 where one side is constant."""
    if np.ptp(values) == 0 or np.ptp(labels) == 0:
        return 0.0
    return float(function(values, labels).statistic)
