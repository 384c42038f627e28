"""Threats to the validity of a comparison, as far as the records show them."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from ..evaluation.metrics import metric_of
from ..experiments.records import OPEN
from .document import Block, Listing
from .results import count_trials, in_budget, is_trial, pairing_problems
from .statistics import detectable_effect
from .study import Study

FEW_SEEDS = 10
MAX_LISTED = 10


def limits(study: Study) -> list[Block]:
    """List the limits of this set of runs, not of comparisons in general."""
    found = [
        *_about_seeds(study),
        *_about_tuning(study),
        *_about_runs(study),
        *_about_pairs(study),
        *_about_machines(study),
        *_shortened([f"Left out because it could not be read: {problem}" for problem in study.problems]),
        "The test split was used once per run. Picking the best of many arms still selects on it: the answer is about the arm "
        "that the question named beforehand.",
    ]
    return [Listing(found)]


def _about_seeds(study: Study) -> list[str]:
    counts = sorted({len(entry.paired.seeds) for entry in study.comparisons})
    if not counts:
        return ["No runs could be paired: this report has no intervals and no tests."]
    found = []
    if counts[0] == 1:
        found.append("Some comparisons rest on one seed: they have no interval and show nothing.")
    if counts[-1] > 1 and counts[0] < FEW_SEEDS:
        least = min(n for n in counts if n > 1)
        found.append(
            f"Few seeds ({least}{' or more' if counts[-1] > least else ''}). The paired t-test is valid with so few, but detects "
            f"only large effects: {detectable_effect(least):.1f} standard deviations of the paired differences, four times in five. "
            f"The bootstrap interval is too narrow: in simulation, with five normal differences, it covers the truth 83 % of the "
            f"time, not 95 %."
        )
    return found


def _about_tuning(study: Study) -> list[str]:
    trials = count_trials(study.records)
    arms = dict.fromkeys(run.arm for run in study.records if run.status == "finished" and not is_trial(run))
    if not trials:
        return [
            "Nothing was tuned: every arm ran with the settings it was given, which may suit some arms better than others."
        ]
    counts = {arm: trials.get(arm, {0}) for arm in arms or trials}
    if len(set().union(*counts.values())) > 1:
        listed = ", ".join(f"{arm} {' or '.join(map(str, sorted(count)))}" for arm, count in counts.items())
        return [f"Arms were tuned with unequal numbers of trials ({listed})."]
    count = next(iter(set().union(*counts.values())))
    found = [
        f"Each arm was tuned with {count} trials per task, condition and budget; a larger search could change the order."
    ]
    parallel, searches = _searches_in_parallel(study)
    if parallel:
        found.append(
            f"In {parallel} of {searches} searches for settings, trials ran in parallel: the settings of a trial depended on "
            f"which results were already available, so a repeated search could try other settings."
        )
    return found


def _searches_in_parallel(study: Study) -> tuple[int, int]:
    """Count the searches in which a trial started before the previous one had ended, and all searches."""
    groups: dict[tuple, list] = {}
    for run in study.records:
        if is_trial(run) and run.started and run.ended and run.path is not None:
            groups.setdefault((run.task, run.condition, run.budget, run.arm), []).append(run)
    count = 0
    for runs in groups.values():
        runs.sort(key=lambda run: run.path.parent.name)
        count += any(later.started < earlier.ended for earlier, later in pairwise(runs))
    return count, len(groups)


def _about_runs(study: Study) -> list[str]:
    status = Counter(run.status for run in study.records)
    metric = study.question.metric
    found = []
    if status["failed"]:
        found.append(f"{_count(status['failed'], 'run')} failed: listed with errors, not counted anywhere.")
    unfinished = sum(status[name] for name in OPEN)
    if unfinished or study.missing:
        found.append(
            f"{_count(unfinished, 'run')} unfinished and {study.missing} not started: this comparison is incomplete."
        )
    if status["external"]:
        found.append(
            f"{_count(status['external'], 'run')} not written by hf_sam: shown with the others but not paired "
            f"or tested, since nothing shows that the head, order, noise and splits were the same."
        )
    resumed = [run for run in study.records if run.resumed_from is not None]
    if resumed:
        parts = sum(not run.has_whole_costs for run in resumed)
        found.append(
            f"{_count(len(resumed), 'run')} interrupted and resumed: seconds and passes are summed over the parts"
            + (
                f", except for {parts}, whose earlier parts are unknown and which are left out of timings."
                if parts
                else "."
            )
        )
    without = [run for run in study.records if run.status == "finished" and run.metrics.get(metric) is None]
    if without:
        label = metric_of(metric).label
        found.append(f"{_count(len(without), 'finished run')} without a finite {label}: not counted anywhere.")
    return found


def _about_pairs(study: Study) -> list[str]:
    found = _shortened([f"Not a true pair: {problem}" for problem in pairing_problems(study.records)])
    by_size: dict[tuple, set] = {}
    for run in study.records:
        if run.status == "finished" and in_budget(run, "steps"):
            by_size.setdefault((run.task, run.condition), set()).add(run.steps)
    uneven = [f"{task}, {condition}" for (task, condition), steps in by_size.items() if len(steps) > 1]
    return found + [
        f"At equal steps, the arms did not take the same number of steps in {where}." for where in uneven[:MAX_LISTED]
    ]


def _about_machines(study: Study) -> list[str]:
    done = [run for run in study.records if run.status == "finished"]
    found = []
    git = [run.environment.get("git") or {} for run in done]
    if any(entry.get("dirty") for entry in git):
        found.append("Some runs were made from a working tree with uncommitted changes.")
    for what, values in (
        ("commits of the code", {entry.get("commit") for entry in git}),
        ("versions of torch", {(run.environment.get("packages") or {}).get("torch") for run in done}),
        ("kinds of machine", {str((run.environment.get("hardware") or {}).get("accelerators")) for run in done}),
    ):
        if len(values) > 1:
            found.append(f"The runs come from {len(values)} {what}.")
    return found


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _shortened(messages: list[str]) -> list[str]:
    more = len(messages) - MAX_LISTED
    return messages[:MAX_LISTED] + ([f"... and {more} more of this kind."] if more > 0 else [])
