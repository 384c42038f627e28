"""Check whether the runs of a comparison can answer its question, and say what to do if they cannot."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..evaluation.metrics import metric_of
from ..experiments.records import OPEN, RunRecord
from .formatting import size, where
from .results import Cell, Comparison
from .statistics import seeds_needed
from .study import Study

ONE_POINT = 0.01
LATE_SHARE = 0.1  # of the total improvement, in the last fifth of training
FEW_CORRELATED = 0.05  # Matthews coefficient below which predictions are no better than chance
MANY_SEEDS = 30  # more than is practical
MAX_NAMED = 4


def warnings(study: Study) -> list[str]:
    """List the reasons why these runs may not answer the question, the most serious first."""
    found = [_unfinished(study), _near_chance(study), _still_improving(study), _few_seeds(study)]
    return [message for message in found if message]


def next_steps(study: Study) -> list[str]:
    """List what would make the answer more certain, or what to do with it."""
    asked, steps = study.asked, []
    treatment, control = study.question.treatment, study.question.control
    if any(run.status == "failed" for run in study.records):
        steps.append(
            "Fix the cause of the failed runs (listed under Every run), then repeat the command with --retry_failed."
        )
    if study.missing or any(run.status in OPEN for run in study.records):
        steps.append("Repeat the command: it runs only what is missing.")
    if cells := chance_cells(study):
        steps.append(
            f"Get above chance first on {_listed(cells, True)}: use more steps, more data, another learning rate or another rho."
        )
    if improving_cells(study):
        steps.append(
            "Train longer (--set num_train_epochs=... or max_steps=...), until the curves below are flat at the end."
        )
    needed = seeds_for_one_point(study)
    if needed and needed > MANY_SEEDS:
        steps.append(
            "Before adding seeds, reduce the variance between them with longer training or more data: see above."
        )
    elif needed:
        steps.append(
            f"Repeat with --seeds 0 1 ... {needed - 1} to detect a difference of one point; finished runs are kept."
        )
    elif any(len(entry.paired.seeds) == 1 for entry in asked):
        steps.append("Repeat with --seeds 0 1 2 or more; finished runs are kept.")
    verdicts = {entry.verdict for entry in asked}
    if verdicts & {"better", "leans better"}:
        steps.append(
            f"Before crediting sharpness, check the controls under All arms: the gain of {treatment} should exceed the gains of a "
            f"random perturbation of the same size, of another learning rate, and of the same number of gradients without SAM."
        )
    if verdicts & {"worse", "leans worse"}:
        steps.append(f"Try a smaller rho: hf-sam find-rho searches for the best one for {treatment}, 0 included.")
    if verdicts and verdicts <= {"equivalent"}:
        steps.append(f"Use {control}: {treatment} costs more and is equivalent here.")
    return steps


def chance_cells(study: Study) -> dict[str, list[str]]:
    """Map each cell to the compared arms that are no better than chance in it."""
    found: dict[str, list[str]] = {}
    for cell in study.cells:
        for arm in (study.question.control, study.question.treatment):
            if _is_at_chance(study, cell, arm):
                found.setdefault(cell.title, [])
                found[cell.title] += [arm] if arm not in found[cell.title] else []
    return found


def improving_cells(study: Study) -> dict[str, list[str]]:
    """Map each cell to the compared arms whose curves still improve at the end."""
    found: dict[str, list[str]] = {}
    for cell in study.cells:
        for arm in dict.fromkeys((study.question.control, study.question.treatment)):
            shares = [late_share(run, study.question.metric) for run in cell.runs.get(arm, [])]
            shares = [share for share in shares if share is not None]
            error = np.std(shares, ddof=1) / np.sqrt(len(shares)) if len(shares) > 1 else 0.0
            if shares and np.mean(shares) - error > LATE_SHARE and arm not in found.get(cell.title, []):
                found.setdefault(cell.title, []).append(arm)
    return found


def late_share(run: RunRecord, metric: str) -> float | None:
    """
    Return the share of a run's total improvement that came in the last fifth of its steps.

    It uses the evaluated metric, the evaluation loss or the training loss: the first that was logged at least five
    times. `None` if none was.
    """
    for key, sign in (
        (f"eval_{metric}", 1 if metric_of(metric).higher_is_better else -1),
        ("eval_loss", -1),
        ("loss", -1),
    ):
        points = {
            entry["step"]: sign * entry[key]
            for entry in run.curves
            if isinstance(entry.get(key), (int, float)) and isinstance(entry.get("step"), (int, float))
        }
        if len(points) >= 5:
            steps, values = np.array(sorted(points)), np.array([points[step] for step in sorted(points)])
            whole = values[-1] - values[0]
            late = values[-1] - np.interp(0.8 * steps[-1], steps, values)
            return float(late / whole) if whole > 0 and np.isfinite(whole) else None
    return None


def seeds_for_one_point(study: Study) -> int | None:
    """
    Return the number of seeds that detects one point in all undecided comparisons; `None` if there are none, or if the
    metric is not in percent.
    """
    if metric_of(study.question.metric).scale != 100:
        return None
    short = [entry for entry in study.asked if entry.verdict == "undecided" and entry.paired.detectable > ONE_POINT]
    return max((seeds_needed(ONE_POINT, entry.paired.spread) or 1000 for entry in short), default=None)


def _unfinished(study: Study) -> str:
    failed = sum(run.status == "failed" for run in study.records)
    open_runs = study.missing + sum(run.status in OPEN for run in study.records)
    parts = [f"{number} {what}" for number, what in ((failed, "failed"), (open_runs, "not finished")) if number]
    total = len(study.records) + study.missing
    return f"Incomplete: of {total} runs, {' and '.join(parts)}." if parts else ""


def _near_chance(study: Study) -> str:
    cells = chance_cells(study)
    if not cells:
        return ""
    return (
        f"No better than chance: {_listed(cells, with_arms=True)}. Models that have learned nothing cannot show "
        f"which arm is better."
    )


def _still_improving(study: Study) -> str:
    cells = improving_cells(study)
    if not cells:
        return ""
    return (
        f"Still improving at the end of training: {_listed(cells, with_arms=True)} (more than {100 * LATE_SHARE:.0f} % of the "
        f"improvement came in the last fifth). The order of the arms may change in longer runs."
    )


def _few_seeds(study: Study) -> str:
    alone = [entry for entry in study.asked if len(entry.paired.seeds) == 1]
    if alone:
        return f"One seed is not a comparison: {_cells(alone)}. At least three are needed for a verdict."
    needed = seeds_for_one_point(study)
    if needed is None:
        return ""
    short = [entry for entry in study.asked if entry.verdict == "undecided" and entry.paired.detectable > ONE_POINT]
    worst = max(short, key=lambda entry: entry.paired.detectable)
    more = f"about {needed}" if needed < 1000 else "more than a thousand"
    return (
        f"Too few seeds to detect one point: with {len(worst.paired.seeds)} seeds and the spread found, a difference must be "
        f"{size(worst.paired.detectable, worst.metric)} to be detected four times in five ({where(worst)}); detecting one "
        f"point would take {more} seeds."
    )


def _is_at_chance(study: Study, cell: Cell, arm: str) -> bool:
    kept = study.pooled_predictions(cell, arm)
    if kept is not None:
        frequent = np.bincount(kept.labels).max() / len(kept.labels)  # the accuracy of always predicting one class
        error = np.sqrt(frequent * (1 - frequent) / len(kept.labels) * max(1, len(cell.runs[arm])))
        return bool(kept.correct.mean() <= frequent + 2 * error)
    correlations = cell.values(arm, "mcc")
    return bool(correlations) and float(np.mean(correlations)) < FEW_CORRELATED


def _cells(entries: Sequence[Comparison]) -> str:
    return _listed(dict.fromkeys(entry.cell.title for entry in entries))


def _listed(cells: dict, with_arms: bool = False) -> str:
    names = [f"{name} ({', '.join(arms)})" if with_arms else name for name, arms in cells.items()]
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more
