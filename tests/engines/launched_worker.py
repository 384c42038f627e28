"""One process started by `accelerate launch --config_file ...`: `launched_worker.py FOLDER` trains under what it finds."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


def main(folder: Path) -> None:
    from engines.sharded_runs import as_if_on_accelerators
    from integration import tiny

    from hf_sam import SAMConfig, SAMTrainer
    from hf_sam.engines import kind_of

    as_on_gpus = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    args = tiny.arguments(folder, gradient_accumulation_steps=2, bf16=True)
    if as_on_gpus:
        as_if_on_accelerators(args)
    trainer = SAMTrainer(model=tiny.llama(), args=args, train_dataset=tiny.texts(), sam_config=SAMConfig())
    trainer.train()
    if trainer.is_world_process_zero():
        norms = [entry["sam_perturbation_norm"] for entry in trainer.state.log_history if "sam_rho" in entry]
        found = {"kind": kind_of(trainer), "norms": norms}
        print("FOUND " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
