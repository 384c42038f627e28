"""The searches of the study of the finder, and their table.

    python docs/results/finder/searches.py                  # the table, from searches.csv
    python docs/results/finder/searches.py outputs/finder   # makes or resumes the searches first

There is one search for each form of the finder and each task of `configs/comparison/units_*.yaml`, two runs at a time.
Start it where these configurations find their data. `searches.csv`, next to this file, has the result of every search.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from hf_sam.experiments.plan import Plan, command_line
from hf_sam.experiments.plan_file import read_plan

SEARCHES, RUNS = Path(__file__).with_name("searches.csv"), Path(__file__).parents[1] / "units/runs.csv"
PLANS = [
    Path(__file__).parents[3] / f"configs/comparison/units_{part}.yaml"
    for part in ("scratch", "language", "images", "texts")
]
FORMS = {
    "four values, 8": ["--budget", "8"],
    "three values, 8": ["--budget", "8", "--points", "3"],
    "three values, 2.7": ["--budget", "2.7", "--points", "3"],
    "before, 8": ["--budget", "8", "--low", "0.005", "--high", "0.2", "--points", "4"],
}


def search(plan: Plan, task: str, form: str, folder: Path) -> dict:
    """Make or resume one search; the content of its `find_rho.json`."""
    base = plan.tasks[task]
    output_dir = folder / f"{form} {task}".replace(" ", "-").replace(",", "")
    words = command_line(base.get("config"), {**plan.settings, **base.get("settings", {})}, output_dir)
    options = ["--metric", plan.question.metric, "--workers", "2", *FORMS[form]]
    command = [sys.executable, "-m", "hf_sam", "find-rho", base["recipe"], *words, *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads((output_dir / "find_rho/find_rho.json").read_text())


def row(task: str, form: str, found: dict) -> dict:
    """One line of `searches.csv`; passes count in ordinary runs, and a gain is positive if the loss is lower."""
    length, gain, passes = found["plan"]["length"], found["gain"], found["passes"]
    confirmed = [run["rho"] for run in found["runs"] if run["end"] == found["plan"]["horizon"] and run["rho"]]
    return {
        "task": task,
        "form": form,
        "values": " ".join(sorted({f"{run['rho']:g}" for run in found["runs"] if run["rho"]}, key=float)),
        "best": confirmed[0] if confirmed else math.nan,
        "recommended": found["recommended_rho"],
        "gain": gain and gain["value"],
        "low": gain and gain["low"],
        "high": gain and gain["high"],
        "seeds": gain and gain["seeds"],
        "seen": found["plan"]["horizon"] / length,
        "planned": passes["planned"] / length,
        "spent": passes["spent"] / length,
    }


def best_of_whole_runs() -> pd.Series:
    """The rho of plain SAM with the lowest mean loss on the validation split, by task, from the study of units."""
    runs = pd.read_csv(RUNS)
    means = runs[runs.family == "sam"].groupby(["task", "value"])["loss"].mean()
    return means.groupby("task").idxmin().map(lambda place: place[1])


def with_distances(searches: pd.DataFrame) -> pd.DataFrame:
    """The searches beside the best rho of whole runs, with the distance of theirs in decades."""
    best = best_of_whole_runs()
    rows = searches.sort_values(["task", "form"]).assign(right=lambda found: found.task.map(best))
    return rows.assign(distance=np.log10(rows.best / rows.right))


def markdown(searches: pd.DataFrame) -> list[str]:
    """The tables of the page: the forms, and every search."""
    rows = with_distances(searches)
    forms = [
        "| finder | within a factor of two | within half a decade | recommended | mean cost |",
        "|---|---|---|---|---|",
    ]
    for form, group in rows.groupby("form"):
        near = [int((group.distance.abs() <= limit).sum()) for limit in (math.log10(2), 0.5)]
        # The earlier finder did not end early.
        cost = group["planned" if form.startswith("before") else "spent"].mean()
        cells = [
            form,
            *(f"{count} of {len(group)}" for count in near),
            str(int((group.recommended > 0).sum())),
            f"{cost:.1f}",
        ]
        forms.append(f"| {' | '.join(cells)} |")
    lines = [
        "| task | best rho | finder | values | its best | decades | answer | gain | cost |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for _, line in rows.iterrows():
        gain = f"{line.gain:+.3f} [{line.low:+.3f}, {line.high:+.3f}], {line.seeds:.0f} seed{'s' if line.seeds > 1 else ''}"
        cells = [line.task, f"{line.right:g}", line.form, line["values"], f"{line.best:g}", f"{line.distance:+.1f}"]
        lines.append(f"| {' | '.join([*cells, f'{line.recommended:g}', gain, f'{line.spent:.1f}'])} |")
    return ["\n".join(forms), "\n".join(lines)]


def main(folders: list[str]) -> None:
    for folder in folders:
        plans = [read_plan(path) for path in PLANS]
        found = [
            row(task, form, search(plan, task, form, Path(folder)))
            for form in FORMS
            for plan in plans
            for task in plan.tasks
        ]
        pd.DataFrame(found).to_csv(SEARCHES, index=False, float_format="%.5g")
    print(*markdown(pd.read_csv(SEARCHES)), sep="\n\n")


if __name__ == "__main__":
    main(sys.argv[1:])
