"""The report of a comparison: what was asked, the answer with its uncertainty, and all that is needed to doubt it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ..evaluation.metrics import metric_of
from ..experiments.plan import BUDGETS
from ..experiments.records import RunRecord
from . import plots
from .document import Block, Document, Figure, Section, Table, Text, write_document
from .formatting import answer, number, overall_sentence, p_value, value_and_spread, with_interval
from .results import comparisons_table, runs_table
from .retained_gain import share_blocks
from .sections import calibration_blocks, cost_blocks, curve_blocks, noise_blocks, sharpness_blocks
from .setup import setup_blocks
from .study import Study, make_study
from .survival import TITLE as SURVIVAL
from .survival import has_survival, survival_blocks
from .validity import threats

MAX_ANSWERS = 12
MAX_DRAWN = 60
MAX_EXTRA_METRICS = 4
OTHER_METRICS = ("f1_macro", "mcc", "spearman")  # shown beside the one that is compared


def write_report(
    records: Sequence[RunRecord], folder: str | os.PathLike, *, title: str = "Comparison", seed: int = 0, **question
) -> Path:
    """
    Writes the report of a set of runs.

    Args:
        records (`Sequence[RunRecord]`): Ours and others', see `find_records` and `find_foreign_records`.
        folder (`str` or `os.PathLike`): Receives `report.html`, `report.md`, `figures/` and `data/`.
        title (`str`, *optional*): Heading.
        seed (`int`, *optional*, defaults to 0): Of the bootstrap.
        control, treatment (`str`, *optional*): The arms of the question; guessed from the records where left out.
        metric (`str`, *optional*): What is compared; the first known one that all runs have where left out.
        arms (`Sequence[str]`, *optional*): The order in which arms are shown.
        problems (`Sequence[str]`, *optional*): Messages about files that could not be read.
        missing (`int`, *optional*, defaults to 0): Planned runs without a record.

    Returns:
        `Path`: Of `report.html`.

    Raises:
        ValueError: No records at all, or a name in the question that no record has.
    """
    return write_document(
        make_document(make_study(records, seed=seed, **question), title, Path(folder), seed), Path(folder)
    )


def make_document(study: Study, title: str, folder: Path, seed: int = 0) -> Document:
    """The sections of the report, and the tables beside it, in which records are named from `folder`."""
    rng = np.random.default_rng(seed)
    sections = [
        Section("Question and answer", _answer_blocks(study)),
        Section("Set-up", setup_blocks(study)),
        *(Section(f"Result at {words}", _result_blocks(study, budget, rng)) for budget, words in BUDGETS.items()),
        Section("Curves", curve_blocks(study)),
        Section("Cost", cost_blocks(study)),
        Section("Calibration", calibration_blocks(study)),
        Section("Robustness to label noise", noise_blocks(study)),
        *([Section(SURVIVAL, survival_blocks(study, rng))] if has_survival(study.records) else []),
        Section("Sharpness", sharpness_blocks(study)),
        Section("Every run", _run_blocks(study)),
        Section("Threats to validity", threats(study)),
    ]
    done = sum(run.status in ("finished", "foreign") for run in study.records)
    lead = (
        f"{done} of {len(study.records) + study.missing} runs: {', '.join(study.arms)}. A difference is an arm minus "
        f"{study.question.control}, over runs with the same seed. Intervals are at 95 %."
    )
    comparisons = comparisons_table(study.comparisons)
    numbers = {
        "question": asdict(study.question),
        "comparisons": comparisons.to_dict("records"),
        "overall": [asdict(entry) for entry in study.overall],
    }
    return Document(
        title, lead, sections, {"runs": runs_table(study.records, folder), "comparisons": comparisons}, numbers
    )


def _answer_blocks(study: Study) -> list[Block]:
    question = study.question
    if question.treatment == question.control:
        done = any(run.status == "finished" for run in study.records)
        what = f"only {question.control} has finished runs" if done else "no run has finished"
        return [Text(f"No answer yet: {what}.", "warning")]
    blocks: list[Block] = [
        Text(
            f"Does {question.treatment} give a better {metric_of(question.metric).label} than {question.control}, "
            f"on the test split, at the last checkpoint?"
        )
    ]
    asked = [entry for entry in study.comparisons if entry.arm == question.treatment]
    blocks += [Text(answer(entry), "answer") for entry in asked[:MAX_ANSWERS]]
    if len(asked) > MAX_ANSWERS:
        blocks.append(Text(f"{len(asked) - MAX_ANSWERS} more tasks are in the tables of results below."))
    if not asked:
        blocks.append(Text("No answer yet: no seed has a finished run of both arms.", "warning"))
    blocks += [
        Text(overall_sentence(entry, question.metric)) for entry in study.overall if entry.arm == question.treatment
    ]
    return blocks


def _result_blocks(study: Study, budget: str, rng: np.random.Generator) -> list[Block]:
    cells = [cell for cell in study.cells if cell.budget == budget]
    if not cells:
        return [Text(f"No finished run at {BUDGETS[budget]}.")]
    metric = study.question.metric
    found = {(entry.cell, entry.arm): entry for entry in study.comparisons if entry.cell.budget == budget}
    rows = []
    for cell in cells:
        for arm in study.arms:
            values = cell.values(arm, metric)
            if not values:
                continue
            row = [cell.title, arm, str(len(values)), value_and_spread(values, metric)]
            entry = found.get((cell, arm))
            if entry is None:
                reason = "control" if arm == study.question.control else "not paired"
                rows.append([*row, reason, "", "", "", "", ""])
                continue
            paired = entry.paired
            student = with_interval(None, paired.t_low, paired.t_high, metric)
            difference = with_interval(paired.difference.value, paired.difference.low, paired.difference.high, metric)
            tests = [p_value(paired.t_p), p_value(entry.p_holm), p_value(paired.p_value)]
            rows.append([*row, difference, student, *tests, entry.verdict])
    columns = ["task", "arm", "runs", f"{metric_of(metric).label}, mean ± sd", "difference [bootstrap]", "[Student]"]
    columns += ["t-test p", "Holm", "sign-flip p", "verdict"]
    floors = {len(entry.paired.seeds): entry.paired.p_floor for entry in found.values() if entry.paired.p_floor}
    caption = "; ".join(f"{n} seeds cannot give a sign-flip p below {p_value(p)}" for n, p in sorted(floors.items()))
    blocks: list[Block] = [Table(columns, rows, caption and f"{caption}.", numeric_from=2)]
    others = [
        name
        for name in (*OTHER_METRICS, f"gap.{metric}")
        if any(cell.values(a, name) for cell in cells for a in study.arms)
    ]
    if others := [name for name in others if name != metric]:
        rows = [
            [cell.title, arm, *(value_and_spread(cell.values(arm, name), name) for name in others)]
            for cell in cells
            for arm in study.arms
            if any(cell.values(arm, name) for name in others)
        ]
        labels = [metric_of(name).label for name in others]
        blocks.append(Table(["task", "arm", *labels], rows, "Beside it, mean ± sd", 2))
    if found:
        drawn = list(found.values())[:MAX_DRAWN]
        caption = f"Paired differences from {study.question.control} at {BUDGETS[budget]}: mean, bootstrap interval (thick) and Student's (thin)."
        data = comparisons_table(drawn)
        blocks.append(Figure(f"differences-{budget}", plots.draw_differences(drawn), caption, data))
    blocks += share_blocks(study, list(found.values()))
    over_examples = {key: study.difference_over_examples(entry, rng) for key, entry in found.items()}
    rows = [
        [cell.title, arm, with_interval(gain.value, gain.low, gain.high, "accuracy"), str(gain.n)]
        for (cell, arm), gain in over_examples.items()
        if gain is not None
    ]
    if rows:
        caption = "The same seeds, other test examples: difference in accuracy (points), bootstrap over test examples."
        blocks.append(Table(["task", "arm", "difference [bootstrap]", "examples"], rows, caption, 2))
    overall = [entry for entry in study.overall if entry.budget == budget]
    blocks += [Text(overall_sentence(entry, metric)) for entry in overall if entry.arm != study.question.treatment]
    return blocks


def _run_blocks(study: Study) -> list[Block]:
    runs, metric = study.records, study.question.metric
    names = dict.fromkeys(name for run in runs for name in run.metrics if not name.startswith("train_"))
    extra = [name for name in names if name != metric][:MAX_EXTRA_METRICS]
    rows = [
        [run.task, run.condition, run.budget, run.arm, "-" if run.seed is None else str(run.seed), run.status]
        + [
            value_and_spread([run.metrics[name]] if run.metrics.get(name) is not None else [], name)
            for name in (metric, *extra)
        ]
        + [number(run.steps, 0), number(run.passes, 0), number(run.seconds, 1)]
        for run in runs
    ]
    columns = ["task", "condition", "budget", "arm", "seed", "status"]
    columns += [metric_of(name).label for name in (metric, *extra)] + ["steps", "passes", "seconds"]
    blocks: list[Block] = [Table(columns, rows, "All runs; all columns are in data/runs.csv", 6, folded=True)]
    failed = [run for run in runs if run.status == "failed"]
    if failed:
        errors = [
            [
                run.task,
                run.condition,
                run.budget,
                run.arm,
                str(run.seed),
                f"{(run.error or {}).get('type')}: {(run.error or {}).get('message')}",
            ]
            for run in failed
        ]
        blocks.append(Table(["task", "condition", "budget", "arm", "seed", "error"], errors, "Failed runs", 99))
    return blocks
