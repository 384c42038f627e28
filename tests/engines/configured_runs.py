"""What processes started by `accelerate launch --config_file ...` do: train under what they find."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engines.sharded_runs import as_if_on_accelerators
from integration import tiny

from hf_sam import SAMConfig, SAMTrainer
from hf_sam.engines import kind_of


def trained(folder: Path) -> dict[str, Any]:
    args = tiny.arguments(folder, gradient_accumulation_steps=2, bf16=True)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        as_if_on_accelerators(args)
    trainer = SAMTrainer(model=tiny.llama(), args=args, train_dataset=tiny.texts(), sam_config=SAMConfig())
    trainer.train()
    norms = [entry["sam_perturbation_norm"] for entry in trainer.state.log_history if "sam_rho" in entry]
    return {"kind": kind_of(trainer), "norms": norms}


def as_configured() -> dict[str, Callable[[Path], dict[str, Any]]]:
    return {"trained": trained}
