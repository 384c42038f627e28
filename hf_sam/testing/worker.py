"""The script that each process of `run_on_processes` runs."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

import torch

from .kit import frozen_garbage, run
from .processes import unpacked


def main(folder: Path) -> None:
    """Execute all jobs in `folder` and write the weights after each step to `RANK.pt`."""
    rank, found = os.environ["RANK"], {}
    with frozen_garbage():
        for key, (config, options) in pickle.loads((folder / "jobs").read_bytes()).items():
            (folder / f"{rank}.running").write_text(f"{key[0]}, 'two processes'")
            seen = run(unpacked(config), folder / f"run{len(found)}", **options)
            found[key] = seen.trajectory
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
