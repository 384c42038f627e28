"""One process of a distributed test: `worker.py FOLDER PACKAGE.MODULE.FUNCTION` makes every run of the table that the
function returns and leaves `FOLDER/NAME.RANK.pt` for each.

The first failure ends the process, so that no rank waits for one that is gone; its traceback is in the output.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from pathlib import Path
from pkgutil import resolve_name

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))


def main(folder: Path, table: str) -> None:
    module, _, function = table.rpartition(".")
    runs = resolve_name(f"{module}:{function}")()
    gc.freeze()  # the Trainer collects garbage at the start of each run, which would visit every imported module
    rank = os.environ["RANK"]
    for name, run in runs.items():
        started = time.perf_counter()
        torch.save(run(folder / name), folder / f"{name}.{rank}.pt")
        if rank == "0":
            print(f"{time.perf_counter() - started:.2f} s {name}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
