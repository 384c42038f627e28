"""Scores after quantization, pruning, noise and merging, as a record keeps them; the section of a report on checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ..evaluation.classification import CLASSIFICATION
from ..evaluation.metrics import metric_of
from ..evaluation.predictions import LanguagePredictions, Predictions
from ..evaluation.survival import NONE, Outcome, Treatment
from . import plots
from .document import Block, Section, Table, Text
from .formatting import NOTHING, number, signed, with_interval
from .statistics import Estimate, bootstrap_examples

FORMAT, VERSION = "hf_sam.survival", 1
TITLE = "What survives"
SIDE_METRICS = ("nll", "ece")  # accuracy alone hides changes of confidence
CAVEAT = (
    "Compare the scores first, then the changes in brackets: a checkpoint that has learned less has less to lose. Biases and "
    "normalization layers are never altered. Merging includes the embeddings, and the head only for language models."
)

Kept = Predictions | LanguagePredictions


# --- numbers -------------------------------------------------------------------------------------------------------


def scores_of(kept: Kept) -> dict[str, float]:
    """Compute every metric of one evaluation; for a language model, loss and perplexity."""
    if isinstance(kept, LanguagePredictions):
        loss = kept.per_token()
        return {"loss": loss, "perplexity": float(np.exp(min(loss, 700.0)))}
    return {name: metric(kept) for name, metric in CLASSIFICATION.items()}


def survival_rows(found: Sequence[Outcome[Kept]]) -> list[dict[str, Any]]:
    """Return the entries of a run record, one per treatment and draw: its scores, or why there are none."""
    rows = []
    for entry in found:
        row = {"kind": entry.treatment.kind, "level": entry.treatment.level, "draw": entry.treatment.draw}
        rows.append(row | (scores_of(entry.result) if entry.result is not None else {"problem": entry.problem}))
    return rows


def compare_survival(
    found: Mapping[str, Sequence[Outcome[Kept]]], rng: np.random.Generator, resamples: int = 1000
) -> list[dict[str, Any]]:
    """
    Compute the main score of each checkpoint under each treatment, and its difference from the first checkpoint, with
    intervals over test examples.

    Draws of one treatment are averaged, example by example.

    Args:
        found (`Mapping[str, Sequence[Outcome]]`): By checkpoint, on the same examples.
        rng (`np.random.Generator`): The generator of the bootstrap.
        resamples (`int`, *optional*, defaults to 1000): Number of resamples.
    """
    first = _sums(next(iter(found.values())))
    rows = []
    for name, entries in found.items():
        for treatment, (sums, weights) in _sums(entries).items():
            score = _mean(sums, weights, rng, resamples)
            row = {"checkpoint": name, "kind": treatment.kind, "level": treatment.level, **vars(score)}
            if name != next(iter(found)) and treatment in first:
                gap = _mean(sums - first[treatment][0], weights, rng, resamples)
                row |= {"difference": gap.value, "difference_low": gap.low, "difference_high": gap.high}
            rows.append(row)
    return rows


def _sums(entries: Sequence[Outcome[Kept]]) -> dict[Treatment, tuple[np.ndarray, np.ndarray]]:
    """Map each treatment to every example's contribution to the score and its weight, `(n,)`, averaged over draws."""
    groups: dict[Treatment, list[Kept]] = {}
    for entry in entries:
        if entry.result is not None:
            groups.setdefault(Treatment(entry.treatment.kind, entry.treatment.level), []).append(entry.result)
    return {
        treatment: (
            np.mean([kept.nll if isinstance(kept, LanguagePredictions) else kept.correct for kept in draws], axis=0),
            np.asarray(draws[0].tokens if isinstance(draws[0], LanguagePredictions) else np.ones(len(draws[0].labels))),
        )
        for treatment, draws in groups.items()
    }


def _mean(sums: np.ndarray, weights: np.ndarray, rng: np.random.Generator, resamples: int) -> Estimate:
    return bootstrap_examples(lambda index: sums[index].sum() / weights[index].sum(), len(sums), rng, resamples)


# --- checkpoints ---------------------------------------------------------------------------------------------------


def survival_section(record: Mapping[str, Any]) -> Section:
    """Build the section of a report on checkpoints from the content of `survival.json`."""
    frame = pd.DataFrame(record["scores"])
    metric, names = record["metric"], list(record["checkpoints"])
    blocks: list[Block] = [Text(_what_was_done(record)), Text(CAVEAT)]
    blocks.append(_checkpoint_table(frame, names, metric))
    curves = frame.rename(columns={"checkpoint": "name"})
    if has_curves(curves):
        words = f"{metric_of(metric).label.capitalize()} after each treatment, with bootstrap intervals over test examples shaded."
        blocks.append(plots.figure("survival", words, plots.draw_survival, curves, names, metric))
    blocks += _side_tables(record["checkpoints"], names)
    blocks += problem_blocks((name, entry["rows"]) for name, entry in record["checkpoints"].items())
    return Section(TITLE, blocks)


def _what_was_done(record: Mapping[str, Any]) -> str:
    subset, config = record["subset"], record["config"]
    altered = next(iter(record["checkpoints"].values()))["altered"]
    left = [
        word
        for word, is_in in (("embeddings", config["alter_embeddings"]), ("the head", config["alter_head"]))
        if not is_in
    ]
    alone = f" {' and '.join(left).capitalize()} were not altered." if left else ""
    return (
        f"Each checkpoint was altered without further training and evaluated again on the same {subset['examples']:,} examples of the "
        f"{subset['split']} split. Quantization rounds weights to the nearest of 2^bits levels, pruning sets the smallest weights of each "
        f"matrix to zero, noise is Gaussian, in units of the standard deviation of each matrix. {altered['tensors']} weight "
        f"matrices with {altered['parameters']:,} of {altered['of']:,} parameters were altered.{alone}"
    )


def _checkpoint_table(frame: pd.DataFrame, names: Sequence[str], metric: str) -> Table:
    by_name = {name: _by_treatment(frame[frame.checkpoint == name]) for name in names}
    rows = []
    for treatment in treatments_in(frame):
        cells = []
        for name in names:
            row, plain = by_name[name].get(treatment), by_name[name].get(Treatment(NONE))
            cells.append(_score_and_change(row["value"] if row else None, plain["value"], treatment, metric))
        for name in names[1:]:
            row = by_name[name].get(treatment)
            ends = [row.get(key) for key in ("difference", "difference_low", "difference_high")] if row else []
            cells.append(with_interval(*map(finite, ends), metric) if row else NOTHING)
        rows.append([treatment.label, *cells])
    unit = f" ({metric_of(metric).unit})" if metric_of(metric).unit else ""
    better = "higher" if metric_of(metric).higher_is_better else "lower"
    columns = ["treatment", *names, *(f"{name} minus {names[0]}" for name in names[1:])]
    caption = f"{metric_of(metric).label.capitalize()}{unit}, change from the checkpoint as trained in brackets; {better} is better"
    return Table(columns, rows, caption)


def _score_and_change(value: float | None, plain: float | None, treatment: Treatment, metric: str) -> str:
    if finite(value) is None:
        return NOTHING
    score = number(value * metric_of(metric).scale, metric_of(metric).digits)
    has_change = treatment.kind != NONE and finite(plain) is not None
    return f"{score} ({signed(value - plain, metric)})" if has_change else score


def _side_tables(checkpoints: Mapping[str, Any], names: Sequence[str]) -> list[Block]:
    frames = {name: mean_over_draws(checkpoints[name]["rows"]) for name in names}
    kept = [metric for metric in SIDE_METRICS if all(metric in frame for frame in frames.values())]
    if not kept:
        return []
    rows = []
    for treatment in treatments_in(pd.concat(frames.values())):
        cells = []
        for metric in kept:
            for name in names:
                found = _by_treatment(frames[name])
                row, plain = found.get(treatment), found[Treatment(NONE)]
                cells.append(_score_and_change(row[metric] if row else None, plain[metric], treatment, metric))
        rows.append([treatment.label, *cells])
    columns = [
        f"{metric_of(metric).label}{' (%)' if metric_of(metric).unit else ''}, {name}"
        for metric in kept
        for name in names
    ]
    return [Table(["treatment", *columns], rows, "Loss and calibration, changes in brackets; lower is better")]


# --- both ----------------------------------------------------------------------------------------------------------


def mean_over_draws(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Average the metrics over draws: one row per treatment with a result, in order."""
    frame = pd.DataFrame([row for row in rows if "problem" not in row])
    frame = frame.astype({"level": float})
    return frame.groupby(["kind", "level"], sort=False, dropna=False).mean().reset_index().drop(columns="draw")


def treatments_in(frame: pd.DataFrame) -> list[Treatment]:
    """Return the distinct treatments of a table, in order."""
    pairs = frame[["kind", "level"]].itertuples(index=False)
    return list(dict.fromkeys(Treatment(kind, finite(level)) for kind, level in pairs))


def _by_treatment(frame: pd.DataFrame) -> dict[Treatment, dict[str, Any]]:
    return {Treatment(row["kind"], finite(row["level"])): row for row in frame.to_dict("records")}


def finite(value: Any) -> float | None:
    """Return `value` as a float, or `None` if it is missing, infinite or NaN."""
    return None if value is None or not math.isfinite(value) else float(value)


def has_curves(frame: pd.DataFrame) -> bool:
    """Whether some kind of treatment has several levels to draw a curve over."""
    return bool(frame.groupby("kind")["level"].nunique().max() > 1)


def problem_blocks(named_rows: Iterable[tuple[str, Sequence[Mapping[str, Any]]]]) -> list[Block]:
    """Warn of treatments that could not be measured, each problem once, with the first names that had it."""
    told: dict[str, dict[str, None]] = {}
    for name, rows in named_rows:
        for row in rows:
            if "problem" in row:
                told.setdefault(f"{row['kind']}: {row['problem']}", {})[name] = None
    return [
        Text(f"Could not be measured ({', '.join(list(names)[:4])}): {problem}", "warning")
        for problem, names in told.items()
    ]
