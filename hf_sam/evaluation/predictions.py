"""Predictions of models on a test split."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import pandas as pd


@dataclass(frozen=True)
class Predictions:
    """
    Predictions of a classifier on a test split.

    Args:
        labels (`np.ndarray` of shape `(n,)`): The true classes.
        probabilities (`np.ndarray` of shape `(n, classes)`): The predicted probabilities; rows sum to 1.
    """

    labels: np.ndarray
    probabilities: np.ndarray

    @property
    def predicted(self) -> np.ndarray:
        """The most probable class of each example, `(n,)`; -1 where the probabilities are NaN, as after divergence."""
        return np.where(np.isnan(self.probabilities).any(-1), -1, self.probabilities.argmax(-1))

    @property
    def correct(self) -> np.ndarray:
        """Whether the predicted class is the true one, `(n,)`."""
        return self.predicted == self.labels

    @property
    def true_probability(self) -> np.ndarray:
        """The probability of the true class, `(n,)`."""
        return np.take_along_axis(self.probabilities, self.labels[:, None], axis=1)[:, 0]

    @property
    def confidence(self) -> np.ndarray:
        """The probability of the predicted class, `(n,)`."""
        return self.probabilities.max(-1)


@dataclass(frozen=True)
class LanguagePredictions:
    """
    Likelihoods of the test texts under a language model.

    Args:
        nll (`np.ndarray` of shape `(n,)`): Summed negative log-likelihood of each text.
        tokens (`np.ndarray` of shape `(n,)`): Number of predicted tokens in each text.
    """

    nll: np.ndarray
    tokens: np.ndarray

    def per_token(self, index: np.ndarray | slice = slice(None)) -> float:
        """Mean NLL per token over the texts in `index`."""
        return float(self.nll[index].sum() / self.tokens[index].sum())


def read_predictions(path: str | os.PathLike) -> Predictions | None:
    """The predictions in a parquet file with columns `label` and `probabilities`; `None` if they cannot be read."""
    try:
        table = pd.read_parquet(path, columns=["label", "probabilities"])
        labels, probabilities = table["label"].to_numpy(dtype=int), np.stack(table["probabilities"].to_numpy())
    except (OSError, ValueError, TypeError, KeyError):
        return None
    if probabilities.ndim != 2 or not np.isfinite(probabilities).all():
        return None
    return Predictions(labels, probabilities.astype(float))
