"""Report on a comparison: first the answer with its uncertainty, then everything needed to check it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ..evaluation.metrics import metric_of
from ..experiments.plan import BUDGETS
from ..experiments.records import RunRecord
from . import plots
from .document import Block, Columns, Document, Figure, Listing, Section, Table, Text, write_document
from .formatting import answer as answer_of
from .formatting import (
    budget_name,
    headline,
    labelled,
    number,
    overall_sentence,
    p_value,
    size,
    value_and_spread,
    with_interval,
)
from .results import Comparison, comparisons_table, mean_and_spread, runs_table
from .retained_gain import share_blocks
from .sections import calibration_blocks, cost_blocks, curve_blocks, noise_blocks, sharpness_blocks
from .setup import provenance_blocks, setup_blocks
from .study import Study, make_study
from .sufficiency import next_steps, warnings
from .survival import TITLE as SURVIVAL
from .survival_of_arms import SurvivalCell, survival_blocks, survival_cells
from .survival_of_arms import answers as survival_answers
from .validity import limits

MAX_ANSWERS = 12
MAX_DRAWN = 40
MAX_EXTRA_METRICS = 4
MAX_RUNS = 1000  # listed in the page; all are in data/runs.csv
BESIDE = ("nll", "ece")  # shown next to the compared metric: accuracy alone hides what SAM changes
OTHER_METRICS = ("f1_macro", "mcc", "spearman", "brier")


def write_report(
    records: Sequence[RunRecord],
    folder: str | os.PathLike,
    *,
    title: str = "Comparison",
    seed: int = 0,
    command: str | None = None,
    **question,
) -> Path:
    """
    Write the report of a set of runs.

    Args:
        records (`Sequence[RunRecord]`): Records of hf_sam and of other trainers, see `find_records` and `find_external_runs`.
        folder (`str` or `os.PathLike`): Receives `report.html`, `report.md`, `figures/` and `data/`.
        title (`str`, *optional*): Heading.
        seed (`int`, *optional*, defaults to 0): Seed of the bootstrap.
        command (`str`, *optional*): The command that repeats the runs and this report.
        control, treatment (`str`, *optional*): The arms of the question; guessed from the records if omitted.
        metric (`str`, *optional*): The compared metric; if omitted, the first known one that all runs have.
        margin (`float`, *optional*): The margin of equivalence, in the unit in which the metric is shown; 0.3 points if omitted.
        arms (`Sequence[str]`, *optional*): The order in which arms are shown.
        problems (`Sequence[str]`, *optional*): Messages about files that could not be read.
        missing (`int`, *optional*, defaults to 0): Planned runs without a record.

    Returns:
        `Path`: Path of `report.html`.

    Raises:
        ValueError: If there are no records, or none has the control, treatment or metric of the question.
    """
    study = make_study(records, seed=seed, **question)
    return write_document(make_document(study, title, Path(folder), seed, command), Path(folder))


def make_document(study: Study, title: str, folder: Path, seed: int = 0, command: str | None = None) -> Document:
    """Build the report; paths of records in its tables are relative to `folder`."""
    question, rng = study.question, np.random.default_rng(seed)
    several, survival = question.treatment != question.control, survival_cells(study, rng)
    sections = [
        Section("Answer", _answer_blocks(study, survival)),
        Section("What to do next", _next_blocks(study, command) if several else []),
        Section("All arms", [block for budget in _budgets(study) for block in _result_blocks(study, budget)]),
        Section("Curves", curve_blocks(study)),
        Section("Cost", cost_blocks(study)),
        Section("Calibration", calibration_blocks(study)),
        Section("Label noise", noise_blocks(study)),
        Section("Sharpness", sharpness_blocks(study)),
        Section(SURVIVAL, survival_blocks(study, survival)),
        Section("Limits of this comparison", limits(study)),
        Section("Set-up", setup_blocks(study), folded=True),
        Section("Statistics", _statistics_blocks(study, rng), folded=True),
        Section("Every run", _run_blocks(study), folded=True),
        Section("Provenance", provenance_blocks(study), folded=True),
    ]
    done = sum(run.status in ("finished", "external") for run in study.records)
    lead = (
        f"{done} of {len(study.records) + study.missing} runs of {', '.join(study.arms)}. A difference is an arm minus "
        f"{question.control} with the same seed, on the test split, at the last checkpoint."
    )
    comparisons = comparisons_table(study.comparisons)
    numbers = {
        "question": asdict(question),
        "comparisons": comparisons.to_dict("records"),
        "overall": [asdict(entry) for entry in study.overall],
    }
    tables = {"runs": runs_table(study.records, folder), "comparisons": comparisons}
    return Document(title, lead, sections, tables, numbers, warnings(study) if several else [])


def _answer_blocks(study: Study, survival: Sequence[SurvivalCell]) -> list[Block]:
    question, asked = study.question, study.asked
    if question.treatment == question.control:
        done = any(run.status == "finished" for run in study.records)
        what = f"only {question.control} has finished runs" if done else "no run has finished"
        return [Text(f"No answer yet: {what}.", "warning")]
    if not asked:
        return [Text("No answer yet: no seed has finished runs of both arms.", "warning")]
    shown = asked[:MAX_ANSWERS]
    below = [
        Text(overall_sentence(entry, question.metric)) for entry in study.overall if entry.arm == question.treatment
    ]
    if len(asked) > MAX_ANSWERS:
        below.append(Text(f"{len(asked) - MAX_ANSWERS} more are in the tables below."))
    caption = f"Mean difference; thin line: 95 % interval, thick line: 90 %.{_margin_words(study)}"
    figure = _forest("answer", caption, shown)
    after = survival_answers(survival, question)
    blocks: list[Block] = [Text(headline(asked), "verdict"), Columns([_answer_table(study, shown), *below], figure)]
    if after:
        blocks += [Text(f"After treatments of the trained models (below: {SURVIVAL}):"), Listing(after)]
    return blocks


def _margin_words(study: Study) -> str:
    question = study.question
    if question.margin is None:
        return ""
    margin = size(question.margin / metric_of(question.metric).scale, question.metric)
    return f" Band: the margin of ±{margin}; two arms are equivalent if the thick line lies inside it."


def _answer_table(study: Study, shown: Sequence[Comparison]) -> Table:
    question, metric = study.question, metric_of(study.question.metric)
    beside = [name for name in BESIDE if name != question.metric and _has(study, name)]

    def both(entry: Comparison, name: str) -> str:
        """Format the means of the two arms over their common seeds."""
        cell, row = entry.cell, metric_of(name)
        pair = (cell.scores(arm, name) for arm in (entry.control, entry.arm))
        means = [mean_and_spread([kept[seed] for seed in entry.paired.seeds if seed in kept])[0] for kept in pair]
        return " → ".join(number(mean * row.scale, row.digits) for mean in means)

    rows = [
        [
            entry.cell.title,
            budget_name(entry.cell.budget),
            both(entry, question.metric),
            with_interval(entry.paired.difference.value, entry.paired.t_low, entry.paired.t_high, question.metric),
            entry.verdict,
            *(both(entry, name) for name in beside),
        ]
        for entry in shown
    ]
    columns = ["task", "budget", labelled(question.metric), "difference [95 %]", "verdict", *map(labelled, beside)]
    caption = f"{question.control} → {question.treatment}, means over seeds"
    caption += "" if metric.higher_is_better else f"; lower {metric.label} is better"
    return Table(columns, rows, caption, 2, stacked=True)


def _next_blocks(study: Study, command: str | None) -> list[Block]:
    steps = next_steps(study)
    blocks: list[Block] = [Listing(steps)] if steps else []
    if command:
        blocks += [Text("This command runs what is missing and writes this report again:"), Text(command, "command")]
    return blocks


def _budgets(study: Study) -> list[str]:
    """Return the budgets of the runs, the known ones first; a custom script may record another."""
    return list(dict.fromkeys([*BUDGETS, *(cell.budget for cell in study.cells)]))


def _result_blocks(study: Study, budget: str) -> list[Block]:
    cells = [cell for cell in study.cells if cell.budget == budget]
    if not cells:
        return []
    question, metric = study.question, study.question.metric
    found = {(entry.cell, entry.arm): entry for entry in study.comparisons if entry.cell.budget == budget}
    beside = [name for name in BESIDE if name != metric and _has(study, name)]
    rows = []
    for cell in cells:
        for arm in study.arms:
            if not cell.values(arm, metric):
                continue
            row = [
                cell.title,
                arm,
                str(len(cell.values(arm, metric))),
                value_and_spread(cell.values(arm, metric), metric),
            ]
            entry = found.get((cell, arm))
            if entry is None:
                row += ["", "control" if arm == question.control else "not paired"]
            else:
                paired = entry.paired
                row += [with_interval(paired.difference.value, paired.t_low, paired.t_high, metric), entry.verdict]
            rows.append(row + [value_and_spread(cell.values(arm, name), name) for name in beside])
    columns = ["task", "arm", "runs", labelled(metric), "difference [95 %]", "verdict", *map(labelled, beside)]
    caption = (
        f"At {budget_name(budget)}: mean ± standard deviation over seeds, and the difference from {question.control}"
    )
    table = Table(columns, rows, caption, 2, stacked=True)
    drawn = list(found.values())[:MAX_DRAWN]
    figure = (
        _forest(f"differences-{budget}", f"Differences from {question.control}, as in the table.", drawn)
        if drawn
        else []
    )
    return [Columns([table, *share_blocks(study, list(found.values()))], figure)]


def _forest(name: str, caption: str, entries: Sequence[Comparison]) -> list[Block]:
    """Draw a forest plot of the differences, narrow enough for a phone or a column next to a table."""
    canvas = plots.draw_differences(entries)
    return [Figure(name, canvas, caption, comparisons_table(entries))]


def _statistics_blocks(study: Study, rng: np.random.Generator) -> list[Block]:
    """Show every test of every comparison, other metrics, and differences over test examples."""
    if not study.comparisons:
        return []
    metric, question = study.question.metric, study.question
    seeds = {len(entry.paired.seeds): entry.paired.p_floor for entry in study.comparisons if entry.paired.p_floor}
    floors = "; ".join(f"{n} seeds cannot give a sign-flip p below {p_value(p)}" for n, p in sorted(seeds.items()))
    margin = "" if question.margin is None else f"±{size(question.margin / metric_of(metric).scale, metric)}"
    columns = ["task", "budget", "arm", "seeds", "difference", "Student 95 %", "bootstrap 95 %"]
    columns += ["t-test p", "Holm", "sign-flip p", *(["equivalence p"] if margin else []), "within", "detectable"]

    def row(entry: Comparison) -> list[str]:
        paired = entry.paired
        bounds = [None if value is None else size(value, metric) for value in (paired.within, paired.detectable)]
        return [
            *_names(entry),
            str(len(paired.seeds)),
            with_interval(paired.difference.value, None, None, metric),
            with_interval(None, paired.t_low, paired.t_high, metric),
            with_interval(None, paired.difference.low, paired.difference.high, metric),
            *map(p_value, (paired.t_p, entry.p_holm, paired.p_value)),
            *([p_value(entry.p_equivalent)] if margin else []),
            "-" if bounds[0] is None else f"±{bounds[0]}",
            bounds[1] or "-",
        ]

    blocks: list[Block] = [
        Text(
            "Verdicts follow the paired t-test over seeds, with Holm's adjustment over the tasks and conditions of the same arm "
            "and budget. Better or worse: significant at 5 %. Leans better or worse: significant only before the adjustment. "
            "Equivalent: two one-sided t-tests, adjusted the same way, show that the difference is within the margin "
            "(evidence of absence). Undecided: everything else (absence of evidence). "
            + (f"{floors}." if floors else "")
        ),
        Table(columns, [row(entry) for entry in study.comparisons], "Every comparison", 3),
        *(Text(answer_of(entry)) for entry in study.asked[:MAX_ANSWERS] if len(study.asked) > 1),
    ]
    others = [name for name in (*OTHER_METRICS, f"gap.{metric}") if name != metric and _has(study, name)]
    if others:
        rows = _rows(study, others, value_and_spread)
        blocks.append(Table(["task", "budget", "arm", *map(labelled, others)], rows, "Other metrics, mean ± sd", 3))
    over_examples = [(entry, study.difference_over_examples(entry, rng)) for entry in study.comparisons]
    rows = [
        [*_names(entry), with_interval(gain.value, gain.low, gain.high, "accuracy"), str(gain.n)]
        for entry, gain in over_examples
        if gain is not None
    ]
    if rows:
        caption = "The same seeds, other test examples: difference in accuracy (points), bootstrap over test examples"
        blocks.append(Table(["task", "budget", "arm", "difference [95 %]", "examples"], rows, caption, 3))
    others = [entry for entry in study.overall if entry.arm != question.treatment]
    return blocks + [Text(overall_sentence(entry, metric)) for entry in others]


def _rows(study: Study, names: Sequence[str], shown: Callable) -> list[list[str]]:
    """Return one row for each cell and arm with any of the metrics."""
    return [
        [cell.title, budget_name(cell.budget), arm, *(shown(cell.values(arm, name), name) for name in names)]
        for cell in study.cells
        for arm in study.arms
        if any(cell.values(arm, name) for name in names)
    ]


def _names(entry: Comparison) -> list[str]:
    return [entry.cell.title, budget_name(entry.cell.budget), entry.arm]


def _has(study: Study, name: str) -> bool:
    return any(cell.values(arm, name) for cell in study.cells for arm in study.arms)


def _run_blocks(study: Study) -> list[Block]:
    runs, metric = study.records, study.question.metric
    names = dict.fromkeys(name for run in runs for name in run.metrics if not name.startswith("train_"))
    shown = [metric, *[name for name in names if name != metric][:MAX_EXTRA_METRICS]]

    def named(run: RunRecord) -> list[str]:
        return [run.task, run.condition, run.budget, run.arm, "-" if run.seed is None else str(run.seed)]

    def score(run: RunRecord, name: str) -> str:
        return value_and_spread([run.metrics[name]] if run.metrics.get(name) is not None else [], name)

    def costs(run: RunRecord) -> list[str]:
        return [number(run.steps, 0), number(run.passes, 0), number(run.seconds, 1)]

    listed = runs[:MAX_RUNS]
    rows = [[*named(run), run.status, *(score(run, name) for name in shown), *costs(run)] for run in listed]
    names = ["task", "condition", "budget", "arm", "seed"]
    columns = [*names, "status", *map(labelled, shown), "steps", "passes", "seconds"]
    is_whole = len(listed) == len(runs)
    caption = "All runs" if is_whole else f"The first {MAX_RUNS:,} of {len(runs):,} runs; data/runs.csv has all"
    blocks: list[Block] = [Table(columns, rows, caption, 6)]
    failed = [run for run in runs if run.status == "failed"][:MAX_RUNS]
    if failed:
        errors = [
            [*named(run), f"{(run.error or {}).get('type')}: {(run.error or {}).get('message')}"] for run in failed
        ]
        blocks.insert(0, Table([*names, "error"], errors, "Failed runs", 99))
    return blocks
