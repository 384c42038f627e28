"""Figures of a report on checkpoints: confusion, robustness and images. No display is needed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure as Canvas

from .plots import _legend as legend
from .plots import _look as look
from .plots import _panels as panels_of
from .plots import _short as short
from .plots import is_narrow, styled


@styled
def draw_confusion(matrices: dict[str, np.ndarray], class_names: Sequence[str]) -> Canvas:
    """Draw counts of true (row) by predicted class (column), one panel per checkpoint, shaded by share of the row."""
    side = 1.2 + 0.28 * len(class_names)
    columns = 1 if is_narrow() else min(len(matrices), 3)
    rows = -(-len(matrices) // columns)
    canvas = Canvas(figsize=(side * columns + 1, side * rows + 0.6), layout="constrained")
    panels = list(canvas.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[len(matrices) :]:
        axes.remove()
    ticks, names = range(len(class_names)), [short(name, 16) for name in class_names]
    for axes, (title, matrix) in zip(panels, matrices.items(), strict=False):
        share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        axes.grid(False)
        for row, column in np.argwhere(matrix):
            colour = "#ffffff" if share[row, column] > 0.6 else "#0a0a0a"  # on blue, whatever the page
            axes.text(column, row, str(matrix[row, column]), ha="center", va="center", fontsize=7, color=colour)
        axes.set_xticks(ticks, names, rotation=90)
        axes.set_yticks(ticks, names)
        axes.set(xlabel="predicted", ylabel="true")
        axes.set_title(short(title), fontsize=9)
    return canvas


@styled
def draw_robustness(frame: pd.DataFrame, clean: dict[str, float]) -> Canvas:
    """Draw accuracy over the level of each corruption, one panel per corruption; level 0 is uncorrupted."""
    kinds = list(dict.fromkeys(frame.corruption))
    canvas, panels = panels_of(kinds, str)
    for axes, kind in zip(panels, kinds, strict=False):
        for index, (name, accuracy) in enumerate(clean.items()):
            rows = frame[(frame.corruption == kind) & (frame.checkpoint == name)]
            axes.plot([0, *rows.level], [100 * accuracy, *(100 * rows.accuracy)], **look(index), linewidth=1.2)
        axes.set(xlabel="level", ylabel="accuracy (%)")
    legend(canvas, list(clean))
    return canvas


@styled
def draw_images(images: Sequence, titles: Sequence[str]) -> Canvas:
    """Draw small images in a grid, each with its title above it."""
    columns = 2 if is_narrow() else min(len(images), 6)
    rows = -(-len(images) // columns)
    canvas = Canvas(figsize=(1.9 * columns, 2.2 * rows), layout="constrained")
    panels = list(canvas.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[len(images) :]:
        axes.remove()
    for axes, image, title in zip(panels, images, titles, strict=False):
        axes.imshow(np.asarray(image))
        axes.grid(False)
        axes.set_axis_off()
        axes.set_title("\n".join(short(line, 24) for line in title.split("\n")), fontsize=7)
    return canvas
