"""Report the benchmark's measurements: rows, a table and figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import EngFormatter

from ..benchmark.measure import Measurement
from ..benchmark.variants import STOCK, Variant
from ..config import SAMConfig
from ..evaluation.metrics import metric_of
from ..experiments.records import RunRecord
from .document import Block, Document, Listing, Section, Table, Text, write_document
from .plots import COLOURS, INK, MARKERS, figure, is_narrow, size, styled
from .results import compare_arms, guess_question, make_cells, uses_sam

SETTING = ["parameters", "batch_size", "accumulation", "processes"]  # what a sweep can vary
# Fields that change the values in a step but not its duration.
WITHOUT_COST = {"rho", "rho_min", "rho_schedule", "eta", "alpha", "sigma", "ema_decay"}
MEBI = 2**20
SWEEP = "Time relative to the stock Trainer against each setting that varies, the others held fixed."


def row_of(measurement: Measurement, examples: int, seed: int = 0) -> dict[str, Any]:
    """
    Convert a measurement to a flat row; a variant that cannot run has no values, only the reason in `impossible`.

    Args:
        measurement (`Measurement`): One variant.
        examples (`int`): Examples in a whole step, over all processes.
        seed (`int`, *optional*, defaults to 0): Seed of the bootstrap.
    """
    variant, counted = measurement.variant, measurement.counted
    row: dict[str, Any] = {
        "variant": variant.name,
        "expected_passes": variant.expected_passes,
        "share_perturbed": variant.share_perturbed,
        "impossible": measurement.reason,
    }
    if counted is None:
        return row
    low, high = measurement.ratio_interval(np.random.default_rng(seed))
    return row | {
        "step_seconds": measurement.step_seconds(),
        "step_seconds_q1": measurement.step_seconds(0.25),
        "step_seconds_q3": measurement.step_seconds(0.75),
        "ratio": measurement.ratio(),
        "ratio_low": low,
        "ratio_high": high,
        "samples_per_second": examples / measurement.step_seconds(),
        "peak_memory": counted.peak_memory,
        "passes": counted.passes,
        "forward": counted.forward,
        "backward": counted.backward,
        "bytes": counted.bytes,
        "timed_steps": len(measurement.seconds),
        "timed_perturbed_steps": sum(measurement.perturbed),
    }


def readable(rows: pd.DataFrame) -> pd.DataFrame:
    """Format the rows of one setting as text."""
    lines = []
    for row in rows.to_dict("records"):
        line = {"variant": row["variant"]}
        if isinstance(row["impossible"], str):
            lines.append(line | {"step (ms), quartiles": f"impossible: {row['impossible']}"})
            continue
        is_stock = row["variant"] == STOCK.name
        milliseconds = [1e3 * row[key] for key in ("step_seconds", "step_seconds_q1", "step_seconds_q3")]
        lines.append(
            line
            | {
                "step (ms), quartiles": "{:.4g} [{:.4g}, {:.4g}]".format(*milliseconds),
                "ratio, 95 %": "1"
                if is_stock
                else f"{row['ratio']:.2f} [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]",
                "samples / s": f"{row['samples_per_second']:.4g}",
                "peak (MiB)": "" if pd.isna(row["peak_memory"]) else f"{row['peak_memory'] / MEBI:.1f}",
                "passes counted": f"{row['passes']:.3f}",
                "passes expected": f"{row['expected_passes']:.3f}",
                "forward": f"{row['forward']:.2f}",
                "backward": f"{row['backward']:.2f}",
                **({"sent (MiB)": f"{row['bytes'] / MEBI:.2f}"} if row["processes"] > 1 else {}),
            }
        )
    return pd.DataFrame(lines).fillna("")


@styled
def draw_ratios(rows: pd.DataFrame) -> Canvas:
    """Draw step times relative to the stock Trainer with intervals, and the methods' passes, for one setting."""
    rows = rows[rows.ratio.notna()]
    canvas = Canvas(figsize=size(6.5, 1.6 + 0.26 * len(rows)), layout="constrained")
    axes = canvas.subplots()
    places = range(len(rows))
    spread = np.maximum([rows.ratio - rows.ratio_low, rows.ratio_high - rows.ratio], 0)
    axes.errorbar(rows.ratio, places, xerr=spread, fmt="o", color=COLOURS[2], markersize=4, label="measured time, 95 %")
    axes.plot(rows.expected_passes, places, "|", color=COLOURS[1], markersize=11, label="passes of the method")
    axes.axvline(1, color=INK, linewidth=0.8)
    axes.set_yticks(places, rows.variant)
    axes.invert_yaxis()
    axes.set_xlabel("step time relative to the stock Trainer")
    canvas.legend(loc="outside lower center", ncols=2)
    return canvas


@styled
def draw_sweep(rows: pd.DataFrame) -> Canvas | None:
    """Draw the ratio against each setting that varies, the others held fixed; return `None` if nothing varies."""
    rows = rows[rows.ratio.notna() & (rows.variant != STOCK.name)]
    varied = [name for name in SETTING if rows[name].nunique() > 1]
    if not varied:
        return None
    shape = (len(varied), 1) if is_narrow() else (1, len(varied))
    canvas = Canvas(figsize=size(1.5 + 3.6 * shape[1], 0.6 + 3.0 * shape[0]), layout="constrained")
    panels = canvas.subplots(*shape, squeeze=False).flat
    for axes, name in zip(panels, varied, strict=True):
        for index, (variant, lines) in enumerate(rows.groupby("variant", sort=False)):
            look = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)], "markersize": 4}
            others = [other for other in varied if other != name]
            for number, (_, line) in enumerate(lines.groupby(others, sort=False) if others else [(None, lines)]):
                line = line.sort_values(name)
                label = {} if number or name != varied[0] else {"label": variant}
                axes.plot(line[name], line.ratio, linewidth=1, **look, **label)
        axes.set_xscale("log")
        values = sorted(rows[name].unique())  # the settings themselves, instead of powers of ten
        axes.set_xticks(values, [EngFormatter(sep="")(value) for value in values])
        axes.minorticks_off()
        axes.set(xlabel=name.replace("_", " "), ylabel="step time relative to the stock Trainer")
    canvas.legend(loc="outside lower center", ncols=2 if is_narrow() else 5)
    return canvas


# --- the report ------------------------------------------------------------------------------------------------------


def write_benchmark_report(
    document: dict[str, Any], rows: pd.DataFrame, folder: Path, note: str, gained: pd.DataFrame | None = None
) -> Path:
    """
    Write `report.html` and its files.

    Args:
        document (`dict`): The content of `benchmark.json`.
        rows (`pd.DataFrame`): See `row_of`, with the columns of `SETTING`.
        folder (`Path`): The output folder.
        note (`str`): How the times were measured.
        gained (`pd.DataFrame`, *optional*): See `gains`.
    """
    groups = [group for _, group in rows.groupby(SETTING, sort=False)]
    titles = [_title(group, document["settings"][number]["model"]) for number, group in enumerate(groups)]
    answer: list[Block] = [Text(cost_sentence(groups[0], titles[0]), "verdict")]
    details: list[Block] = []
    for number, (group, title) in enumerate(zip(groups, titles, strict=True)):
        text, caption = (
            readable(group[group.impossible.isna()]),
            f"Step time relative to the stock Trainer: {title}.",
        )
        table = Table(list(text.columns), text.to_numpy().tolist(), title, 1, stacked=True)
        drawing = figure(f"ratios-{number}", caption, draw_ratios, group, data=group)
        (details if number else answer).extend([drawing, table])
    sweep = [] if draw_sweep(rows) is None else [figure("sweep", SWEEP, draw_sweep, rows, data=rows)]
    frontier_blocks: list[Block] = []
    if gained is not None and not gained.empty:
        caption = "Gain of every arm over the control against its step time; the line joins the arms that no other arm dominates."
        frontier_blocks.append(figure("gains", caption, draw_frontier, gained, data=gained))
    impossible = dict(rows[rows.impossible.notna()][["variant", "impossible"]].itertuples(index=False))
    if impossible:
        answer.append(Listing([f"Not timed: {name}. {reason}" for name, reason in impossible.items()]))
    sections = [
        Section("Answer", answer),
        Section("What a gain costs", frontier_blocks),
        Section("How it scales", sweep),
        Section("Other settings", details),
        Section("Run it again", [Text(document["command"], "command")]),
        Section("How the times were measured", [Text(note)], folded=True),
    ]
    more = f" and {len(titles) - 1} other settings" if len(titles) > 1 else ""
    lead = f"Step times of every method and of the stock Trainer, interleaved in one process: {titles[0]}{more}."
    return write_document(Document("What a step costs", lead, sections, {"benchmark": rows}, document), folder)


def cost_sentence(rows: pd.DataFrame, title: str) -> str:
    """Return a sentence with the cost of SAM, or of the first method, and the range over all methods."""
    timed = rows[rows.ratio.notna() & (rows.variant != STOCK.name)]
    if timed.empty:
        return f"No method could be timed against the stock Trainer ({title})."
    chosen = timed[timed.variant == "sam"] if (timed.variant == "sam").any() else timed.iloc[:1]
    row = chosen.iloc[0]
    sentence = (
        f"A step of {row.variant} takes {row.ratio:.2f} times as long as one of the stock Trainer [{row.ratio_low:.2f}, "
        f"{row.ratio_high:.2f}], for {row.expected_passes:.3g} gradient passes"
    )
    if len(timed) == 1:
        return f"{sentence}."
    cheap, costly = timed.loc[timed.ratio.idxmin()], timed.loc[timed.ratio.idxmax()]
    return f"{sentence}; the methods range from {cheap.ratio:.2f} ({cheap.variant}) to {costly.ratio:.2f} ({costly.variant})."


def _title(rows: pd.DataFrame, model: str) -> str:
    row = rows.iloc[0]
    title = f"{model}, {row.parameters / 1e6:.3g} M parameters, batch {row.batch_size}, accumulation {row.accumulation}"
    return title + (f", {row.processes} processes" if row.processes > 1 else "")


# --- what a gain costs -----------------------------------------------------------------------------------------------


def gains(
    records: Sequence[RunRecord], rows: pd.DataFrame, variants: Sequence[Variant], control: str | None = None
) -> pd.DataFrame:
    """
    Combine the gain of every arm of a comparison over its control with the step time measured here.

    Args:
        records (`Sequence[RunRecord]`): The records of a comparison.
        rows (`pd.DataFrame`): The rows of one setting.
        variants (`Sequence[Variant]`): The variants of these rows.
        control (`str`, *optional*): The arm to compare with; if omitted, AdamW or the first arm without SAM.

    Returns:
        `pd.DataFrame`: One row for each task, condition, budget and arm whose configuration was timed. `gain` is in
        the metric's own unit (points for an accuracy); higher is better.

    Raises:
        ValueError: If `control` is not an arm of the records.
    """
    question = guess_question(records, control, None, None)
    ratios = dict(zip(rows.variant, rows.ratio, strict=True))
    timed = [entry for entry in variants if entry.sam and entry.sam.rho > 0 and entry.loop is None]
    costs = {_costly_part(entry.sam): ratios[entry.name] for entry in timed}
    costs_of_arms = {
        run.arm: costs.get(_costly_part(SAMConfig.from_dict(run.config["sam"]))) if uses_sam(run) else 1.0
        for run in records
    }
    metric = metric_of(question.metric)
    sign = metric.scale if metric.higher_is_better else -metric.scale
    found = []
    for entry in compare_arms(
        make_cells(records), question.control, question.metric, list(costs_of_arms), np.random.default_rng(0)
    ):
        cost = costs_of_arms[entry.arm]
        if cost is None or np.isnan(cost):
            continue
        values = [entry.paired.difference.value, entry.paired.t_low, entry.paired.t_high]
        mean, *ends = [np.nan if value is None else sign * value for value in values]
        cell = {"task": entry.cell.task, "condition": entry.cell.condition, "budget": entry.cell.budget}
        found.append(
            cell
            | {"arm": entry.arm, "metric": question.metric, "control": question.control, "ratio": cost, "gain": mean}
            | {"gain_low": min(ends), "gain_high": max(ends), "seeds": len(entry.paired.seeds)}
        )
    return pd.DataFrame(found)


@styled
def draw_frontier(frame: pd.DataFrame) -> Canvas:
    """Draw gain against cost, one panel per task, condition and budget; the line joins the arms that none dominates."""
    cells = list(frame.groupby(["task", "condition", "budget"], sort=False))
    arms = list(dict.fromkeys(frame.arm))
    columns = 1 if is_narrow() else min(len(cells), 3)
    lines = -(-len(cells) // columns)
    canvas = Canvas(figsize=size(1.5 + 3.4 * columns, 0.8 + 3.0 * lines), layout="constrained")
    panels = canvas.subplots(lines, columns, squeeze=False).flat
    for (names, cell), axes in zip(cells, panels, strict=False):  # in this order no panel is lost
        for point in cell.itertuples():
            index = arms.index(point.arm)
            axes.errorbar(
                point.ratio,
                point.gain,
                yerr=None
                if np.isnan(point.gain_low)
                else [[point.gain - point.gain_low], [point.gain_high - point.gain]],
                color=COLOURS[index % len(COLOURS)],
                marker=MARKERS[index % len(MARKERS)],
                markersize=5,
            )
        best = frontier([(1.0, 0.0), *zip(cell.ratio, cell.gain, strict=True)])
        axes.plot(*zip(*best, strict=True), color="gray", linewidth=0.8, linestyle="--")
        axes.axhline(0, color=INK, linewidth=0.8)
        metric, control = metric_of(cell.metric.iloc[0]), cell.control.iloc[0]
        axes.set_title(", ".join(names), fontsize=9)
        axes.set(xlabel="step time relative to the stock Trainer", ylabel=f"gain in {metric.label} over {control}")
    for axes in list(panels):
        axes.remove()
    handles = [
        canvas.axes[0].plot(
            [], [], color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)], linestyle="none"
        )[0]
        for i in range(len(arms))
    ]
    canvas.legend(handles, arms, loc="outside lower center", ncols=2 if is_narrow() else 4)
    return canvas


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the (cost, gain) points that no other point dominates, ordered by cost."""
    best: list[tuple[float, float]] = []
    for cost, gain in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or gain > best[-1][1]:
            best.append((cost, gain))
    return best


def _costly_part(config: SAMConfig) -> tuple:
    return tuple((name, str(value)) for name, value in config.to_dict().items() if name not in WITHOUT_COST)
