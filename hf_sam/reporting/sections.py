"""The sections of a report that follow its answer: curves, cost, calibration, label noise, sharpness."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from ..evaluation.calibration import reliability
from ..evaluation.metrics import metric_of
from . import plots
from .document import Block, Table, Text
from .formatting import budget_name, number, value_and_spread
from .results import Cell, mean_and_spread, noise_level
from .sharpness import CAVEAT, DESCRIPTIVE, label_of
from .study import Study

CALIBRATION_METRICS = ("nll", "ece", "brier")
MAX_OPEN_ROWS = 16
COSTS = ("steps", "passes", "seconds", "samples_per_second", "peak_memory")


def curve_blocks(study: Study) -> list[Block]:
    metric = study.question.metric
    keys = [
        (f"eval_{metric}", f"evaluation {metric_of(metric).label}"),
        ("eval_loss", "evaluation loss"),
        ("loss", "training loss"),
    ]
    blocks: list[Block] = []
    for key, label in keys:
        if not any(sum(key in entry for entry in run.curves) > 1 for run in study.records):
            continue
        points = plots.curve_points(study.cells, study.arms, key)
        if points.empty:
            continue
        present = set(zip(points.task, points.condition, points.budget, strict=True))
        logged = [cell for cell in study.cells if (cell.task, cell.condition, cell.budget) in present]
        for x, words, budget in (("step", "steps", "steps"), ("passes", "gradient evaluations", "passes")):
            if x == "passes" and points.passes.isna().all():
                continue
            cells = [cell for cell in logged if cell.budget == budget] or logged
            caption = f"{label.capitalize()} over {words}: mean over seeds, range over seeds shaded.{_cut(cells)}"
            name, arguments = f"curve-{key}-{words.split()[-1]}", (cells, study.arms, points, x, label)
            blocks.append(plots.figure(name, caption, plots.draw_curves, *arguments))
        break
    blocks += _cosine_blocks(study)
    return blocks or [Text("No run logged anything more than once. Set logging_steps to get curves.")]


def _cosine_blocks(study: Study) -> list[Block]:
    """Draw, for runs with second_order=True, how far the second-order term turns the gradient during training."""
    points = plots.curve_points(study.cells, study.arms, "sam_second_order_cosine")
    if points.empty:
        return []
    present = set(zip(points.task, points.condition, points.budget, strict=True))
    cells = [cell for cell in study.cells if (cell.task, cell.condition, cell.budget) in present]
    label = "cosine with and without second order"
    caption = (
        "Cosine between the descent gradient with and without the second-order term that SAM drops: mean over seeds, "
        f"range shaded.{_cut(cells)}"
    )
    arguments = (cells, study.arms, points, "step", label)
    return [plots.figure("second-order-cosine", caption, plots.draw_curves, *arguments)]


def cost_blocks(study: Study) -> list[Block]:
    metric, rows = study.question.metric, []
    for cell in study.cells:
        base = cell.values(study.question.control, "seconds")
        for arm in study.arms:
            if not cell.runs.get(arm):
                continue
            mean = {name: mean_and_spread(cell.values(arm, name))[0] for name in COSTS}
            ratio = mean["seconds"] / np.mean(base) if base and np.mean(base) > 0 else None
            rate, memory = number(mean["samples_per_second"], 1), number(mean["peak_memory"] / 2**20, 0)
            counts = [number(mean["steps"], 0), number(mean["passes"], 0), number(mean["seconds"], 1)]
            rows.append([cell.title, budget_name(cell.budget), arm, *counts, number(ratio, 2), rate, memory])
    columns = ["task", "budget", "arm", "steps", "passes", "seconds"]
    columns += [f"time / {study.question.control}", "samples/s", "peak memory (MiB)"]
    blocks: list[Block] = [
        Text(
            "Means over seeds, for the training loop only. A pass is one gradient of the whole effective batch. Trust passes "
            "more than time ratios, and ratios more than seconds: other work on the machine slows runs down."
        ),
        Table(columns, rows, "Cost of a run", 3, folded=len(rows) > MAX_OPEN_ROWS),
    ]
    cells = [cell for cell in study.cells if any(cell.values(arm, "seconds") for arm in study.arms)]
    if cells:
        caption = f"Cost and result of each run: {metric_of(metric).label} against seconds.{_cut(cells)}{_some(cells)}"
        arguments = (cells, study.arms, "seconds", metric, "seconds of training")
        blocks.append(plots.figure("cost", caption, plots.draw_scatter, *arguments))
    return blocks


def calibration_blocks(study: Study) -> list[Block]:
    blocks: list[Block] = []
    names = [name for name in CALIBRATION_METRICS if any(run.metrics.get(name) is not None for run in study.records)]
    if names:
        rows = [
            [
                cell.title,
                budget_name(cell.budget),
                arm,
                *(value_and_spread(cell.values(arm, n), n) for n in names),
            ]
            for cell in study.cells
            for arm in study.arms
            if any(cell.values(arm, name) for name in names)
        ]
        labels = [f"{metric_of(name).label}{' (%)' if metric_of(name).unit else ''}" for name in names]
        blocks.append(
            Table(
                ["task", "budget", "arm", *labels],
                rows,
                "Mean ± sd over seeds; lower is better",
                3,
                len(rows) > MAX_OPEN_ROWS,
            )
        )
    tables: dict[str, dict[str, pd.DataFrame]] = {}
    for cell in study.cells:
        for arm in study.arms:
            kept = study.pooled_predictions(cell, arm)
            if kept is not None:
                title = f"{cell.title}\n{budget_name(cell.budget)}"
                tables.setdefault(title, {})[arm] = reliability(kept.confidence, kept.correct)
    if tables:
        caption = (
            f"Reliability, predictions of all seeds pooled, 15 bins: below the diagonal is overconfident.{_cut(tables)}"
        )
        blocks.append(plots.figure("reliability", caption, plots.draw_reliability, tables, study.arms))
    return blocks


def noise_blocks(study: Study) -> list[Block]:
    cells = [cell for cell in study.cells if noise_level(cell.condition) is not None]
    if not any(noise_level(cell.condition) for cell in cells):
        return []
    label = metric_of(study.question.metric).label
    caption = (
        f"Test {label} against the share of wrong training labels: mean, with bars from the lowest to the highest seed."
    )
    return [plots.figure("label-noise", caption, plots.draw_noise, cells, study.arms, study.question.metric)]


def sharpness_blocks(study: Study) -> list[Block]:
    names = list(
        dict.fromkeys(name for run in study.records for name, value in run.sharpness.items() if value is not None)
    )
    if not names:
        return []
    metric = study.question.metric
    rows = [
        [cell.title, budget_name(cell.budget), arm, value_and_spread(cell.values(arm, metric), metric)]
        + [value_and_spread(cell.values(arm, f"sharpness.{name}"), name) for name in names]
        for cell in study.cells
        for arm in study.arms
        if any(cell.values(arm, f"sharpness.{name}") for name in names)
    ]
    blocks: list[Block] = [
        Text(CAVEAT),
        Table(
            ["task", "budget", "arm", metric_of(metric).label, *map(label_of, names)],
            rows,
            "Mean ± sd over seeds",
            3,
            len(rows) > MAX_OPEN_ROWS,
        ),
    ]
    drawn = next((name for name in names if name not in DESCRIPTIVE), names[0])
    cells = [cell for cell in study.cells if any(cell.values(arm, f"sharpness.{drawn}") for arm in study.arms)]
    if cells:
        caption = f"Test {metric_of(metric).label} against {label_of(drawn)}.{_cut(cells)}{_some(cells)}"
        arguments = (cells, study.arms, f"sharpness.{drawn}", metric, label_of(drawn))
        blocks.append(plots.figure("sharpness", caption, plots.draw_scatter, *arguments))
    return blocks


def _some(cells: Sequence[Cell]) -> str:
    """Return a sentence for the caption if not every run is drawn."""
    if max(len(runs) for cell in cells for runs in cell.runs.values()) <= plots.MAX_DRAWN_POINTS:
        return ""
    return f" At most {plots.MAX_DRAWN_POINTS} runs of an arm are drawn in a panel; the numbers include all."


def _cut(panels: Sequence) -> str:
    more = len(panels) - plots.MAX_PANELS
    return f" Only the first {plots.MAX_PANELS} panels are drawn; the numbers include {more} more." if more > 0 else ""
