"""Metrics for the Trainer; no network needed, unless metrics from the hub are requested."""

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

# Metrics of each kind of prediction, besides the loss; a comparison uses one of them.
CLASSIFICATION = (*classification.CLASSIFICATION, "loss")
MULTI_LABEL = ("subset_accuracy", "f1_micro", "f1_macro", "loss")
REGRESSION = ("pearson", "spearman", "mse", "loss")
LANGUAGE = ("perplexity", "nll_per_token", "loss")


def classification_metrics(prediction: EvalPrediction, hub: Sequence[Any] = ()) -> dict[str, float]:
    """Compute all metrics of single-label classification from logits `(n, classes)` and labels `(n,)`."""
    kept = Predictions(prediction.label_ids, class_probabilities(prediction.predictions))
    found = {name: metric(kept) for name, metric in classification.CLASSIFICATION.items()}
    predicted = kept.probabilities.argmax(-1)  # some metrics of the hub fail on -1, where the model has diverged
    return found | of_hub(hub, predicted, kept.labels)


def regression_metrics(prediction: EvalPrediction, hub: Sequence[Any] = ()) -> dict[str, float]:
    """Compute Pearson and Spearman correlation and squared error from outputs `(n, 1)` and labels `(n,)`."""
    values = np.asarray(logits_of(prediction.predictions), dtype=float).reshape(-1)
    labels = np.reshape(prediction.label_ids, -1)
    return {
        "pearson": _correlation(stats.pearsonr, values, labels),
        "spearman": _correlation(stats.spearmanr, values, labels),
        "mse": float(np.mean((values - labels) ** 2)),
        **of_hub(hub, values, labels),
    }


def multi_label_metrics(prediction: EvalPrediction, hub: Sequence[Any] = ()) -> dict[str, float]:
    """Compute subset accuracy and F1 from logits and 0 / 1 labels, both `(n, labels)`; the threshold is 1/2."""
    predicted = (logits_of(prediction.predictions) > 0).astype(int)
    labels = prediction.label_ids.astype(int)
    found = {"subset_accuracy": float(sklearn_metrics.accuracy_score(labels, predicted))}
    for average in ("micro", "macro"):
        f1 = sklearn_metrics.f1_score(labels, predicted, average=average, zero_division=0)
        found[f"f1_{average}"] = float(f1)
    return found | of_hub(hub, predicted, labels)


def perplexity_metrics(prediction: EvalPrediction, hub: Sequence[Any] = ()) -> dict[str, float]:
    """
    Compute token-weighted loss and perplexity from the output of `TokenWeightedEvaluation`: the summed negative log-likelihood
    of each example and its number of tokens, both `(n,)`.
    """
    sums, tokens = prediction.predictions, prediction.label_ids
    return perplexity(sums, tokens) | of_hub(hub, sums, tokens)


def perplexity(sums: np.ndarray, tokens: np.ndarray) -> dict[str, float]:
    """Compute token-weighted loss and perplexity from each example's summed loss and number of tokens, both `(n,)`."""
    nll = float(np.sum(sums) / max(1, np.sum(tokens)))
    return {"nll_per_token": nll, "perplexity": float(np.exp(nll)), "tokens": int(np.sum(tokens))}


def logits_of(predictions) -> np.ndarray:
    """Return the logits, also if a model returns further outputs."""
    return predictions[0] if isinstance(predictions, tuple) else predictions


def class_probabilities(predictions) -> np.ndarray:
    """Compute the softmax of the logits in float64, `(n, classes)`."""
    return special.softmax(np.asarray(logits_of(predictions), dtype=np.float64), axis=1)


def hub_metrics(names: Sequence[str] | None) -> list[Any]:
    """
    Load metrics from the hub by name, with `evaluate`.

    Raises:
        UserError: If one does not exist, the hub cannot be reached, or `evaluate` is not installed.
    """
    loaded = []
    for name in names or []:
        try:
            import evaluate

            loaded.append(evaluate.load(name))
        except Exception as error:  # many kinds: missing file, no network, missing package
            raise UserError(f"hub_metrics: {name} cannot be loaded from the hub: {one_line(error)}") from error
    return loaded


def of_hub(metrics: Sequence[Any], predictions: Any, references: Any) -> dict[str, float]:
    """Compute the metrics loaded by `hub_metrics`; values that are not numbers, such as a confusion matrix, are left out."""
    found: dict[str, float] = {}
    for metric in metrics:
        values = metric.compute(predictions=predictions, references=references)
        found |= {name: value for name, value in values.items() if isinstance(value, (int, float, np.number))}
    return found


def _correlation(function: Callable, values: np.ndarray, labels: np.ndarray) -> float:
    """Compute a correlation; 0 if one side is constant, NaN for the outputs of a diverged model."""
    if not np.isfinite(values).all():
        return float("nan")
    if np.ptp(values) == 0 or np.ptp(labels) == 0:
        return 0.0
    return float(function(values, labels).statistic)
