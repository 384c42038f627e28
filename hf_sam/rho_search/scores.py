"""Per-example scores of saved predictions, for metrics that are a mean over examples: their interval has a closed form."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd


@dataclass(frozen=True)
class ExampleScores:
    """
    The per-example parts of a metric that is a mean over examples: `totals.sum() / weights.sum()`.

    Args:
        totals (`np.ndarray` of shape `(n,)`): Contribution of each example.
        weights (`np.ndarray` of shape `(n,)`): Weight of each example: 1, or its number of tokens.
    """

    totals: np.ndarray
    weights: np.ndarray

    @property
    def value(self) -> float:
        """The metric."""
        return float(self.totals.sum() / self.weights.sum())

    def influence(self) -> np.ndarray:
        """
        `n` times the influence of each example on the metric, `(n,)`.

        Its variance divided by `n` is the variance of the metric over resampled examples: for a mean, the bootstrap has
        this closed form.
        """
        return (self.totals - self.value * self.weights) / self.weights.mean()


def example_scores(kept: pd.DataFrame) -> dict[str, ExampleScores]:
    """
    Per-example scores of saved predictions, by metric: the default metric first, a loss last.

    Empty if a value is not finite, as after divergence.
    """
    ones = np.ones(len(kept))
    if "nll" in kept:
        counts = {name: kept[name].to_numpy(float) for name in ("nll", "answers", "correct", "tokens") if name in kept}
        found = {"accuracy": ExampleScores(counts["correct"], counts["answers"])} if "answers" in kept else {}
        if "tokens" in kept:
            found["nll_per_token"] = ExampleScores(counts["nll"], counts["tokens"])
        else:  # one answer per word
            found["nll"] = ExampleScores(counts["nll"], counts["answers"])
    elif "probabilities" not in kept:
        error = kept["prediction"].to_numpy(float) - kept["label"].to_numpy(float)
        found = {"mse": ExampleScores(error**2, ones)}
    else:
        probabilities = np.stack(kept["probabilities"].to_numpy()).astype(float)
        by_class = "prediction" in kept
        truth = np.eye(probabilities.shape[1])[kept["label"].to_numpy(int)] if by_class else np.stack(kept["label"])
        tiny = np.finfo(float).tiny
        if by_class:
            right = probabilities.argmax(1) == kept["label"].to_numpy(int)
            nll = -np.log(np.maximum((probabilities * truth).sum(1), tiny))
        else:
            right = ((probabilities > 0.5) == truth).all(1)
            nll = -np.log(np.maximum(np.where(truth == 1, probabilities, 1 - probabilities), tiny)).sum(1)
        found = {
            "accuracy" if by_class else "subset_accuracy": ExampleScores(right.astype(float), ones),
            "brier": ExampleScores(((probabilities - truth) ** 2).sum(1), ones),
            "nll": ExampleScores(nll, ones),
        }
    return found if all(np.isfinite(scores.totals).all() for scores in found.values()) else {}


def constant_scores(kept: pd.DataFrame) -> dict[str, ExampleScores]:
    """The scores of the best constant answer: the most frequent class, the class frequencies, or the mean."""
    if "most_frequent" in kept:
        right = kept["most_frequent"].to_numpy(float)
        return {"accuracy": ExampleScores(right, kept["answers"].to_numpy(float))}
    if "nll" in kept:
        return {}
    if "probabilities" not in kept:
        return example_scores(kept.assign(prediction=kept["label"].mean()))
    if "prediction" in kept:
        classes = len(kept["probabilities"].iloc[0])
        share = np.bincount(kept["label"].to_numpy(int), minlength=classes) / len(kept)
    else:
        share = np.stack(kept["label"]).astype(float).mean(0)
    return example_scores(kept.assign(probabilities=[share] * len(kept)))
