"""Everything that a report shows, computed once from the records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..evaluation.predictions import Predictions, read_predictions
from ..experiments.plan import Question
from ..experiments.records import RunRecord
from .results import (
    Cell,
    Comparison,
    Overall,
    arm_order,
    compare_arms,
    compare_overall,
    guess_question,
    make_cells,
    natural,
)
from .statistics import Estimate, bootstrap_examples


@dataclass
class Study:
    """
    The records of a comparison and everything computed from them.

    Args:
        records (`list[RunRecord]`): Every run, whatever its status.
        question (`Question`): The question.
        arms (`list[str]`): In the order in which they are shown, the control first.
        cells (`list[Cell]`): The runs that count, by task, condition and budget.
        comparisons (`list[Comparison]`): Every arm against the control, in every cell.
        overall (`list[Overall]`): Every arm against the control across cells.
        predictions (`dict[Path, Predictions]`): Kept predictions, by the path of their record.
        problems (`list[str]`): Messages about files that could not be read.
        missing (`int`): Planned runs without a record.
    """

    records: list[RunRecord]
    question: Question
    arms: list[str]
    cells: list[Cell]
    comparisons: list[Comparison]
    overall: list[Overall]
    predictions: dict[Path, Predictions] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    missing: int = 0

    @property
    def asked(self) -> list[Comparison]:
        """The comparisons that the question is about."""
        return [entry for entry in self.comparisons if entry.arm == self.question.treatment]

    def pooled_predictions(self, cell: Cell, arm: str) -> Predictions | None:
        """Concatenate the kept predictions of all seeds of an arm; `None` without any, or if their classes differ."""
        kept = [self.predictions[run.path] for run in cell.runs.get(arm, []) if run.path in self.predictions]
        if not kept or len({entry.probabilities.shape[1] for entry in kept}) != 1:
            return None
        labels = np.concatenate([entry.labels for entry in kept])
        return Predictions(labels, np.concatenate([entry.probabilities for entry in kept]))

    def difference_over_examples(self, comparison: Comparison, rng: np.random.Generator) -> Estimate | None:
        """
        Compute the mean difference in accuracy with its bootstrap interval over test examples, the seeds held fixed.

        Returns `None` if the predictions of a seed were not kept, or if the examples differ between the arms or between seeds.
        """
        rows, labels = [], None
        for seed in comparison.paired.seeds:
            pair = [self._predictions(comparison.cell, arm, seed) for arm in (comparison.arm, comparison.control)]
            if None in pair:
                return None
            labels = pair[0].labels if labels is None else labels
            if not all(np.array_equal(kept.labels, labels) for kept in pair):
                return None
            rows.append(pair[0].correct.astype(float) - pair[1].correct)
        gain = np.mean(rows, axis=0)
        return bootstrap_examples(lambda index: gain[index].mean(), len(gain), rng)

    def _predictions(self, cell: Cell, arm: str, seed: int) -> Predictions | None:
        run = next((run for run in cell.runs.get(arm, []) if run.seed == seed), None)
        return self.predictions.get(run.path) if run is not None else None


def make_study(
    records: Sequence[RunRecord],
    *,
    control: str | None = None,
    treatment: str | None = None,
    metric: str | None = None,
    margin: float | None = None,
    arms: Sequence[str] = (),
    problems: Sequence[str] = (),
    missing: int = 0,
    seed: int = 0,
) -> Study:
    """
    Compute a study; the arguments are those of `write_report`.

    Raises:
        ValueError: If there are no records, or none has the control, treatment or metric of the question.
    """
    if not records:
        raise ValueError(" ".join(["There is no run record to report on.", *problems]))
    records = sorted(records, key=_reading_order)
    question = guess_question(records, control, treatment, metric, margin)
    shown = arm_order(records, [question.control, *arms])
    cells, rng = make_cells(records), np.random.default_rng(seed)
    comparisons = compare_arms(cells, question.control, question.metric, shown, rng, question.margin)
    predictions = {}
    for run in records:
        kept = read_predictions(run.path.parent / run.predictions) if run.predictions and run.path else None
        if kept is not None:
            predictions[run.path] = kept
    return Study(
        records=records,
        question=question,
        arms=shown,
        cells=cells,
        comparisons=comparisons,
        overall=compare_overall(comparisons, rng),
        predictions=predictions,
        problems=list(problems),
        missing=missing,
    )


def _reading_order(run: RunRecord) -> tuple:
    """Return a sort key, so that a report does not depend on the order in which records were read."""
    seed = -1 if run.seed is None else run.seed
    return natural(run.task), natural(run.condition), run.budget, run.arm, seed, str(run.path)
