"""Labels, units and directions of metrics."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Metric:
    """How a metric is displayed, and whether higher is better."""

    label: str
    higher_is_better: bool = True
    scale: float = 1.0
    unit: str = ""
    digits: int = 3


# Means over examples, which can be paired example by example; in order of preference.
METRICS_KEPT = ("accuracy", "subset_accuracy", "nll", "brier", "mse", "nll_per_token")

METRICS = {
    "accuracy": Metric("accuracy", scale=100, unit="%", digits=1),
    "f1_macro": Metric("macro F1", scale=100, unit="%", digits=1),
    "subset_accuracy": Metric("subset accuracy", scale=100, unit="%", digits=1),
    "mcc": Metric("MCC"),
    "pearson": Metric("Pearson r"),
    "spearman": Metric("Spearman r"),
    "no_class": Metric("answers without a class", higher_is_better=False, scale=100, unit="%", digits=1),
    "no_number": Metric("answers without a number", higher_is_better=False, scale=100, unit="%", digits=1),
    "exact_match": Metric("exact match", scale=100, unit="%", digits=1),
    "rouge1": Metric("ROUGE-1", scale=100, digits=1),
    "rouge2": Metric("ROUGE-2", scale=100, digits=1),
    "rougeL": Metric("ROUGE-L", scale=100, digits=1),
    "rougeLsum": Metric("ROUGE-Lsum", scale=100, digits=1),
    "bleu": Metric("BLEU", digits=1),
    "chrf": Metric("chrF", digits=1),
    "entity_f1": Metric("entity F1", scale=100, unit="%", digits=1),
    "entity_precision": Metric("entity precision", scale=100, unit="%", digits=1),
    "entity_recall": Metric("entity recall", scale=100, unit="%", digits=1),
    "nll_per_token": Metric("NLL per token", higher_is_better=False),
    "perplexity": Metric("perplexity", higher_is_better=False),
    "loss": Metric("loss", higher_is_better=False),
    "nll": Metric("NLL", higher_is_better=False),
    "brier": Metric("Brier score", higher_is_better=False),
    "ece": Metric("ECE", higher_is_better=False, scale=100, unit="%", digits=1),
    "mse": Metric("squared error", higher_is_better=False),
}
_LOWER = re.compile(r"loss|error|perplexity|nll|ece|brier|mse|mae|gap", re.IGNORECASE)


def metric_of(name: str) -> Metric:
    """The entry of `METRICS`, or a guess from an unknown name; `gap.<metric>` is train minus test."""
    if name.startswith("gap."):
        metric = metric_of(name.removeprefix("gap."))
        return replace(metric, label=f"train-test gap in {metric.label}", higher_is_better=not metric.higher_is_better)
    return METRICS.get(name) or Metric(name.replace("_", " "), higher_is_better=not _LOWER.search(name))
