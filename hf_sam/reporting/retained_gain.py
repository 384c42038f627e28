"""Share of the treatment's gain that cheaper arms keep."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from .document import Block, Table
from .formatting import number
from .results import Comparison, mean_and_spread
from .statistics import ratio_of_means
from .study import Study


def share_blocks(study: Study, comparisons: Sequence[Comparison]) -> list[Block]:
    """Tabulate the share of the treatment's gain that other arms keep; empty if there is no gain or no other arm."""
    treatment, control = study.question.treatment, study.question.control
    cells = {(cell.task, cell.condition, cell.budget): cell for cell in study.cells}
    rows = []
    for entry in shares_of_gain(comparisons, treatment).itertuples():
        cell = cells[entry.task, entry.condition, entry.budget]
        passes, base = (mean_and_spread(cell.values(arm, "passes"))[0] for arm in (entry.arm, control))
        interval = "" if pd.isna(entry.low) else f" [{100 * entry.low:.0f} %, {100 * entry.high:.0f} %]"
        rows.append([cell.title, entry.arm, f"{100 * entry.share:.0f} %{interval}", number(passes / base, 2)])
    if not rows:
        return []
    caption = f"Share of the gain of {treatment} over {control} that each arm keeps, where there is a gain: ratio of the mean gains, with Fieller's interval."
    return [Table(["task", "arm", "share kept", f"passes / {control}"], rows, caption, 2)]


def shares_of_gain(comparisons: Sequence[Comparison], treatment: str) -> pd.DataFrame:
    """
    Compute the share of the treatment's gain that each other arm keeps, in cells where Student's interval shows a
    gain.

    Returns:
        `pd.DataFrame`: One row for each other arm: `share` is the ratio of the two mean gains over the seeds that both
        have, `low` and `high` its interval (`ratio_of_means`).
    """
    gained = {
        entry.cell: dict(zip(entry.paired.seeds, entry.paired.differences, strict=True))
        for entry in comparisons
        if entry.arm == treatment and entry.verdict in ("better", "leans better")
    }
    rows = []
    for entry in comparisons:
        whole = gained.get(entry.cell, {})
        own = dict(zip(entry.paired.seeds, entry.paired.differences, strict=True))
        seeds = sorted(own.keys() & whole.keys())
        if entry.arm == treatment or not seeds:
            continue
        share = ratio_of_means([own[seed] for seed in seeds], [whole[seed] for seed in seeds])
        cell = {"task": entry.cell.task, "condition": entry.cell.condition, "budget": entry.cell.budget}
        rows.append(
            cell | {"arm": entry.arm, "share": share.value, "low": share.low, "high": share.high, "seeds": share.n}
        )
    return pd.DataFrame(rows)
