"""One of several processes that measure together: `python -m sharpness.worker RANK WORLD RENDEZVOUS RESULT`."""

import json
import sys

import torch
import torch.distributed as dist

from hf_sam.sharpness import SharpnessConfig, Subset, SubsetLoss, measure

from . import toys

CONFIG = {
    "measures": ["sam", "m", "worst", "average", "hessian", "gauss_newton", "density"],
    "m": [2],
    "steps": 2,
    "draws": 2,
    "probes": 2,
    "eigenvalues": 1,
    "max_products": 20,
    "lanczos_steps": 3,
    "lanczos_draws": 1,
}
# Batch sizes for seven examples: several batches a process, and one batch for all processes together.
BATCH_SIZES = (2, 7)


def measure_all() -> list[dict]:
    model, examples = toys.bert()
    several, one = (SubsetLoss(model, Subset(examples, toys.collate, n), dtype=torch.float64) for n in BATCH_SIZES)
    return [measure(several, SharpnessConfig(**CONFIG)), measure(one, SharpnessConfig(measures=["sam", "m"]))]


if __name__ == "__main__":
    rank, world, rendezvous, result = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=int(rank), world_size=int(world))
    found = measure_all()
    with open(f"{result}.{rank}", "w") as file:
        json.dump(found, file)
    dist.destroy_process_group()
