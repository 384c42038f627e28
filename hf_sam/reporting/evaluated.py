"""Scores of checkpoints on one test split, and their paired differences over its examples."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from ..evaluation.classification import CLASSIFICATION, Metric
from ..evaluation.metrics import metric_of
from ..evaluation.predictions import LanguagePredictions, Predictions
from .results import LEVEL, POINTS_THAT_MATTER
from .statistics import Estimate, bootstrap_examples, equivalence_p, holm, mcnemar_p, sign_flip_p


@dataclass
class Evaluated:
    """
    One checkpoint evaluated on the test split.

    Args:
        name (`str`): Its name in the report.
        path (`str`): Folder or hub id.
        predictions (`Predictions` or `LanguagePredictions`): On the test split.
        model (`dict`): See `describe_model`.
        size (`int`): Bytes of the weights in memory.
        seconds (`float`): Duration of the passes over the test split.
        corrupted (`dict[tuple[str, int], Predictions]`): Predictions on corrupted inputs, by corruption and level.
        corrupted_rows (`np.ndarray`, *optional*): Indices of the corrupted examples; all if omitted.
        data (`dict`): The splits as in its run record, see `describe_data`; empty if there is no record.
    """

    name: str
    path: str
    predictions: Predictions | LanguagePredictions
    model: dict = field(default_factory=dict)
    size: int = 0
    seconds: float = 0.0
    corrupted: dict[tuple[str, int], Predictions] = field(default_factory=dict)
    corrupted_rows: np.ndarray | None = None
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def uncorrupted_accuracy(self) -> float:
        """Accuracy without corruption on the examples that are also evaluated with corruption."""
        right = self.predictions.correct
        return float((right if self.corrupted_rows is None else right[self.corrupted_rows]).mean())


def _on_part(metric: Metric, kept: Predictions, index: np.ndarray) -> float:
    """Compute the metric over the examples `index`."""
    return metric(Predictions(kept.labels[index], kept.probabilities[index]))


def metric_estimates(checkpoints: Sequence[Evaluated], rng: np.random.Generator) -> dict[str, dict[str, Estimate]]:
    """Compute each metric of each checkpoint with its bootstrap interval over test examples."""
    found: dict[str, dict[str, Estimate]] = {}
    for entry in checkpoints:
        kept = entry.predictions
        if isinstance(kept, LanguagePredictions):
            loss = bootstrap_examples(kept.per_token, len(kept.nll), rng)
            ends = [None if value is None else float(np.exp(value)) for value in (loss.low, loss.high)]
            found[entry.name] = {"loss": loss, "perplexity": Estimate(float(np.exp(loss.value)), *ends, loss.n)}
        else:
            found[entry.name] = {
                name: bootstrap_examples(partial(_on_part, metric, kept), len(kept.labels), rng)
                for name, metric in CLASSIFICATION.items()
            }
    return found


def compare_checkpoints(checkpoints: Sequence[Evaluated], rng: np.random.Generator) -> list[dict]:
    """Compare every pair of checkpoints: difference with interval over examples, exact p, Holm over the pairs."""
    pairs = []
    for first, second in itertools.combinations(checkpoints, 2):
        a, b = first.predictions, second.predictions
        if isinstance(a, LanguagePredictions):
            gap = bootstrap_examples(lambda index, a=a, b=b: b.per_token(index) - a.per_token(index), len(a.nll), rng)
            told = (a.tokens > 0) & (b.tokens > 0)  # nothing is predicted in a text of one token
            metric, p = "loss", sign_flip_p((b.nll[told] / b.tokens[told]) - (a.nll[told] / a.tokens[told]), rng)
            p_equivalent = None
        else:
            gain = b.correct.astype(float) - a.correct
            gap = bootstrap_examples(lambda index, gain=gain: gain[index].mean(), len(gain), rng)
            metric, p, p_equivalent = "accuracy", mcnemar_p(a.correct, b.correct), None
            if len(gain) > 1:
                p_equivalent = equivalence_p(gain.mean(), gain.std(ddof=1), len(gain), POINTS_THAT_MATTER / 100)
        names = {"first": first.name, "second": second.name, "metric": metric}
        pairs.append({**names, **vars(gap), "p": p, "p_equivalent": p_equivalent})
    for name, key in (("p", "p_holm"), ("p_equivalent", "p_equivalent")):
        for pair, adjusted in zip(pairs, holm([pair[name] for pair in pairs]), strict=True):
            pair[key] = adjusted
    return pairs


def differences_from_first(
    checkpoints: Sequence[Evaluated], pairs: Sequence[dict], rng: np.random.Generator
) -> list[dict]:
    """Compute each classifier's difference from the first in accuracy (from `pairs`) and calibration, by example."""
    first, rows = checkpoints[0], []
    for entry, pair in zip(checkpoints[1:], pairs, strict=False):  # the pairs with the first checkpoint come first
        rows.append({"checkpoint": entry.name, "minus": first.name, "metric": "accuracy"})
        rows[-1] |= {key: pair[key] for key in ("value", "low", "high", "n")}
        for name in ("nll", "ece", "brier"):

            def gap(index: np.ndarray, entry: Evaluated = entry, metric: Metric = CLASSIFICATION[name]) -> float:
                return _on_part(metric, entry.predictions, index) - _on_part(metric, first.predictions, index)

            estimate = bootstrap_examples(gap, len(first.predictions.labels), rng)
            rows.append({"checkpoint": entry.name, "minus": first.name, "metric": name, **vars(estimate)})
    return rows


def verdict(pair: dict) -> str:
    """Return `"better"`, `"worse"`, `"equivalent"` or `"undecided"` for the second checkpoint against the first."""
    if pair["p_holm"] <= LEVEL:
        return "better" if (pair["value"] > 0) == metric_of(pair["metric"]).higher_is_better else "worse"
    is_equivalent = pair["p_equivalent"] is not None and pair["p_equivalent"] <= LEVEL
    return "equivalent" if is_equivalent else "undecided"
