"""Does a classifier's confidence match how often it is right? Reliability by bins, from kept predictions."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import pandas as pd

BINS = 15


@dataclass(frozen=True)
class Predictions:
    """
    What a classifier said about a test split.

    Args:
        labels (`np.ndarray` of shape `(n,)`): The true classes.
        probabilities (`np.ndarray` of shape `(n, classes)`): Rows sum to 1.
    """

    labels: np.ndarray
    probabilities: np.ndarray

    @property
    def predicted(self) -> np.ndarray:
        """The most probable class of each example, `(n,)`."""
        return self.probabilities.argmax(-1)

    @property
    def correct(self) -> np.ndarray:
        """Whether that is the true class, `(n,)`."""
        return self.predicted == self.labels

    @property
    def confidence(self) -> np.ndarray:
        """Its probability, `(n,)`."""
        return self.probabilities.max(-1)


def read_predictions(path: str | os.PathLike) -> Predictions | None:
    """The predictions in a parquet file with columns `label` and `probabilities`; `None` where it has no such ones."""
    try:
        table = pd.read_parquet(path, columns=["label", "probabilities"])
        labels, probabilities = table["label"].to_numpy(dtype=int), np.stack(table["probabilities"].to_numpy())
    except (OSError, ValueError, TypeError, KeyError):
        return None
    if probabilities.ndim != 2 or not np.isfinite(probabilities).all():
        return None
    return Predictions(labels, probabilities.astype(float))


def reliability(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> pd.DataFrame:
    """
    Accuracy and mean confidence in equally wide bins of confidence, `(low, high]` as in Guo et al. 2017.

    Returns:
        `pd.DataFrame`: One row per bin that is not empty: `low`, `high`, `examples`, `confidence`, `accuracy`.
    """
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    examples = np.bincount(index, minlength=bins)
    used = np.flatnonzero(examples)
    sums = (np.bincount(index, weights=values, minlength=bins)[used] for values in (confidence, correct))
    confidence_mean, accuracy = (total / examples[used] for total in sums)
    columns = {"low": used / bins, "high": (used + 1) / bins, "examples": examples[used]}
    return pd.DataFrame({**columns, "confidence": confidence_mean, "accuracy": accuracy})


def expected_calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> float:
    """Mean gap between accuracy and confidence over the bins, weighted by their examples (Guo et al. 2017, Eq. 5)."""
    table = reliability(confidence, correct, bins)
    return float(np.average((table.accuracy - table.confidence).abs(), weights=table.examples))
