"""Report on a search for rho: the points of the curve, their figure, and the recommendation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure as Canvas

from ..evaluation.metrics import metric_of
from ..rho_search.phases import Phase, RhoWorkshop, passes_spent
from ..rho_search.rule import Gain, recommended
from .document import Block, Document, Section, Table, Text, write_document
from .formatting import NOTHING, number, signed, with_interval
from .plots import COLOURS, INK, MARKERS, figure, is_narrow, size, styled


def curve(workshop: RhoWorkshop) -> pd.DataFrame:
    """Tabulate metric, loss and gain over rho 0 (on the same examples and seeds) for each stage and rho."""
    rows = []
    for stage in workshop.stages():
        for rho in sorted({phase.rho for phase in stage}):
            phases = [phase for phase in stage if phase.rho == rho]
            rows.append(_point(workshop, phases))
    return pd.DataFrame(rows)


def _point(workshop: RhoWorkshop, phases: Sequence[Phase]) -> dict[str, Any]:
    search, first = workshop.search, phases[0]
    scored = [workshop.scores(phase) for phase in phases if workshop.scores(phase)]
    loss = list(scored[0])[-1] if scored else None
    gain = workshop.gain_over([(phase, phase.control) for phase in phases]) if first.rho else None
    errors = [record.error for phase in phases if (record := workshop.record(phase)) is not None and record.error]
    diverged = any(workshop.has_ended(phase) and not workshop.scores(phase) for phase in phases)
    return {
        "stage": "confirmation" if first.stage == len(search.plan.rungs) else f"rung {first.stage + 1}",
        "rho": first.rho,
        "steps": first.end,
        "seeds": len(scored),
        "metric": workshop.metric,
        "value": _mean(scored, workshop.metric),
        "loss": _mean(scored, loss),
        "gain": gain and gain.value,
        "gain_low": gain and gain.low,
        "gain_high": gain and gain.high,
        "error": f"{errors[0]['type']}: {errors[0]['message']}" if errors else "diverged" if diverged else None,
    }


def _mean(scored: Sequence[dict], metric: str | None) -> float | None:
    return float(np.mean([scores[metric].value for scores in scored])) if scored else None


def table(points: pd.DataFrame) -> str:
    """Format the curve as text."""
    columns, rows = cells(points)
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (columns, *rows)]
    return "\n".join(line.rstrip() for line in lines)


def cells(points: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the table of the curve."""
    name = points["metric"].iloc[0]
    metric = metric_of(name)
    rows = []
    for row in points.astype(object).where(points.notna(), None).to_dict("records"):
        value = NOTHING if row["value"] is None else number(row["value"] * metric.scale, metric.digits)
        gain = NOTHING if row["gain"] is None else with_interval(row["gain"], row["gain_low"], row["gain_high"], name)
        gain = f"failed, {row['error']}" if row["error"] else "" if row["rho"] == 0 else gain
        names = [row["stage"], str(row["steps"]), f"{row['rho']:g}", str(row["seeds"])]
        rows.append([*names, value, number(row["loss"]), gain])
    return ["stage", "steps", "rho", "seeds", metric.label, "loss", "gain over rho 0"], rows


def write_rho_report(
    workshop: RhoWorkshop, points: pd.DataFrame, found: dict[str, Any], command: str | None = None
) -> Path:
    """
    Write `report.html` and its files into the folder of the search.

    Args:
        workshop (`RhoWorkshop`): The search.
        points (`pd.DataFrame`): See `curve`.
        found (`dict`): See `summary`.
        command (`str`, *optional*): The command that repeats the search.
    """
    search, plan, passes = workshop.search, workshop.search.plan, found["passes"]
    confidence = found["gain"]["confidence"] if found["gain"] else 0.95
    columns, rows = cells(points)
    caption = f"Metric, gain over rho 0 (bars: {100 * confidence:.3g} % intervals) and loss, one line for each stage of the search."
    steps: list[Block] = [Text("Train with the recommended rho:"), Text(found["command"], "command")]
    if command:
        steps += [Text("This command continues the search, or writes this report again:"), Text(command, "command")]
    facts = {
        "values above 0": ", ".join(f"{rho:g}" for rho in search.rhos),
        **({"probe": f"{plan.probe} steps, which gave the values"} if plan.probe else {}),
        "rungs": "; ".join(f"{rung.rhos} values to step {rung.step}" for rung in plan.rungs),
        "confirmation": f"0 and the best, {plan.seeds} new seeds, to step {plan.horizon}; fewer if the first settle the question",
        "ordinary run": f"{plan.length} steps",
        "schedule": "annealed by the last step" if plan.schedule == plan.horizon else "that of the whole run, paused",
        "gradient passes": f"{passes['spent']:g} spent, {passes['planned']:g} planned, {passes['allowed']:g} allowed",
    }
    runs = [
        [
            f"{run['rho']:g}",
            str(run["seed"]),
            f"{run['begin']} to {run['end']}",
            run["status"] or NOTHING,
            number(run["passes"], 0),
            (run["error"] or {}).get("message", ""),
        ]
        for run in found["runs"]
    ]
    sections = [
        Section(
            "Answer",
            [Text(found["sentence"], "verdict"), figure("search", caption, draw, points, confidence, data=points)],
        ),
        Section("What to do next", steps),
        Section("Every value", [Table(columns, rows, "Values by stage; the confirmation decides", 3, stacked=True)]),
        Section(
            "How the search ran", [Table(["what", "value"], [list(row) for row in facts.items()], "", 99)], folded=True
        ),
        Section("Every run", [Table(["rho", "seed", "steps", "status", "passes", "error"], runs, "", 6)], folded=True),
    ]
    lead = (
        f"{search.recipe}, {len(search.rhos)} values of rho above 0 against rho 0, on validation examples taken from the "
        f"training data. The test split was not read."
    )
    warnings = []
    if not found["learnt"]:
        warnings.append("These runs have not learned anything yet: they cannot show whether SAM helps.")
    if plan.horizon < plan.length and plan.schedule != plan.horizon:
        warnings.append(
            f"The runs were scored only up to step {plan.horizon} of {plan.length}: a rho that helps early may not help at the end."
        )
    return write_document(
        Document("Search for rho", lead, sections, {"curve": points}, found, warnings), search.output_dir
    )


def conclusion(workshop: RhoWorkshop) -> tuple[float, Gain | None, str]:
    """Return the rho to use, the gain in the confirmation if there was one, and a sentence with the reason."""
    stages, plan = workshop.stages(), workshop.search.plan
    far = f"after {plan.horizon} of {plan.schedule} steps"
    if len(stages) <= len(plan.rungs):
        return 0.0, None, "SAM does not help here: every rho above 0 failed or diverged; rho 0 did not."
    pairs = [(phase, phase.control) for phase in stages[-1] if phase.rho]
    rho, gain = pairs[0][0].rho, workshop.gain_over(pairs)
    if any(workshop.score(phase) is None for phase, _ in pairs):
        return 0.0, gain, f"SAM does not help here: rho {rho:g} failed or diverged with another seed."
    if gain is None or (gain.seeds < 2 and not workshop.ended_early):
        return 0.0, gain, "No rho can be recommended: rho 0 failed or diverged with all seeds but one."
    metric = metric_of(workshop.metric)
    points = " points" if metric.scale == 100 else ""
    found = (
        f"{metric.label} is {'better' if gain.value > 0 else 'worse'} than without SAM by "
        f"{signed(abs(gain.value), workshop.metric)[1:]}{points} (gain and its {100 * gain.confidence:.3g} % interval: "
        f"{signed(gain.value, workshop.metric)}, {signed(gain.low, workshop.metric)} to "
        f"{signed(gain.high, workshop.metric)}; {gain.seeds} seed{'s' if gain.seeds > 1 else ''}, {far})"
    )
    if recommended(rho, gain):
        is_largest = len(workshop.search.rhos) > 1 and rho == max(workshop.search.rhos)
        further = (
            f" It is the largest value tried; --low {rho:g} --high {6 * rho:.1g} looks further." if is_largest else ""
        )
        return rho, gain, f"Use rho {rho:g}: {found}.{further}"
    if not workshop.has_learnt(stages[-1]):
        floor = number(workshop.floor(stages[-1]) * metric.scale, metric.digits)
        whole = math.ceil(10 * plan.passes / plan.horizon) / 10
        remedy = (
            f"give --budget {whole:g}, which pays for whole runs of {plan.length} steps"
            if plan.horizon < plan.length
            else "train for more steps, or with a higher learning rate"
        )
        return (
            0.0,
            gain,
            (
                f"Nothing is learned yet {far}: no rho, 0 included, is better than {workshop.floor_in_words} "
                f"({metric.label} {floor}{' %' if metric.scale == 100 else ''}). Such runs cannot show whether SAM helps: "
                f"{remedy}."
            ),
        )
    sentence = f"SAM does not help here, as far as this search can show: at the best rho, {rho:g}, {found}."
    if workshop.ended_early:
        sentence += f" The search ended there, after {gain.seeds} of {plan.seeds} seeds."
    if len(workshop.search.rhos) > 1 and rho == min(workshop.search.rhos):
        sentence += f" It is the smallest value tried; --low {rho / 6:.1g} --high {rho:g} looks at smaller ones."
    return 0.0, gain, sentence


def summary(workshop: RhoWorkshop, points: pd.DataFrame, budget: float, command: str) -> dict[str, Any]:
    """Return the whole result in a form that JSON can store."""
    rho, gain, sentence = conclusion(workshop)
    plan = workshop.search.plan
    records = [(phase, workshop.record(phase)) for phase in workshop.all_runs()]
    return {
        "metric": workshop.metric,
        "recommended_rho": rho,
        "sentence": sentence,
        "command": command,
        "gain": gain and asdict(gain),
        "learnt": workshop.has_learnt(workshop.stages()[-1]),
        "floor": workshop.floor(workshop.stages()[-1]),
        "plan": asdict(plan),
        "passes": {
            "allowed": budget * plan.length,
            "planned": plan.passes,
            "spent": workshop.probe_passes + sum(passes_spent(record) for _, record in records if record is not None),
        },
        "curve": points.to_dict("records"),
        "runs": [
            {
                **asdict(phase),
                "status": record.status if record else None,
                "passes": passes_spent(record) if record else None,
                "metrics": record.metrics if record else None,
                "error": record.error if record else None,
                "folder": str(phase.folder),
            }
            for phase, record in records
        ],
    }


@styled
def draw(points: pd.DataFrame, confidence: float) -> Canvas:
    """Draw metric, gain and loss over rho, one line per stage; bars are intervals of the gain over rho 0."""
    name = points["metric"].iloc[0]
    metric = metric_of(name)
    rhos = sorted(points["rho"].unique())
    shape = (3, 1) if is_narrow() else (1, 3)
    canvas = Canvas(figsize=size(11.5, 2.9 * shape[0] + 0.4), layout="constrained")
    unit = f" ({metric.unit})" if metric.unit else ""
    gain_label = f"gain over rho 0{' (points)' if metric.scale == 100 else ''}, {100 * confidence:.3g} % interval"
    panels = [("value", f"{metric.label}{unit}", metric.scale), ("gain", gain_label, metric.scale), ("loss", "loss", 1)]
    for axes, (column, label, scale) in zip(canvas.subplots(*shape), panels, strict=True):
        for index, (stage, rows) in enumerate(points.groupby("stage", sort=False)):
            seeds = "1 seed" if rows["seeds"].max() == 1 else f"{rows['seeds'].max()} seeds"
            title = f"{stage}, {rows['steps'].max()} steps, {seeds}"
            rows = rows.dropna(subset=[column])
            x, y = [rhos.index(rho) for rho in rows["rho"]], rows[column].to_numpy(float) * scale
            bars = None
            if column == "gain":
                bars = [y - rows["gain_low"].to_numpy(float) * scale, rows["gain_high"].to_numpy(float) * scale - y]
            look = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)], "markersize": 4}
            axes.errorbar(np.array(x) + 0.08 * index, y, bars, label=title, linewidth=1.2, elinewidth=0.8, **look)
        if column == "gain":
            axes.axhline(0, color=INK, linewidth=0.8)
        axes.set_xticks(range(len(rhos)), [f"{rho:g}" for rho in rhos])
        axes.set(xlabel="rho", ylabel=label)
    canvas.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=1 if is_narrow() else 4)
    return canvas
