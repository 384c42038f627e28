"""Report on forgetting: first-task loss against second-task training loss over learning rates, and its summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ..evaluation.forgetting import Matched, Point, match
from ..evaluation.metrics import metric_of
from . import plots
from .document import Block, Document, Listing, Section, Table, Text
from .formatting import number, p_value, value_and_spread, with_interval
from .statistics import compare_paired

SHOWN = ("accuracy", "perplexity")  # in addition to the losses


def paths_of(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, list[Point]]]:
    """Group runs by start and replicate: one (training loss, first-task loss) point per learning rate, ascending."""
    paths: dict[str, dict[int, list[Point]]] = {}
    for run in sorted(runs, key=lambda run: run["learning_rate"]):
        point = (run["second"]["train_loss"], run["first"]["loss"])
        paths.setdefault(run["start"], {}).setdefault(run["replicate"], []).append(point)
    return paths


def has_diverged(run: Mapping[str, Any]) -> bool:
    """Whether a run has no finite loss; `null` in its file."""
    return run["second"]["train_loss"] is None or run["first"]["loss"] is None


def matched_differences(found: Matched, control: str, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Compare every start with the control at matched training loss, paired over replicates."""
    pairs = {name: compare_paired(losses, found.losses[control], rng) for name, losses in found.losses.items()}
    return [{"start": name, "paired": paired} for name, paired in pairs.items() if paired and name != control]


def make_forgetting_document(
    runs: Sequence[Mapping[str, Any]],
    before: Mapping[str, Sequence[Mapping[str, float]]],
    facts: Mapping[str, str],
    names: Sequence[str],
    target: float | None = None,
    seed: int = 0,
) -> Document:
    """
    Build the report of fine-tuning runs on a second task.

    Args:
        runs (`Sequence[Mapping]`): Each with `start`, `replicate`, `learning_rate`, `first` (scores) and `second` (metrics).
        before (`Mapping[str, Sequence[Mapping]]`): By start, the first-task scores of its checkpoints before fine-tuning.
        facts (`Mapping[str, str]`): Facts about the training and evaluation data.
        names (`Sequence[str]`): The starts; the others are compared with the first.
        target (`float`, *optional*): The second-task training loss at which starts are compared.
        seed (`int`, *optional*, defaults to 0): Seed of the bootstrap.

    Raises:
        ValueError: If all runs diverged.
    """
    runs, diverged = [run for run in runs if not has_diverged(run)], [run for run in runs if has_diverged(run)]
    names = [name for name in names if any(run["start"] == name for run in runs)]
    if not names:
        raise ValueError("Every run diverged: give smaller learning_rates.")
    found = match({name: paths_of(runs)[name] for name in names}, target)
    differences = matched_differences(found, names[0], np.random.default_rng(seed))
    frame = _mean_over_replicates(runs, names)
    caption = (
        "Learning against forgetting, one point per learning rate: mean over replicates, bars from the lowest to the highest. Lower left is better. The "
        "dotted line marks the training loss at which starts are compared."
    )
    sections = [
        Section("Answer", _answer(found, differences, names)),
        Section("Frontier", [plots.figure("frontier", caption, plots.draw_frontier, frame, names, found.target)]),
        Section("Every learning rate", [_rates_table(runs, before, names)]),
        Section("Limits of this comparison", [Listing(_limits(runs, diverged, names))]),
        Section("Set-up", [Table(["what", "value"], [list(row) for row in facts.items()], "", 99)], folded=True),
    ]
    lead = (
        f"{', '.join(names)}: fine-tuned on a second task with {frame.learning_rate.nunique()} learning rates, then tested on the first. "
        f"{len(runs)} runs. Intervals are at 95 %."
    )
    numbers = {
        "target": found.target,
        "first_loss": found.losses,
        "unreached": found.unreached,
        "differences": [{"start": entry["start"], **_flat(entry["paired"])} for entry in differences],
        "runs": list(runs),
    }
    return Document("Forgetting", lead, sections, {"runs": _runs_table(runs)}, numbers)


def _answer(found: Matched, differences: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[Block]:
    if found.target is None:
        return [
            Text(
                "The starts have no second-task training loss in common, so they cannot be compared. Spread the learning rates further: "
                "smaller ones for a start whose loss is always lower, larger ones for a start whose loss is always higher.",
                "warning",
            )
        ]
    where = f"at a second-task training loss of {number(found.target)}"
    blocks: list[Block] = [Text(f"Test loss on the first task {where}:")]
    for name in names:
        values = list(found.losses[name].values())
        if values:
            count = f" ({len(values)} replicates)" if len(values) > 1 else ""
            blocks.append(Text(f"{name}: {value_and_spread(values, 'loss')}{count}.", "answer"))
        if name in found.unreached:
            blocks.append(
                Text(
                    f"{name}: {len(found.unreached[name])} replicates never reach that training loss with these learning rates and are left out.",
                    "warning",
                )
            )
    for entry in differences:
        paired = entry["paired"]
        size = with_interval(paired.difference.value, paired.t_low, paired.t_high, "loss")
        test = (
            f"{len(paired.seeds)} pairs, paired t-test p {p_value(paired.t_p)}"
            if paired.t_p is not None
            else "one pair, no interval"
        )
        blocks.append(Text(f"{entry['start']} minus {names[0]}: {size} ({test}); lower is better.", "answer"))
    return blocks


def _mean_over_replicates(runs: Sequence[Mapping[str, Any]], names: Sequence[str]) -> pd.DataFrame:
    frame = _runs_table(runs)
    grouped = frame.groupby(["start", "learning_rate"]).agg(
        second_train_loss=("second_train_loss", "mean"),
        first_loss=("first_loss", "mean"),
        low=("first_loss", "min"),
        high=("first_loss", "max"),
        replicates=("first_loss", "size"),
    )
    order = grouped.reset_index().sort_values("learning_rate", kind="stable")
    return pd.concat([order[order.start == name] for name in names], ignore_index=True)


def _runs_table(runs: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    keys = ("start", "checkpoint", "seed", "replicate", "learning_rate")
    return pd.DataFrame(
        {
            **{key: run.get(key) for key in keys},
            **{f"second_{name}": value for name, value in run["second"].items()},
            **{f"first_{name}": value for name, value in run["first"].items()},
        }
        for run in runs
    )


def _rates_table(
    runs: Sequence[Mapping[str, Any]], before: Mapping[str, Sequence[Mapping[str, float]]], names: Sequence[str]
) -> Table:
    shown = ["loss", *(name for name in SHOWN if name in runs[0]["first"])]
    second = [name for name in ("accuracy", "perplexity") if name in runs[0]["second"]]
    rows = []
    for name in names:
        scores = [_mean(before[name], metric) for metric in shown]
        rows.append([name, "before", "", *("" for _ in second), *scores])
        for rate in sorted({run["learning_rate"] for run in runs if run["start"] == name}):
            own = [run for run in runs if run["start"] == name and run["learning_rate"] == rate]
            cells = [value_and_spread([run["second"]["train_loss"] for run in own], "loss")]
            cells += [_mean([run["second"] for run in own], metric) for metric in second]
            cells += [_mean([run["first"] for run in own], metric) for metric in shown]
            rows.append([name, f"{rate:g}", *cells])
    labels = ["second: training loss", *(f"second: {_labelled(metric)}" for metric in second)]
    labels += [f"first: {_labelled(metric)}" for metric in shown]
    return Table(
        ["start", "learning rate", *labels],
        rows,
        "Mean ± sd over replicates, on the test split unless marked as training",
        2,
    )


def _mean(scores: Sequence[Mapping[str, float | None]], metric: str) -> str:
    """Format mean and spread of the finite values of a metric."""
    return value_and_spread([entry[metric] for entry in scores if entry[metric] is not None], metric)


def _labelled(metric: str) -> str:
    return metric_of(metric).label + (f" ({metric_of(metric).unit})" if metric_of(metric).unit else "")


def _limits(
    runs: Sequence[Mapping[str, Any]], diverged: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> list[str]:
    found = [
        "The comparison is at equal training loss, so a start is not rewarded for learning the second task more slowly. Between "
        "two learning rates, the path is interpolated linearly.",
        "A larger learning rate in the first training is a known alternative explanation: include such a start as a control.",
    ]
    if diverged:
        rates = sorted({run["learning_rate"] for run in diverged})
        found.append(
            f"{len(diverged)} runs diverged and are left out; their learning rates: {', '.join(f'{rate:g}' for rate in rates)}."
        )
    if len({run["replicate"] for run in runs}) < 3:
        found.append("Fewer than three replicates: the difference may come from the seeds.")
    if len(names) < 2:
        found.append("There is only one start, so nothing can be compared.")
    return found


def _flat(paired: Any) -> dict[str, Any]:
    return {
        "difference": paired.difference.value,
        "student_low": paired.t_low,
        "student_high": paired.t_high,
        "t_p": paired.t_p,
        "pairs": len(paired.seeds),
    }
