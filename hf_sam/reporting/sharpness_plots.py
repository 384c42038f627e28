"""Figures of sharpness, each with a table of the numbers it shows. No display is needed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from ..sharpness.estimators import SpectralDensity
from .plots import COLOURS, INK, MARKERS, Drawing, is_narrow, size, styled

GRID_POINTS = 1000
WIDTH = 0.008  # of the Gaussian bumps of a spectrum, as a share of its extent
FLOOR = 0.2  # of a spectrum's logarithmic axis, in peaks of a single eigenvalue
MAX_COLUMNS = 3

Measures = Mapping[str, Mapping[str, Any]]  # from checkpoint to the result of one measure


@styled
def draw_rho(found: Measures) -> Drawing:
    """Draw SAM's own sharpness against the size of the perturbation."""
    rows = [
        (name, rho, value)
        for name, result in found.items()
        for rho, value in zip(result["rho"], result["sharpness"], strict=True)
    ]
    data = pd.DataFrame(rows, columns=["checkpoint", "rho", "sharpness"])
    canvas = Canvas(figsize=size(5, 3.2), layout="constrained")
    axes = canvas.subplots()
    for index, (name, part) in enumerate(data.groupby("checkpoint", sort=False)):
        axes.plot(part.rho, part.sharpness, label=name, **_look(index))
    axes.set_xscale("log")
    if (data.sharpness > 0).all():
        axes.set_yscale("log")
    axes.set_xlabel("rho")
    axes.set_ylabel("L(w + eps) - L(w)")
    axes.legend()
    return canvas, data


@styled
def draw_spectra(found: Measures, eigenvalues: Mapping[str, Sequence[float]]) -> Drawing:
    """
    Draw the spectral density of the Hessian, one panel per checkpoint, all on the same axes; ticks are top eigenvalues.

    Args:
        found (`Mapping`): Per checkpoint, the result of the measure `"density"`.
        eigenvalues (`Mapping[str, Sequence[float]]`): Per checkpoint, eigenvalues to mark; checkpoints may be missing.
    """
    densities = {n: SpectralDensity(np.array(r["nodes"]), np.array(r["weights"])) for n, r in found.items()}
    ends = [float(end) for d in densities.values() for end in (d.nodes.min(), d.nodes.max())]
    ends += [value for values in eigenvalues.values() for value in values]
    low, high = min(ends), max(ends)
    width = WIDTH * (high - low) or WIDTH
    grid = np.linspace(low - 5 * width, high + 5 * width, GRID_POINTS)
    curves = {name: density.on_grid(grid, width) for name, density in densities.items()}
    peak = max(curve.max() for curve in curves.values())
    floor = FLOOR / (max(result["parameters"] for result in found.values()) * width * math.sqrt(2 * math.pi))
    canvas = Canvas(figsize=size(6.5, 0.6 + 1.5 * len(found)), layout="constrained")
    panels = canvas.subplots(len(found), sharex=True, sharey=True, squeeze=False)[:, 0]
    for index, (axes, (name, curve)) in enumerate(zip(panels, curves.items(), strict=True)):
        colour = COLOURS[index % len(COLOURS)]
        axes.fill_between(grid, floor, np.maximum(curve, floor), color=colour, alpha=0.3, linewidth=0)
        axes.plot(grid, np.maximum(curve, floor), color=colour, linewidth=1)
        for value in eigenvalues.get(name, ()):
            axes.axvline(value, ymax=0.08, color=INK, linewidth=1.2)
        axes.set_yscale("log")
        axes.set_ylim(floor, 3 * peak)
        axes.set_title(name, loc="left", fontsize=9)
        axes.set_ylabel("density")
    panels[-1].set_xlabel("eigenvalue of the Hessian")
    data = pd.DataFrame({"eigenvalue": grid, **curves}).melt("eigenvalue", var_name="checkpoint", value_name="density")
    return canvas, data


@styled
def draw_slices(found: Measures) -> Drawing:
    """Draw the loss along random filter-normalised directions as thin lines, with their mean."""
    rows = [
        (name, direction, alpha, loss)
        for name, result in found.items()
        for direction, losses in enumerate(result["losses"])
        for alpha, loss in zip(result["alphas"], losses, strict=True)
    ]
    data = pd.DataFrame(rows, columns=["checkpoint", "direction", "alpha", "loss"])
    canvas = Canvas(figsize=size(5, 3.2), layout="constrained")
    axes = canvas.subplots()
    for index, (name, part) in enumerate(data.groupby("checkpoint", sort=False)):
        colour = COLOURS[index % len(COLOURS)]
        for _, line in part.groupby("direction"):
            axes.plot(line.alpha, line.loss, color=colour, linewidth=0.6, alpha=0.5)
        mean = part.groupby("alpha").loss.mean()
        axes.plot(mean.index, mean, color=colour, linewidth=1.8, label=name)
    axes.set_xlabel("alpha, in norms of each filter")
    axes.set_ylabel("loss")
    axes.legend()
    return canvas, data


@styled
def draw_planes(found: Measures) -> Drawing:
    """Draw the loss in the plane of two random filter-normalised directions, all panels with the same contours."""
    rows = [
        (name, alpha, beta, loss)
        for name, result in found.items()
        for beta, losses in zip(result["alphas"], result["losses"], strict=True)
        for alpha, loss in zip(result["alphas"], losses, strict=True)
    ]
    data = pd.DataFrame(rows, columns=["checkpoint", "alpha", "beta", "loss"])
    low = max(data.loss.min(), 1e-8)
    levels = np.geomspace(low, max(data.loss.max(), 1.01 * low), 16)
    columns = min(len(found), 1 if is_narrow() else MAX_COLUMNS)
    lines = -(-len(found) // columns)
    canvas = Canvas(figsize=size(2.9 * columns + 0.8, 3.0 * lines), layout="constrained")
    panels = canvas.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes in panels[len(found) :]:
        axes.set_visible(False)
    for axes, (name, result) in zip(panels, found.items(), strict=False):
        losses = np.maximum(np.array(result["losses"]), low)
        contours = axes.contourf(result["alphas"], result["alphas"], losses, levels=levels, norm="log", cmap="viridis")
        axes.plot(0, 0, "+", color="white", markersize=9, markeredgewidth=1.5)
        axes.set_title(name, loc="left", fontsize=9)
        axes.set_xlabel("first direction")
        axes.set_ylabel("second direction")
        axes.set_aspect("equal")
        axes.label_outer()
        axes.grid(False)
    bar = canvas.colorbar(contours, ax=panels.tolist(), label="loss")
    bar.set_ticks([levels[0], levels[len(levels) // 2], levels[-1]])
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    bar.ax.yaxis.set_minor_formatter(lambda value, _: "")
    return canvas, data


@styled
def draw_lines(lines: Sequence[Mapping[str, Any]]) -> Drawing:
    """Draw the loss on the straight line between checkpoints."""
    canvas = Canvas(figsize=size(5, 3.2), layout="constrained")
    axes: Axes = canvas.subplots()
    rows = []
    for index, line in enumerate(lines):
        title = f"{line['first']} to {line['second']}"
        axes.plot(line["t"], line["losses"], label=f"{title} (barrier {line['barrier']:.3g})", **_look(index))
        rows += [(title, t, loss) for t, loss in zip(line["t"], line["losses"], strict=True)]
    axes.set_xlabel("t: 0 at the first, 1 at the second")
    axes.set_ylabel("loss")
    axes.legend()
    return canvas, pd.DataFrame(rows, columns=["line", "t", "loss"])


def _look(index: int) -> dict[str, Any]:
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 4,
        "linewidth": 1.3,
    }
