"""The state of a study: finished, running and failed runs, with reasons, and an estimate of the remaining time."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .driver import jobs_of
from .execution import JOB_NAME, PLACE_NAME
from .executors import Choice
from .json_files import read_json
from .records import OPEN, RunRecord
from .workshop import Workshop, counts

MAX_LISTED = 20


@dataclass(frozen=True)
class Standing:
    """
    The state of a study.

    Args:
        finished, total (`int`): Number of runs, including trials.
        under_way (`dict[Path, str]`): Folder of each running run, and where and for how long it has been running.
        queued (`int`): Number of runs that are submitted but have not started.
        failed (`dict[Path, str]`): Folder of each failed run, and the reason in one line.
        progress (`str`): A line on the progress, with the estimated remaining time.
    """

    finished: int
    total: int
    under_way: dict[Path, str]
    queued: int
    failed: dict[Path, str]
    progress: str


def standing_of(workshop: Workshop, choice: Choice) -> Standing:
    """Read the state of a study from its folder; a cluster is queried only about the jobs named there."""
    count = counts(workshop)
    jobs = jobs_of(workshop, choice)
    under_way, queued = {}, 0
    for name, run in jobs.items():
        path = workshop.folder(run) / PLACE_NAME
        place = read_json(path)
        if place is None or place["id"] != name:
            queued += 1
            continue
        gpus = f", GPU {place['gpus']}" if place["gpus"] else ""
        minutes = (time.time() - path.stat().st_mtime) / 60
        under_way[run.folder] = f"{place['host']}{gpus}, process {place['pid']}, for {_spell(minutes)}"
    failed = {
        run.folder: reason(record)
        for run in workshop.all_runs()
        if (record := workshop.record(run)) is not None and record.status == "failed"
    }
    total = sum(count[name] for name in ("finished", "failed", "begun", "waiting"))
    rest = progress(workshop, max(len(under_way), 1))
    return Standing(count["finished"], total, under_way, queued, failed, rest)


def describe_standing(standing: Standing) -> str:
    """Describe the state of a study in a few lines of text."""
    lines = [standing.progress, f"{len(standing.under_way)} running, {standing.queued} queued"]
    for title, entries in (("running", standing.under_way), ("failed", standing.failed)):
        lines += [f"  {title}: {folder}: {words}" for folder, words in list(entries.items())[:MAX_LISTED]]
        if len(entries) > MAX_LISTED:
            lines.append(f"  ... and {len(entries) - MAX_LISTED} more {title}")
    return "\n".join(lines)


def reason(record: RunRecord) -> str:
    """Return the error that ended a failed run, in one line."""
    error = record.error or {}
    lines = error.get("message", "").splitlines()
    return f"{error.get('type', 'unknown')}: {lines[0]}" if lines else error.get("type", "unknown")


def progress(workshop: Workshop, workers: int = 1) -> str:
    """Describe the progress and the estimated remaining time in one line."""
    count = counts(workshop)
    total = sum(count[name] for name in ("finished", "failed", "begun", "waiting"))
    line = f"{count['finished']} of {total} runs finished, {count['failed']} failed"
    if not count["begun"] + count["waiting"]:
        return f"{line}."
    found = estimate(workshop)
    if found is None:
        return f"{line}; remaining time unknown until one has finished."
    seconds, known = found
    of = f", {workers} at a time," if workers > 1 else ""
    return f"{line}; about {_spell(seconds / workers / 60)}{of} left, estimated from {known} finished."


def _spell(minutes: float) -> str:
    return f"{minutes / 60:.1f} hours" if minutes > 90 else f"{minutes:.1f} minutes"


def estimate(workshop: Workshop) -> tuple[float, int] | None:
    """Estimate the seconds that one worker needs for the remaining runs; also return the number of runs used."""
    spent, cost = 0.0, 0.0
    known = 0
    rest = 0.0
    for run in workshop.all_runs():
        record = workshop.record(run)
        if record is None or record.status in OPEN:
            rest += run.cost
        elif record.status == "finished" and record.resumed_from is None:
            with suppress(FileNotFoundError):  # somebody has removed the run since
                spent += _seconds(record)
                cost += run.cost
                known += 1
    return (rest * spent / cost, known) if known else None


def _seconds(record: RunRecord) -> float:
    """Seconds from the start of a run to its end, by the file system's clock."""
    begun = record.path.with_name(PLACE_NAME)
    if not begun.exists():
        begun = record.path.with_name(JOB_NAME)
    return max(record.path.stat().st_mtime - begun.stat().st_mtime, 0.0)
