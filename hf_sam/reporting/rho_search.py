"""What a search for rho found: the points of the curve, their drawing, and the sentence that recommends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure as Canvas

from ..evaluation.metrics import metric_of
from ..rho_search.halving import Gain, recommended
from ..rho_search.phases import Phase, RhoWorkshop, passes_spent
from .formatting import NOTHING, number, signed, with_interval
from .plots import COLOURS, MARKERS, styled


def curve(workshop: RhoWorkshop) -> pd.DataFrame:
    """One row for each stage and rho: metric and loss, and the gain over 0 on the same examples and seeds."""
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
    """The curve as text."""
    name = points["metric"].iloc[0]
    metric = metric_of(name)
    cells = [("stage", "steps", "rho", "seeds", metric.label, "loss", "better than rho 0 by")]
    for row in points.astype(object).where(points.notna(), None).to_dict("records"):
        value = NOTHING if row["value"] is None else number(row["value"] * metric.scale, metric.digits)
        gain = NOTHING if row["gain"] is None else with_interval(row["gain"], row["gain_low"], row["gain_high"], name)
        cells.append(
            (
                row["stage"],
                str(row["steps"]),
                f"{row['rho']:g}",
                str(row["seeds"]),
                value,
                number(row["loss"]),
                f"failed, {row['error']}" if row["error"] else "" if row["rho"] == 0 else gain,
            )
        )
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join(lines)


def conclusion(workshop: RhoWorkshop) -> tuple[float, Gain | None, str]:
    """The rho to use, the gain in the confirmation where there was one, and a sentence that says why."""
    stages, plan = workshop.stages(), workshop.search.plan
    far = f"after {plan.horizon} of {plan.schedule} steps"
    if len(stages) <= len(plan.rungs):
        return 0.0, None, "SAM does not help here: every rho above 0 failed or diverged; rho 0 did not."
    pairs = [(phase, phase.control) for phase in stages[-1] if phase.rho]
    rho, gain = pairs[0][0].rho, workshop.gain_over(pairs)
    if any(workshop.score(phase) is None for phase, _ in pairs):
        return 0.0, gain, f"SAM does not help here: rho {rho:g} failed or diverged with another seed."
    if gain is None or gain.seeds < 2:
        return 0.0, gain, "No rho can be recommended: rho 0 failed or diverged with all seeds but one."
    metric = metric_of(workshop.metric)
    points = " points" if metric.scale == 100 else ""
    size = (
        f"{metric.label} is better than without SAM by {signed(gain.value, workshop.metric)}{points}, "
        f"{100 * gain.confidence:.3g} % interval {signed(gain.low, workshop.metric)} to "
        f"{signed(gain.high, workshop.metric)} ({gain.seeds} seeds, {far})"
    )
    if recommended(rho, gain):
        return rho, gain, f"Use rho {rho:g}: {size}."
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
                f"Nothing is learnt yet {far}: no rho, 0 included, is better than always giving the same answer "
                f"({metric.label} {floor}{' %' if metric.scale == 100 else ''}). Whether SAM helps cannot be seen from such "
                f"runs: {remedy}."
            ),
        )
    return 0.0, gain, f"SAM does not help here, as far as this search can tell: at rho {rho:g}, the best, {size}."


def summary(workshop: RhoWorkshop, points: pd.DataFrame, budget: float, command: str) -> dict[str, Any]:
    """All of it as JSON."""
    rho, gain, sentence = conclusion(workshop)
    plan = workshop.search.plan
    records = [(phase, workshop.record(phase)) for phase in workshop.all_runs()]
    return {
        "recommended_rho": rho,
        "sentence": sentence,
        "command": command,
        "gain": gain and asdict(gain),
        "learnt": workshop.has_learnt(workshop.stages()[-1]),
        "floor": workshop.floor(workshop.stages()[-1]),  # what always giving the same answer scores
        "plan": asdict(plan),
        "passes": {
            "allowed": budget * plan.length,
            "planned": plan.passes,
            "spent": sum(passes_spent(record) for _, record in records if record is not None),
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
    """Metric, gain and loss over rho, one line for each stage; bars are intervals of the gain over rho 0."""
    name = points["metric"].iloc[0]
    metric = metric_of(name)
    rhos = sorted(points["rho"].unique())
    canvas = Canvas(figsize=(10.5, 3.3), layout="constrained")
    unit = f" ({metric.unit})" if metric.unit else ""
    gain_label = f"gain over rho 0{' (points)' if metric.scale == 100 else ''}, {100 * confidence:.3g} % interval"
    panels = [("value", f"{metric.label}{unit}", metric.scale), ("gain", gain_label, metric.scale), ("loss", "loss", 1)]
    for axes, (column, label, scale) in zip(canvas.subplots(1, 3), panels, strict=True):
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
            axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xticks(range(len(rhos)), [f"{rho:g}" for rho in rhos])
        axes.set(xlabel="rho", ylabel=label)
    canvas.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return canvas
