"""Report section on survival: scores of checkpoints or arms after quantization, pruning, noise and merging."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ..evaluation.classification import CLASSIFICATION
from ..evaluation.metrics import metric_of
from ..evaluation.predictions import LanguagePredictions, Predictions
from ..evaluation.survival import NONE, Outcome, Treatment
from ..experiments.plan import BUDGETS, Question
from ..experiments.records import RunRecord
from . import plots
from .document import Block, Section, Table, Text
from .formatting import NOTHING, number, p_value, signed, with_interval
from .results import Cell, is_trial
from .statistics import Estimate, PairedComparison, bootstrap_examples, compare_paired, holm
from .study import Study

FORMAT, VERSION = "hf_sam.survival", 1
TITLE = "What survives"
SIDE_METRICS = ("nll", "ece")  # accuracy alone hides changes of confidence
HEADLINE = Treatment("bits per channel", 4)  # the treatment of the headline, fixed before any result
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
    if _has_curves(curves):
        words = f"{metric_of(metric).label.capitalize()} after each treatment, with bootstrap intervals over test examples shaded."
        blocks.append(plots.figure("survival", words, plots.draw_survival, curves, names, metric))
    blocks += _side_tables(record["checkpoints"], names)
    blocks += _problems({name: entry["rows"] for name, entry in record["checkpoints"].items()})
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
    for treatment in _order(frame):
        cells = []
        for name in names:
            row, plain = by_name[name].get(treatment), by_name[name].get(Treatment(NONE))
            cells.append(_score_and_change(row["value"] if row else None, plain["value"], treatment, metric))
        for name in names[1:]:
            row = by_name[name].get(treatment)
            ends = [row.get(key) for key in ("difference", "difference_low", "difference_high")] if row else []
            cells.append(with_interval(*map(_finite, ends), metric) if row else NOTHING)
        rows.append([treatment.label, *cells])
    unit = f" ({metric_of(metric).unit})" if metric_of(metric).unit else ""
    better = "higher" if metric_of(metric).higher_is_better else "lower"
    columns = ["treatment", *names, *(f"{name} minus {names[0]}" for name in names[1:])]
    caption = f"{metric_of(metric).label.capitalize()}{unit}, change from the checkpoint as trained in brackets; {better} is better"
    return Table(columns, rows, caption)


def _score_and_change(value: float | None, plain: float, treatment: Treatment, metric: str) -> str:
    if value is None or not math.isfinite(value):
        return NOTHING
    score = number(value * metric_of(metric).scale, metric_of(metric).digits)
    return score if treatment.kind == NONE else f"{score} ({signed(value - plain, metric)})"


def _side_tables(checkpoints: Mapping[str, Any], names: Sequence[str]) -> list[Block]:
    frames = {name: _mean_over_draws(checkpoints[name]["rows"]) for name in names}
    kept = [metric for metric in SIDE_METRICS if all(metric in frame for frame in frames.values())]
    if not kept:
        return []
    rows = []
    for treatment in _order(pd.concat(frames.values())):
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


# --- comparisons ---------------------------------------------------------------------------------------------------


def survival_blocks(study: Study, rng: np.random.Generator) -> list[Block]:
    """Build a comparison's section: per task and budget, scores of all arms and paired differences from the control."""
    blocks: list[Block] = []
    for index, cell in enumerate(study.cells):
        frame = cell_frame(cell, study.arms)
        if not frame.empty:
            blocks += _cell_blocks(study, cell, frame, index, rng)
    if not blocks:
        return [Text("Not measured. Set `survival: true` in the YAML of the comparison to measure it.")]
    without = [run for run in study.records if run.status == "finished" and not run.survival and not is_trial(run)]
    missing = f" {len(without)} finished runs lack these scores." if without else ""
    blocks += _problems({f"{run.arm}, seed {run.seed}": run.survival for run in study.records})
    what = (
        "Each run's final model, altered without further training and evaluated again. Quantization rounds weights to the nearest of "
        "2^bits levels, pruning sets the smallest weights of each matrix to zero, noise is Gaussian, in units of the standard deviation of "
        "each matrix. Embeddings and head are not altered unless the plan says so."
    )
    return [Text(what + missing), Text(CAVEAT), *blocks]


def cell_frame(cell: Cell, arms: Sequence[str]) -> pd.DataFrame:
    """Tabulate a cell: one row per arm, seed and treatment, draws averaged, one column per metric."""
    frames = [
        _mean_over_draws(run.survival).assign(name=arm, seed=run.seed)
        for arm in arms
        for run in cell.runs.get(arm, [])
        if run.survival and run.seed is not None
    ]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def _cell_blocks(study: Study, cell: Cell, frame: pd.DataFrame, index: int, rng: np.random.Generator) -> list[Block]:
    metric = _metric_in(frame, study.question)
    arms = [arm for arm in study.arms if (frame.name == arm).any()]
    where = f"{cell.title}, {BUDGETS.get(cell.budget, cell.budget)}"
    paired = paired_survival(frame, study.question.control, metric, rng)
    blocks: list[Block] = [Text(sentence, "answer") for sentence in _headline(paired, study.question, metric, where)]
    rows = []
    for treatment in _order(frame):
        cells = []
        for arm in arms:
            values = _values(frame, arm, treatment, metric)
            plain = _values(frame, arm, Treatment(NONE), metric)
            changes = [values[seed] - plain[seed] for seed in values.keys() & plain.keys()]
            score = _mean_and_spread(list(values.values()), metric)
            change = f" ({signed(float(np.mean(changes)), metric)})" if changes and treatment.kind != NONE else ""
            cells.append(score + change)
        rows.append([treatment.label, *cells])
    unit = f" ({metric_of(metric).unit})" if metric_of(metric).unit else ""
    caption = f"{where}: {metric_of(metric).label}{unit}, mean ± sd over seeds, mean change from the model as trained in brackets"
    blocks.append(Table(["treatment", *arms], rows, caption))
    curves = _band_over_seeds(frame, arms, metric)
    if _has_curves(curves):
        words = f"{where}: {metric_of(metric).label} after each treatment, mean over seeds, range over seeds shaded."
        blocks.append(plots.figure(f"survival-{index + 1}", words, plots.draw_survival, curves, arms, metric))
    side = [name for name in SIDE_METRICS if name in frame and name != metric]
    rows = [
        [
            treatment.label,
            arm,
            *(_mean_and_spread(list(_values(frame, arm, treatment, name).values()), name) for name in side),
        ]
        for treatment in _order(frame)
        for arm in arms
    ]
    if side:
        labels = [f"{metric_of(name).label}{' (%)' if metric_of(name).unit else ''}" for name in side]
        title = f"{where}: loss and calibration after each treatment, mean ± sd"
        blocks.append(Table(["treatment", "arm", *labels], rows, title, 2, folded=True))
    rows = [
        [
            entry["treatment"].label,
            entry["arm"],
            str(len(entry["score"].seeds)),
            *(_difference(entry[what], metric) for what in ("score", "change")),
            *(p_value(entry[key]) for key in ("p", "p_holm")),
        ]
        for entry in paired
    ]
    if rows:
        columns = ["treatment", "arm", "seeds", f"score minus {study.question.control}'s [Student]"]
        columns += ["change minus the control's [Student]", "t-test p of the score", "Holm"]
        title = f"{where}: paired over seeds; Holm's adjustment over the treatments of an arm"
        blocks.append(Table(columns, rows, title, 2, folded=True))
    return blocks


def paired_survival(frame: pd.DataFrame, control: str, metric: str, rng: np.random.Generator) -> list[dict[str, Any]]:
    """
    Compare every arm with the control under every treatment, paired over seeds.

    Returns:
        A list of `treatment`, `arm`, `score` and `change` (`PairedComparison`, of the score itself and of its change from the
        model as trained), `p` of the score's paired t-test, and `p_holm`, adjusted over the treatments of the arm.
    """
    entries = []
    for arm in dict.fromkeys(frame.name):
        if arm == control:
            continue
        own = []
        for treatment in _order(frame):
            score = compare_paired(
                _values(frame, arm, treatment, metric), _values(frame, control, treatment, metric), rng
            )
            change = compare_paired(
                _changes(frame, arm, treatment, metric), _changes(frame, control, treatment, metric), rng
            )
            if score is not None and change is not None:
                own.append({"treatment": treatment, "arm": arm, "score": score, "change": change, "p": score.t_p})
        of_treatments = [entry["p"] if entry["treatment"].kind != NONE else None for entry in own]
        for entry, p_holm in zip(own, holm(of_treatments), strict=True):
            entries.append({**entry, "p_holm": p_holm})
    return entries


def _headline(paired: Sequence[Mapping[str, Any]], question: Question, metric: str, where: str) -> list[str]:
    found = {entry["treatment"]: entry for entry in paired if entry["arm"] == question.treatment}
    if HEADLINE not in found:
        return []
    altered, plain = found[HEADLINE], found.get(Treatment(NONE))
    sentence = (
        f"{where}: at {HEADLINE.label}, {metric_of(metric).label} of {question.treatment} minus that of {question.control} is "
        f"{_difference(altered['score'], metric)}"
    )
    sentence += f", as trained {_difference(plain['score'], metric)}" if plain else ""
    seeds = len(altered["score"].seeds)
    if altered["p"] is None:
        return [f"{sentence}; one seed gives no interval and says nothing about other seeds."]
    return [
        f"{sentence} ({seeds} seeds, paired t-test p {p_value(altered['p'])}, Holm over {len(found) - (plain is not None)} treatments {p_value(altered['p_holm'])})."
    ]


def _difference(paired: PairedComparison, metric: str) -> str:
    return with_interval(paired.difference.value, paired.t_low, paired.t_high, metric)


def _values(frame: pd.DataFrame, name: str, treatment: Treatment, metric: str) -> dict[int, float]:
    """Map seeds to scores."""
    at = frame[(frame.name == name) & (frame.kind == treatment.kind) & _at_level(frame, treatment)]
    return {int(row.seed): float(row[metric]) for _, row in at.iterrows() if _finite(row[metric]) is not None}


def _changes(frame: pd.DataFrame, name: str, treatment: Treatment, metric: str) -> dict[int, float]:
    values, plain = _values(frame, name, treatment, metric), _values(frame, name, Treatment(NONE), metric)
    return {seed: values[seed] - plain[seed] for seed in values.keys() & plain.keys()}


def _band_over_seeds(frame: pd.DataFrame, arms: Sequence[str], metric: str) -> pd.DataFrame:
    rows = []
    for arm in arms:
        for treatment in _order(frame):
            values = list(_values(frame, arm, treatment, metric).values())
            if values:
                rows.append(
                    (arm, treatment.kind, treatment.level, np.mean(values), min(values), max(values), len(values))
                )
    return pd.DataFrame(rows, columns=["name", "kind", "level", "value", "low", "high", "n"])


def _metric_in(frame: pd.DataFrame, question: Question) -> str:
    asked = "loss" if question.metric == "perplexity" else question.metric  # perplexity explodes at few bits
    return next(name for name in (asked, "accuracy", "loss") if name in frame)


def _mean_and_spread(values: Sequence[float], metric: str) -> str:
    if not values:
        return NOTHING
    digits, scale = metric_of(metric).digits, metric_of(metric).scale
    text = number(float(np.mean(values)) * scale, digits)
    return text if len(values) < 2 else f"{text} ± {number(float(np.std(values, ddof=1)) * scale, digits)}"


# --- both ----------------------------------------------------------------------------------------------------------


def _mean_over_draws(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Average the metrics over draws: one row per treatment with a result, in order."""
    frame = pd.DataFrame([row for row in rows if "problem" not in row])
    frame = frame.astype({"level": float})
    return frame.groupby(["kind", "level"], sort=False, dropna=False).mean().reset_index().drop(columns="draw")


def _order(frame: pd.DataFrame) -> list[Treatment]:
    pairs = frame[["kind", "level"]].itertuples(index=False)
    return list(dict.fromkeys(Treatment(kind, _finite(level)) for kind, level in pairs))


def _by_treatment(frame: pd.DataFrame) -> dict[Treatment, dict[str, Any]]:
    return {Treatment(row["kind"], _finite(row["level"])): row for row in frame.to_dict("records")}


def _at_level(frame: pd.DataFrame, treatment: Treatment) -> pd.Series:
    return frame.level.isna() if treatment.level is None else frame.level == treatment.level


def _finite(value: Any) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _has_curves(frame: pd.DataFrame) -> bool:
    return bool(frame.groupby("kind")["level"].nunique().max() > 1)


def _problems(rows_by_name: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Block]:
    told: dict[str, list[str]] = {}
    for name, rows in rows_by_name.items():
        for row in rows:
            if "problem" in row:
                told.setdefault(f"{row['kind']}: {row['problem']}", []).append(name)
    return [
        Text(f"Could not be measured ({', '.join(names[:4])}): {problem}", "warning") for problem, names in told.items()
    ]


def has_survival(records: Sequence[RunRecord]) -> bool:
    """Whether any run kept scores after treatments."""
    return any(run.survival for run in records)
