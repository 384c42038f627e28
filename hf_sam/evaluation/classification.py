"""
Metrics of a classifier, each a function of its predictions.

Accuracy, F1 and MCC agree with scikit-learn's but are computed from counts: an interval resamples the examples
thousands of times, which would take minutes with scikit-learn.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .calibration import expected_calibration_error
from .predictions import Predictions

Metric = Callable[[Predictions], float]


def confusion(kept: Predictions) -> np.ndarray:
    """
    Counts of true class (row) by predicted class (column), `(classes, classes)`; a further column counts examples
    without a predicted class, if there are any.
    """
    classes, predicted = kept.probabilities.shape[1], kept.predicted
    columns = classes + bool((predicted < 0).any())
    cells = kept.labels * columns + predicted % columns  # -1 is the last column
    return np.bincount(cells, minlength=classes * columns).reshape(classes, columns)


def accuracy(kept: Predictions) -> float:
    """Fraction of examples whose predicted class is the true one."""
    return float(kept.correct.mean())


def f1_macro(kept: Predictions) -> float:
    """Unweighted mean F1 over the classes that occur or are predicted."""
    counts = confusion(kept)
    support = counts.sum(0)[: len(counts)] + counts.sum(1)
    seen = support > 0
    return float((2 * np.diag(counts)[seen] / support[seen]).mean())


def mcc(kept: Predictions) -> float:
    """Matthews correlation coefficient (Gorodkin 2004), in [-1, 1]; 0 is chance level, and the value where undefined."""
    counts = confusion(kept)
    true, predicted, total = counts.sum(1), counts.sum(0), counts.sum()
    spread = (total**2 - (true**2).sum()) * (total**2 - (predicted**2).sum())
    return (
        float((total * np.trace(counts) - true @ predicted[: len(true)]) / np.sqrt(float(spread)))
        if spread > 0
        else 0.0
    )


def nll(kept: Predictions) -> float:
    """Mean negative log-likelihood of the true class, in nats."""
    return float(-np.log(np.maximum(kept.true_probability, np.finfo(float).tiny)).mean())


def ece(kept: Predictions) -> float:
    """Expected calibration error of the predicted class, in 15 bins of equal width (Guo et al. 2017, Equation 3)."""
    return expected_calibration_error(kept.confidence, kept.correct)


def brier(kept: Predictions) -> float:
    """Squared distance between the probabilities and the one-hot labels, summed over classes (Brier 1950), in [0, 2]."""
    truth = np.eye(kept.probabilities.shape[1])[kept.labels]
    return float(((kept.probabilities - truth) ** 2).sum(axis=1).mean())


CLASSIFICATION: dict[str, Metric] = {
    "accuracy": accuracy,
    "f1_macro": f1_macro,
    "mcc": mcc,
    "nll": nll,
    "ece": ece,
    "brier": brier,
}
