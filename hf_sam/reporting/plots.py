"""Figures of a report, each with a table of the numbers it shows. No display is needed."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from contextvars import ContextVar
from itertools import zip_longest

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from ..evaluation.metrics import metric_of
from ..experiments.plan import BUDGETS
from ..experiments.records import spread_out
from .document import Figure
from .results import Cell, Comparison, noise_level, value_of

# Okabe and Ito's palette, which colour-blind readers can distinguish; the control is black.
# On a dark page, `document.DARK` replaces the dark colours, by these values.
COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5C00", "#888888", "#B22222")
MARKERS = "osD^vP*X<"
INK, BAND, PAPER = "#1c1e21", "#b0b8c0", "#fefefe"
STYLE = {
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), INK
    ),
    "text.parse_math": False,  # names may contain dollar signs
    "svg.fonttype": "path",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}
MAX_PANELS = 12
MAX_DRAWN_POINTS = 200  # of one arm in one panel: more are indistinguishable and make the page slow
MAX_LABEL = 40  # characters of a name that fit into a drawing
LEGEND_MARK, LEGEND_LETTER = 0.6, 0.065  # inches of a legend's entry beside its name, and of a letter of the name
PHONE_WIDTH = 3.8  # inches, about 365 CSS pixels

Drawing = tuple[Canvas, pd.DataFrame]
_narrow: ContextVar[bool] = ContextVar("narrow", default=False)  # whether to draw for a phone


def styled(draw: Callable) -> Callable:
    """Run a drawing function with the report's style."""

    @functools.wraps(draw)
    def wrapper(*args, **kwargs):
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return wrapper


def figure(name: str, caption: str, draw: Callable, *args, data: pd.DataFrame | None = None) -> Figure:
    """
    Draw a figure with `draw(*args)`, once for a wide page and once for a phone.

    Args:
        name, caption (`str`): Name and caption of the figure.
        draw (`Callable`): A drawing function; returns a canvas, or a canvas and its numbers.
        data (`pd.DataFrame`, *optional*): The numbers, if `draw` does not return them.
    """
    canvases = []
    for narrow in (False, True):
        token = _narrow.set(narrow)
        try:
            drawn = draw(*args)
        finally:
            _narrow.reset(token)
        canvas, data = drawn if isinstance(drawn, tuple) else (drawn, data)
        canvases.append(canvas)
    return Figure(name, canvases[0], caption, data, canvases[1])


def is_narrow() -> bool:
    """Whether the current drawing is for a phone."""
    return _narrow.get()


def size(width: float, height: float) -> tuple[float, float]:
    """Size of a drawing in inches, at most as wide as a phone if it is for one."""
    return (min(width, PHONE_WIDTH), height) if _narrow.get() else (width, height)


@styled
def draw_differences(comparisons: Sequence[Comparison]) -> Canvas:
    """Draw each arm minus the control with Student's 95 % (thin) and 90 % (thick) intervals; the band is the margin."""
    first, metric = comparisons[0], metric_of(comparisons[0].metric)
    canvas = Canvas(figsize=(PHONE_WIDTH, 0.9 + 0.4 * len(comparisons)), layout="constrained")
    axes = canvas.subplots()
    arms = list(dict.fromkeys(entry.arm for entry in comparisons))
    budgets = {entry.cell.budget for entry in comparisons}
    for row, entry in enumerate(comparisons):
        paired, look = entry.paired, _look(arms.index(entry.arm) + 1)
        for low, high, width in ((paired.t_low, paired.t_high, 1.2), (*paired.equivalence_interval, 3.5)):
            if low is not None:
                axes.plot(np.array([low, high]) * metric.scale, [row, row], color=look["color"], linewidth=width)
        axes.plot(paired.difference.value * metric.scale, row, **look | {"markersize": 5}, linestyle="none")
        names = [
            entry.cell.title,
            *([BUDGETS.get(entry.cell.budget, entry.cell.budget)] if len(budgets) > 1 else []),
            *([entry.arm] if len(arms) > 1 else []),
        ]
        _name_above(axes, row, ", ".join(names))
    axes.axvline(0, color=INK, linewidth=0.8)
    if first.margin is not None:
        axes.axvspan(-first.margin * metric.scale, first.margin * metric.scale, color=BAND, alpha=0.35, linewidth=0)
    _no_left_side(axes, len(comparisons))
    better = "right" if metric.higher_is_better else "left"
    unit = " (points)" if metric.scale == 100 else ""
    who = _short(arms[0], 16) if len(arms) == 1 else "arm"
    axes.set_xlabel(f"{_short(metric.label)}: {who} minus {_short(first.control, 16)}{unit}\nbetter is to the {better}")
    return canvas


@styled
def draw_gains(rows: pd.DataFrame, label: str, name: str = "checkpoint", scale: float = 100) -> Canvas:
    """Draw `value` with its interval from `low` to `high`, if there is one, one line per row, below its name."""
    canvas = Canvas(figsize=(PHONE_WIDTH, 0.9 + 0.4 * len(rows)), layout="constrained")
    axes = canvas.subplots()
    for place, row in enumerate(rows.to_dict("records")):
        look = _look(place + 1)
        if pd.notna(row["low"]):
            axes.plot([scale * row["low"], scale * row["high"]], [place, place], color=look["color"], linewidth=1.5)
        axes.plot(scale * row["value"], place, **look | {"markersize": 5}, linestyle="none")
        _name_above(axes, place, row[name])
    _no_left_side(axes, len(rows))
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_xlabel(label)
    return canvas


def _name_above(axes: Axes, row: int, name: str) -> None:
    """Write the name of a forest plot's row above it; beside it, it would take half the width of a phone."""
    text = axes.text(0.0, row - 0.33, _short(name, 52), transform=axes.get_yaxis_transform(), va="center")
    text.set_path_effects([withStroke(linewidth=2.5, foreground=PAPER)])


def _no_left_side(axes: Axes, rows: int) -> None:
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_ylim(rows - 0.5, -0.8)


def curve_points(cells: Sequence[Cell], arms: Sequence[str], key: str) -> pd.DataFrame:
    """
    Collect the log entries with `key` of all runs, one row per cell, arm and step.

    Each row has the passes so far (a mean, as they may differ slightly between seeds), and mean, range and number of
    the values.
    """
    rows = []
    for cell in cells:
        for arm in arms:
            values: dict[float, list[float]] = defaultdict(list)
            passes: dict[float, list[float]] = defaultdict(list)
            for run in cell.runs.get(arm, []):
                passes_per_step = run.passes / run.steps if run.passes and run.steps else None
                for entry in run.curves:
                    value, step = entry.get(key), entry.get("step")
                    if isinstance(value, (int, float)) and isinstance(step, (int, float)):
                        values[step].append(value)
                        if "sam_passes" in entry:
                            passes[step].append(entry["sam_passes"])
                        elif passes_per_step is not None:
                            passes[step].append(step * passes_per_step)
            for step in sorted(values):
                own, spent = values[step], passes[step]
                mean_passes = sum(spent) / len(spent) if spent else math.nan
                mean = min(max(sum(own) / len(own), min(own)), max(own))  # the mean of equal values may be rounded
                names = cell.task, cell.condition, cell.budget, arm
                rows.append((*names, step, mean_passes, mean, min(own), max(own), len(own)))
    names = ["task", "condition", "budget", "arm", "step", "passes", "mean", "low", "high", "runs"]
    return pd.DataFrame(rows, columns=names)


@styled
def draw_curves(cells: Sequence[Cell], arms: Sequence[str], points: pd.DataFrame, x: str, label: str) -> Drawing:
    """Draw the mean over seeds against `x` (`"step"` or `"passes"`), their range shaded, one panel per cell."""
    canvas, panels = _panels(cells)
    groups = dict(iter(points.groupby(["task", "condition", "budget", "arm"], sort=False)))
    for axes, cell in zip(panels, cells, strict=False):
        for index, arm in enumerate(arms):
            own = groups.get((cell.task, cell.condition, cell.budget, arm))
            if own is None:
                continue
            own, colour = own.iloc[spread_out(len(own), MAX_DRAWN_POINTS)], _look(index)["color"]
            axes.plot(own[x], own["mean"], color=colour, linewidth=1.3)
            axes.fill_between(own[x], own["low"], own["high"], color=colour, alpha=0.12, linewidth=0)
        axes.set_xlabel("optimizer steps" if x == "step" else "gradient evaluations")
        axes.set_ylabel(label)
    chosen = [(cell.task, cell.condition, cell.budget) for cell in cells]
    keys = pd.MultiIndex.from_frame(points[["task", "condition", "budget"]])
    numbers = points[keys.isin(chosen)].reset_index(drop=True)
    _legend(canvas, arms, set(numbers.arm), markers=False)
    return canvas, numbers.drop(columns="passes") if x == "step" else numbers


@styled
def draw_noise(cells: Sequence[Cell], arms: Sequence[str], metric_name: str) -> Drawing:
    """Draw a metric against the share of wrong training labels, one panel per task and budget; bars span the seeds."""
    metric = metric_of(metric_name)
    groups = list(dict.fromkeys((cell.task, cell.budget) for cell in cells))
    canvas, panels = _panels(groups, lambda group: f"{group[0]}, {BUDGETS.get(group[1], group[1])}")
    rows = []
    for axes, (task, budget) in zip_longest(panels, groups):
        for index, arm in enumerate(arms):
            points = []
            for cell in cells:
                values = cell.values(arm, metric_name) if (cell.task, cell.budget) == (task, budget) else []
                if values:
                    low, high = min(values), max(values)
                    mean = np.clip(np.mean(values), low, high)  # the mean of equal values may have a rounding error
                    points.append((noise_level(cell.condition), mean, low, high, len(values)))
            if not points:
                continue
            points.sort()
            rows += [(task, budget, arm, *point) for point in points]
            if axes is None:
                continue
            level, mean, low, high, _ = np.array(points).T
            mean, low, high = mean * metric.scale, low * metric.scale, high * metric.scale
            axes.errorbar(level * 100, mean, [mean - low, high - mean], **_look(index), linewidth=1.2, elinewidth=0.8)
    for axes in panels:
        axes.set_xlabel("wrong training labels (%)")
        axes.set_ylabel(_with_unit(metric_name))
    _legend(canvas, arms, {row[2] for row in rows})
    return canvas, pd.DataFrame(rows, columns=["task", "budget", "arm", "noise", "mean", "low", "high", "runs"])


@styled
def draw_reliability(tables: dict[str, dict[str, pd.DataFrame]], arms: Sequence[str]) -> Drawing:
    """
    Draw accuracy against confidence; on the diagonal, confidence is perfectly calibrated.

    Args:
        tables (`dict[str, dict[str, pd.DataFrame]]`): By panel title and arm, a table of `reliability`.
        arms (`Sequence[str]`): The arms, which fix the colours.
    """
    canvas, panels = _panels(list(tables), str, height=2.7)
    frames = []
    for axes, (title, by_arm) in zip(panels, tables.items(), strict=False):
        axes.plot([0, 1], [0, 1], color="gray", linewidth=0.8, linestyle="--")
        for arm, table in by_arm.items():
            axes.plot(table.confidence, table.accuracy, **_look(arms.index(arm)), linewidth=1.1)
            frames.append(table.assign(panel=title, arm=arm))
        axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xlabel="confidence", ylabel="accuracy")
    _legend(canvas, arms, {arm for by_arm in tables.values() for arm in by_arm})
    return canvas, pd.concat(frames, ignore_index=True)


@styled
def draw_scatter(cells: Sequence[Cell], arms: Sequence[str], x: str, y: str, x_label: str) -> Drawing:
    """Draw metric `y` against `x`, any value of a run; one point per run, or an even selection of many."""
    metric = metric_of(y)
    canvas, panels = _panels(cells)
    rows = []
    for axes, cell in zip_longest(panels, cells):
        for index, arm in enumerate(arms):
            pairs = [(value_of(run, x), value_of(run, y), run.seed) for run in cell.runs.get(arm, [])]
            pairs = [pair for pair in pairs if pair[0] is not None and pair[1] is not None]
            rows += [(cell.task, cell.condition, cell.budget, arm, seed, a, b) for a, b, seed in pairs]
            pairs = [pairs[place] for place in spread_out(len(pairs), MAX_DRAWN_POINTS)]
            if pairs and axes is not None:
                axes.plot(
                    [pair[0] for pair in pairs],
                    [pair[1] * metric.scale for pair in pairs],
                    **_look(index),
                    linestyle="none",
                    alpha=0.75,
                )
    for axes in panels:
        axes.set_xlabel(x_label)
        axes.set_ylabel(_with_unit(y))
    _legend(canvas, arms, {row[3] for row in rows})
    return canvas, pd.DataFrame(rows, columns=["task", "condition", "budget", "arm", "seed", x, y])


@styled
def draw_survival(frame: pd.DataFrame, names: Sequence[str], metric_name: str) -> Drawing:
    """
    Draw a metric over the levels of each treatment, one panel per kind; the leftmost point is the model as trained.

    Args:
        frame (`pd.DataFrame`): `name`, `kind`, `level`, `value` and the ends of its band, `low` and `high`.
        names (`Sequence[str]`): Checkpoints or arms, which fix the colours.
        metric_name (`str`): The metric of `value`.
    """
    scale = metric_of(metric_name).scale
    levels = frame.groupby("kind", sort=False)["level"].nunique()
    kinds = [kind for kind in levels.index if levels[kind] > 1]
    canvas, panels = _panels(kinds, str)
    for axes, kind in zip(panels, kinds, strict=False):
        ticks = list(dict.fromkeys(frame[frame.kind == kind].level))
        for index, name in enumerate(names):
            own = frame[frame.name == name]
            points = pd.concat([own[own.kind == "none"], own[own.kind == kind]])
            x = [1 + ticks.index(level) if level in ticks else 0 for level in points.level]
            axes.plot(x, scale * points.value.astype(float), **_look(index), linewidth=1.2)
            ends = [scale * points[end].astype(float) for end in ("low", "high")]
            axes.fill_between(x, *ends, color=_look(index)["color"], alpha=0.12, linewidth=0)
        axes.set_xticks(range(len(ticks) + 1), ["as\ntrained", *(f"{level:g}" for level in ticks)])
        axes.set_ylabel(_with_unit(metric_name))
    _legend(canvas, names, set(frame.name))
    return canvas, frame[frame.kind.isin(["none", *kinds])].reset_index(drop=True)


@styled
def draw_frontier(frame: pd.DataFrame, names: Sequence[str], target: float | None) -> Drawing:
    """
    Draw first-task test loss against second-task training loss, one line per start, by increasing learning rate.

    Args:
        frame (`pd.DataFrame`): `start`, `learning_rate`, `second_train_loss`, `first_loss` and its range, `low` and `high`.
        names (`Sequence[str]`): The starts, which fix the colours.
        target (`float`, *optional*): The training loss at which starts are compared.
    """
    canvas = Canvas(figsize=size(5.5, 3.6), layout="constrained")
    axes = canvas.subplots()
    for index, name in enumerate(names):
        own = frame[frame.start == name]
        axes.plot(own.second_train_loss, own.first_loss, **_look(index), linewidth=1.2)
        bars = [own.first_loss - own.low, own.high - own.first_loss]
        axes.errorbar(
            own.second_train_loss,
            own.first_loss,
            np.maximum(bars, 0),
            color=_look(index)["color"],
            linewidth=0.8,
            linestyle="none",
        )
    if target is not None:
        axes.axvline(target, color="gray", linewidth=0.8, linestyle=":")
    axes.set_xlabel("training loss on the second task")
    axes.set_ylabel("test loss on the first task")
    _legend(canvas, names)
    return canvas, frame


def _panels(items: Sequence, title: Callable | None = None, height: float = 2.3) -> tuple[Canvas, list[Axes]]:
    """Create a canvas with one titled panel per item, four in a row (one on a phone), at most `MAX_PANELS`."""
    count = min(len(items), MAX_PANELS)
    columns = 1 if _narrow.get() else min(count, 4)
    rows = -(-count // columns)
    width = 5.0 if columns == 1 else 2.9 * columns
    canvas = Canvas(figsize=size(width, 0.5 + height * (1.3 if count == 1 else 1.0) * rows), layout="constrained")
    panels = list(canvas.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[count:]:
        axes.remove()
    title = title or (lambda cell: f"{cell.title}\n{BUDGETS.get(cell.budget, cell.budget)}")
    for axes, item in zip(panels, items, strict=False):
        axes.set_title("\n".join(map(_short, title(item).split("\n"))), fontsize=9)
        axes.locator_params(nbins=5)
    return canvas, panels[:count]


def _look(index: int) -> dict:
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)], "markersize": 4}


def _legend(canvas: Canvas, arms: Sequence[str], drawn: Collection[str] | None = None, markers: bool = True) -> None:
    """Add a legend of `arms`; those not in `drawn`, such as arms whose runs all failed, are left out."""
    looks = [_look(index) for index, arm in enumerate(arms) if drawn is None or arm in drawn]
    arms = [arm for arm in arms if drawn is None or arm in drawn]
    if not arms:
        return
    handles = [Line2D([], [], **look) if markers else Line2D([], [], color=look["color"]) for look in looks]
    longest = max(len(_short(arm)) for arm in arms)
    columns = int(canvas.get_figwidth() / (LEGEND_MARK + LEGEND_LETTER * longest)) or 1
    legend = canvas.legend(handles, ["."] * len(arms), loc="outside lower center", ncols=min(len(arms), columns))
    for text, arm in zip(legend.get_texts(), arms, strict=True):
        text.set_text(_short(arm))  # set afterwards: a label that starts with an underscore would be left out


def _short(name: str, most: int = MAX_LABEL) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _with_unit(metric_name: str) -> str:
    metric = metric_of(metric_name)
    return f"{metric.label} ({metric.unit})" if metric.unit else _short(metric.label)
