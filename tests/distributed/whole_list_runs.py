"""Runs of two processes that work on whole lists, as an accelerator does."""

from __future__ import annotations

from distributed import runs
from distributed.runs import SCOPES, Run

from hf_sam.update import buckets, step

SETTING = (0, 1, 1, 1)  # bf16, accumulation and checkpointing together


def in_whole_lists() -> dict[str, Run]:
    step.IN_BUCKETS, buckets.BUCKET_BYTES = True, 1024
    everything = runs.pairwise()
    names = [f"matrix {SETTING} {scope}" for scope in (None, *SCOPES)]
    for scope in SCOPES:
        names += [f"branch {scope}", f"resumed {scope}", f"examples {scope} 2x2"]
        names += [f"wrapped {scope} {wrapping}" for wrapping in ("default", "gradient as bucket view")]
    return {name: everything[name] for name in names}
