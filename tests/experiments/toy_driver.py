"""A driver as a process of its own: `python toy_driver.py STUDY.yaml OUTPUT_DIR [KIND] [KEY=VALUE ...]`."""

from __future__ import annotations

import sys
from pathlib import Path

from hf_sam.experiments.driver import drive
from hf_sam.experiments.executors import choose
from hf_sam.experiments.plan import final_runs
from hf_sam.experiments.plan_file import read_plan
from hf_sam.experiments.workshop import Workshop


def open_workshop(study: Path, output_dir: Path | None = None) -> Workshop:
    plan = read_plan(study, output_dir)
    runs = final_runs(plan, lambda task, arm: 2.0 if "sam" in arm else 1.0)
    return Workshop(plan, runs, lambda run: {"max_steps": 2})


if __name__ == "__main__":
    study, output_dir, *rest = sys.argv[1:]
    kind, *options = rest or ["local"]
    workshop = open_workshop(Path(study), Path(output_dir))
    drive(
        workshop,
        choose(workshop.plan.executor, kind, given=options),
        lambda run, what: print(what, run.folder, flush=True),
    )
