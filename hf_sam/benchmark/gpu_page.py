"""The page that `hf_sam.benchmark.on_gpu` writes: a summary, and a table for each cell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

HEAD = ("variant", "step (ms), quartiles", "ratio, 95 %", "passes", "peak (MiB)", "launches", "synchronisations")
HEAD += ("bookkeeping",)


def page(document: dict[str, Any]) -> str:
    """The report in Markdown: a summary, then one table per cell."""
    made, where = document["cells"], document["environment"]
    lines = [f"# What a step costs on {where['device']}", "", *summary(made), ""]
    for cell in made:
        fills = "fills the card" if cell["fills"] else "leaves it idle"
        title = f"{cell['model']}, {cell['precision']}, batch {cell['batch_size']} ({fills})"
        lines += [f"## {title}", "", f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|", *map(line, cell["rows"]), ""]
    lines.append(
        "Medians of interleaved steps with quartiles; the ratio is to the stock Trainer's steps in the same turns. Launches are "
        "kernels, copies and fills that the host starts, synchronisations are its waits, both by the profiler in one step "
        "(perturbed and plain ones weighted by the schedule). Bookkeeping is the time outside of forward and backward passes "
        "beyond the stock step's, as a share of the step, with the device waited for around every pass."
    )
    versions = ", ".join(f"{name} {where[name]}" for name in ("torch", "cuda", "transformers", "python") if where[name])
    lines += ["", f"{versions}; {document['seconds']:.0f} s, {document['end']}."]
    if document["left_out"]:
        lines += ["", f"Left out: {'; '.join(document['left_out'])}."]
    return "\n".join(lines)


def line(row: dict[str, Any]) -> str:
    if "problem" in row:
        return f"| {row['variant']} | {row['problem']} |" + " |" * (len(HEAD) - 2)
    low, median, high = (1e3 * row[f"seconds_{at}"] for at in (25, 50, 75))
    cells_ = [
        row["variant"],
        f"{median:.2f} [{low:.2f}, {high:.2f}]",
        f"{row['ratio']:.3f} [{row['ratio_low']:.3f}, {row['ratio_high']:.3f}]",
        f"{row['passes']:.2f}",
        "" if row["peak_memory"] is None else f"{row['peak_memory'] / 2**20:.0f}",
        f"{row['launches']:.0f}",
        f"{row['synchronisations']:.1f}",
        f"{row['bookkeeping']:.1%}" if "bookkeeping" in row else "",
    ]
    return f"| {' | '.join(cells_)} |"


def summary(made: Sequence[dict[str, Any]]) -> list[str]:
    """A short summary of the worst ratios."""
    lines = []
    for name, fills, what in (
        ("sam", True, "where the batch fills the card"),
        ("sam", False, "where it does not"),
        ("hand-loop", True, "where the batch fills the card"),
        ("hand-loop", False, "where it does not"),
        ("msam", None, "in any cell"),
        ("previous", None, "in any cell"),
    ):
        rows = [
            (row, cell)
            for cell in made
            for row in cell["rows"]
            if row["variant"] == name and "ratio" in row and fills in (None, cell["fills"])
        ]
        if rows:
            row, cell = max(rows, key=lambda entry: entry[0]["ratio"])
            where = f"{cell['model']}, {cell['precision']}, batch {cell['batch_size']}"
            lines.append(f"- `{name}` costs at most {row['ratio']:.3f} stock steps {what} ({where}).")
    return lines
