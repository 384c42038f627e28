"""Report section on the survival of a comparison's arms: the answer per treatment, all arms, paired over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from ..evaluation.metrics import metric_of
from ..evaluation.survival import NONE, Treatment
from ..experiments.plan import Question
from . import plots
from .document import Block, Table, Text
from .formatting import budget_name, labelled, p_value, signed, value_and_spread, with_interval
from .results import LEVEL, Cell, is_trial
from .statistics import PairedComparison, compare_paired, holm
from .study import Study
from .survival import CAVEAT, SIDE_METRICS, finite, has_curves, mean_over_draws, problem_blocks, treatments_in


@dataclass(frozen=True)
class PairedSurvival:
    """
    One arm against the control after one treatment, paired over seeds.

    Args:
        treatment (`Treatment`): The treatment.
        arm (`str`): The arm.
        metric (`str`): The compared metric.
        score, change (`PairedComparison`): Differences of the score, and of its change from the model as trained.
        p_holm (`float`, *optional*): P-value of the paired t-test of the score, adjusted over the arm's treatments; none for
            the model as trained.
    """

    treatment: Treatment
    arm: str
    metric: str
    score: PairedComparison
    change: PairedComparison
    p_holm: float | None = None

    @property
    def verdict(self) -> str:
        """
        `"better"` or `"worse"` if the t-test, adjusted after treatments, is significant at 5 %, else `"undecided"`; without
        a test, `"one seed"`.
        """
        p = self.score.t_p if self.treatment.kind == NONE else self.p_holm
        if p is None:
            return "one seed"
        if p > LEVEL:
            return "undecided"
        is_better = (self.score.difference.value > 0) == metric_of(self.metric).higher_is_better
        return "better" if is_better else "worse"


@dataclass(frozen=True)
class SurvivalCell:
    """One task and budget of a comparison: `cell_frame`'s table, the compared metric, and every arm against the control."""

    where: str
    frame: pd.DataFrame
    metric: str
    paired: list[PairedSurvival]


def survival_cells(study: Study, rng: np.random.Generator) -> list[SurvivalCell]:
    """Compare the arms of every task and budget of which scores after treatments were kept."""
    found = []
    for cell in study.cells:
        frame = cell_frame(cell, study.arms)
        if not frame.empty:
            metric = _metric_in(frame, study.question)
            paired = paired_survival(frame, study.question.control, metric, rng)
            where = f"{cell.title}, {budget_name(cell.budget)}"
            found.append(SurvivalCell(where, frame, metric, paired))
    return found


def survival_blocks(study: Study, cells: Sequence[SurvivalCell]) -> list[Block]:
    """Build the section: per task and budget, scores of all arms and paired differences from the control."""
    if not any(run.survival for run in study.records):
        return []
    blocks = [block for index, cell in enumerate(cells, 1) for block in _cell_blocks(study, cell, index)]
    without = [run for run in study.records if run.status == "finished" and not run.survival and not is_trial(run)]
    missing = f" {len(without)} finished runs lack these scores." if without else ""
    what = (
        "Each run's final model, altered without further training and evaluated again. Quantization rounds weights to the nearest of "
        "2^bits levels, pruning sets the smallest weights of each matrix to zero, noise is Gaussian, in units of the standard deviation of "
        "each matrix. Embeddings and head are not altered unless the plan says so."
    )
    problems = problem_blocks((f"{run.arm}, seed {run.seed}", run.survival) for run in study.records)
    return [Text(what + missing), Text(CAVEAT), *blocks, *problems]


def cell_frame(cell: Cell, arms: Sequence[str]) -> pd.DataFrame:
    """Tabulate a cell: one row per arm, seed and treatment, draws averaged, one column per metric."""
    frames = [
        mean_over_draws(run.survival).assign(name=arm, seed=run.seed)
        for arm in arms
        for run in cell.runs.get(arm, [])
        if run.survival and run.seed is not None
    ]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def paired_survival(frame: pd.DataFrame, control: str, metric: str, rng: np.random.Generator) -> list[PairedSurvival]:
    """Compare every arm of `frame` with the control after every treatment, see `PairedSurvival`."""
    entries = []
    for arm in dict.fromkeys(frame.name):
        if arm == control:
            continue
        own = []
        for treatment in treatments_in(frame):
            score, change = (
                compare_paired(values(frame, arm, treatment, metric), values(frame, control, treatment, metric), rng)
                for values in (_values, _changes)
            )
            if score is not None and change is not None:
                own.append(PairedSurvival(treatment, arm, metric, score, change))
        adjusted = holm([entry.score.t_p if entry.treatment.kind != NONE else None for entry in own])
        entries += [replace(entry, p_holm=p) for entry, p in zip(own, adjusted, strict=True)]
    return entries


def answers(cells: Sequence[SurvivalCell], question: Question) -> list[str]:
    """Return a sentence per task and budget: after which treatments the arm in question is better, and after which worse."""
    return [sentence for cell in cells for sentence in _answer(cell, question)]


def _answer(cell: SurvivalCell, question: Question) -> list[str]:
    treated = [entry for entry in cell.paired if entry.arm == question.treatment and entry.treatment.kind != NONE]
    if not treated:
        return []
    if all(entry.verdict == "one seed" for entry in treated):
        return [f"{cell.where}: one seed says nothing about {question.treatment} against {question.control}."]
    parts = []
    for verdict in ("better", "worse", "undecided", "one seed"):
        named = [
            f"{entry.treatment.label} ({signed(entry.score.difference.value, entry.metric)})"
            for entry in treated
            if entry.verdict == verdict
        ]
        if named:
            parts.append(f"{verdict} after {', '.join(named)}")
    return [
        f"{cell.where}: {question.treatment} against {question.control}, by {metric_of(cell.metric).label}: {'; '.join(parts)}."
    ]


def _cell_blocks(study: Study, cell: SurvivalCell, index: int) -> list[Block]:
    frame, metric, where, question = cell.frame, cell.metric, cell.where, study.question
    arms = [arm for arm in study.arms if (frame.name == arm).any()]
    blocks: list[Block] = [Text(sentence, "answer") for sentence in _answer(cell, question)]
    blocks += [*_answer_table(cell, question), _score_table(cell, arms)]
    curves = _band_over_seeds(frame, arms, metric)
    if has_curves(curves):
        words = f"{where}: {metric_of(metric).label} after each treatment, mean over seeds, range over seeds shaded."
        blocks.append(plots.figure(f"survival-{index}", words, plots.draw_survival, curves, arms, metric))
    return [*blocks, *_side_table(cell, arms), *_paired_table(cell, question.control)]


def _answer_table(cell: SurvivalCell, question: Question) -> list[Block]:
    """Tabulate the arm in question against the control, one row per treatment."""
    rows = []
    for entry in (entry for entry in cell.paired if entry.arm == question.treatment):
        means = []
        for arm in (question.control, question.treatment):
            scores = _values(cell.frame, arm, entry.treatment, cell.metric)
            means.append(value_and_spread([scores[seed] for seed in entry.score.seeds], cell.metric))
        rows.append([entry.treatment.label, *means, _difference(entry.score, entry.metric), entry.verdict])
    if not rows:
        return []
    caption = f"{cell.where}: {labelled(cell.metric)}, mean ± sd over seeds, and {question.treatment} minus {question.control}"
    columns = ["treatment", question.control, question.treatment, "difference [95 %]", "verdict"]
    return [Table(columns, rows, caption, stacked=True)]


def _score_table(cell: SurvivalCell, arms: Sequence[str]) -> Table:
    """Tabulate the scores of all arms; whichever of arms and treatments are more make the rows, so that it stays narrow."""
    frame, metric, treatments = cell.frame, cell.metric, treatments_in(cell.frame)

    def shown(arm: str, treatment: Treatment) -> str:
        changes = list(_changes(frame, arm, treatment, metric).values())
        change = f" ({signed(float(np.mean(changes)), metric)})" if changes and treatment.kind != NONE else ""
        return value_and_spread(list(_values(frame, arm, treatment, metric).values()), metric) + change

    if len(arms) > len(treatments):
        columns = ["arm", *(treatment.label for treatment in treatments)]
        rows = [[arm, *(shown(arm, treatment) for treatment in treatments)] for arm in arms]
    else:
        columns = ["treatment", *arms]
        rows = [[treatment.label, *(shown(arm, treatment) for arm in arms)] for treatment in treatments]
    caption = f"{cell.where}: {labelled(metric)} of all arms, mean ± sd over seeds, mean change from the model as trained in brackets"
    return Table(columns, rows, caption)


def _side_table(cell: SurvivalCell, arms: Sequence[str]) -> list[Block]:
    frame, metric = cell.frame, cell.metric
    side = [name for name in SIDE_METRICS if name in frame and name != metric]
    if not side:
        return []
    rows = [
        [
            treatment.label,
            arm,
            *(value_and_spread(list(_values(frame, arm, treatment, name).values()), name) for name in side),
        ]
        for treatment in treatments_in(frame)
        for arm in arms
    ]
    title = f"{cell.where}: loss and calibration after each treatment, mean ± sd"
    return [Table(["treatment", "arm", *map(labelled, side)], rows, title, 2, folded=True)]


def _paired_table(cell: SurvivalCell, control: str) -> list[Block]:
    rows = [
        [
            entry.treatment.label,
            entry.arm,
            str(len(entry.score.seeds)),
            *(_difference(difference, entry.metric) for difference in (entry.score, entry.change)),
            *(p_value(p) for p in (entry.score.t_p, entry.p_holm)),
        ]
        for entry in cell.paired
    ]
    if not rows:
        return []
    columns = [
        "treatment",
        "arm",
        "seeds",
        f"score minus {control}'s [Student]",
        "change minus the control's [Student]",
    ]
    columns += ["t-test p of the score", "Holm"]
    title = f"{cell.where}: paired over seeds; Holm's adjustment over the treatments of an arm"
    return [Table(columns, rows, title, 2, folded=True)]


def _difference(paired: PairedComparison, metric: str) -> str:
    return with_interval(paired.difference.value, paired.t_low, paired.t_high, metric)


def _values(frame: pd.DataFrame, name: str, treatment: Treatment, metric: str) -> dict[int, float]:
    """Map seeds to scores."""
    at = frame[(frame.name == name) & (frame.kind == treatment.kind) & _at_level(frame, treatment)]
    return {int(row.seed): float(row[metric]) for _, row in at.iterrows() if finite(row[metric]) is not None}


def _at_level(frame: pd.DataFrame, treatment: Treatment) -> pd.Series:
    return frame.level.isna() if treatment.level is None else frame.level == treatment.level


def _changes(frame: pd.DataFrame, name: str, treatment: Treatment, metric: str) -> dict[int, float]:
    values, plain = _values(frame, name, treatment, metric), _values(frame, name, Treatment(NONE), metric)
    return {seed: values[seed] - plain[seed] for seed in values.keys() & plain.keys()}


def _band_over_seeds(frame: pd.DataFrame, arms: Sequence[str], metric: str) -> pd.DataFrame:
    rows = []
    for arm in arms:
        for treatment in treatments_in(frame):
            values = list(_values(frame, arm, treatment, metric).values())
            if values:
                rows.append(
                    (arm, treatment.kind, treatment.level, np.mean(values), min(values), max(values), len(values))
                )
    return pd.DataFrame(rows, columns=["name", "kind", "level", "value", "low", "high", "n"])


def _metric_in(frame: pd.DataFrame, question: Question) -> str:
    asked = "loss" if question.metric == "perplexity" else question.metric  # perplexity explodes at few bits
    return next(name for name in (asked, "accuracy", "loss") if name in frame)
