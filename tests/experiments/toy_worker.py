"""A worker as a process of its own: `python toy_worker.py STUDY.yaml OUTPUT_DIR STALE_AFTER`."""

from __future__ import annotations

import sys
from pathlib import Path

from hf_sam.experiments.plan import final_runs, read_plan
from hf_sam.experiments.worker import Workshop, work


def open_workshop(study: Path, output_dir: Path | None = None) -> Workshop:
    plan = read_plan(study, output_dir)
    runs = final_runs(plan, lambda task, arm: 2.0 if "sam" in arm else 1.0)
    return Workshop(plan, runs, lambda run: {"max_steps": 2})


if __name__ == "__main__":
    work(open_workshop(Path(sys.argv[1]), Path(sys.argv[2])), stale_after=float(sys.argv[3]))
