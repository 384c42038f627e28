"""What every method does to a small model, step by step, as numbers that a rewrite of the code must not change.

    python tests/trajectories.py record OUT     # weights, losses and logged values of every run, for a bitwise comparison
    python tests/trajectories.py golden OUT     # the numbers of that recording as tests/trajectories.json
    python tests/trajectories.py compare A B    # of two recordings, made on one machine: fails at the first differing bit

`tests/test_trajectories.py` compares with the committed JSON, up to rounding.
"""

from __future__ import annotations

import functools
import gc
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from models import InOrder, arguments, examples, tiny_classifier
from transformers import PrinterCallback

from hf_sam import SAMConfig, SAMTrainer
from hf_sam.config import fields_used
from hf_sam.methods import METHODS

GOLDEN = Path(__file__).with_suffix(".json")
STEPS = 6
SCOPES = ("micro", "device", "global")

# One other choice of each method's own fields, with a perturbation large enough to matter.
VARIATIONS: dict[str, dict[str, Any]] = {
    "sam": {"rho": 0.2},
    "asam": {"rho": 0.3, "eta": 0.1},
    "gsam": {"rho": 0.3, "rho_min": 0.05, "rho_schedule": "linear", "alpha": 0.2},
    "wsam": {"rho": 0.2, "gamma": 0.6},
    "friendly": {"rho": 0.2, "sigma": 0.6, "ema_decay": 0.7},
    "esam": {"rho": 0.2, "beta": 0.4, "gamma": 0.75},
    "looksam": {"rho": 0.2, "alpha": 0.4, "interval": 3},
    "msam": {"rho": 0.5},
    "periodic": {"rho": 0.2, "interval": 2},
    "late": {"rho": 0.2, "start": 0.5},
    "subset": {"rho": 0.2, "ascent_fraction": 0.5},
    "norm-only": {"rho": 0.2, "ascent_steps": 2},
    "functional": {"rho": 0.2},
    "previous": {"rho": 0.2, "interval": 2},
    "carried": {"rho": 0.2, "interval": 3, "ascent_fraction": 0.5, "alpha": 0.8},
    "bilora": {"rho": 0.05},
    "random": {"rho": 0.2},
}
# Fields that many methods share, for plain SAM at a large rho unless another method is named.
SHARED: dict[str, dict[str, Any]] = {
    "p=1": {"p": 1.0},
    "p=1.5": {"p": 1.5},
    "p=inf": {"p": "inf"},
    "adaptive": {"adaptive": True},
    "adaptive p=1": {"adaptive": True, "p": 1.0},
    "adaptive p=1.5": {"adaptive": True, "p": 1.5},
    "adaptive p=inf": {"adaptive": True, "p": "inf", "eta": 0.1},
    "ascent_steps": {"ascent_steps": 2},
    "weight_decay_in_ascent": {"weight_decay_in_ascent": True},
    "second_order": {"second_order": True},
    "norms": {"perturb": "norm"},
    "matrices": {"perturb": "no-norm-no-bias"},
    "patterns": {"perturb": ["first.*", "second.bias"]},
    "fresh dropout": {"replay_rng": False},
    "linear": {"rho_schedule": "linear", "rho_min": 0.05},
    "cosine": {"rho_schedule": "cosine", "start": 1, "end": 5},
    "lr": {"rho_schedule": "lr", "rho_min": 0.05},
    "gsam adaptive": {"method": "gsam", "adaptive": True},
    "wsam p=inf": {"method": "wsam", "p": "inf"},
    "wsam on a subset of the weights": {"method": "wsam", "perturb": ["first.*"]},
    "friendly with decay": {"method": "friendly", "weight_decay_in_ascent": True},
    "looksam on norms": {"method": "looksam", "perturb": "norm", "interval": 2},
    "carried p=1.5": {"method": "carried", "p": 1.5, "interval": 3},
    "previous on norms": {"method": "previous", "perturb": "norm"},
}


@dataclass(frozen=True)
class Case:
    """One run: `sam` are fields of `SAMConfig`, `args` overrides of the training arguments."""

    sam: dict[str, Any]
    args: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    logging_steps: int = 1


def lora(dropout: float):
    from peft import LoraConfig, get_peft_model

    model = tiny_classifier(dropout=dropout)
    torch.manual_seed(2)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["first", "second"], lora_dropout=dropout)
    return get_peft_model(model, config).double()


def cases() -> dict[str, Case]:
    """The runs on one process, by name."""
    found: dict[str, Case] = {}
    adamw = {"optim": "adamw_torch", "learning_rate": 0.02}
    for method, variation in VARIATIONS.items():  # later rows have no trajectory from before
        row = METHODS[method]
        for fields, name in (({}, "defaults"), (variation, "varied")):
            for scope in SCOPES if ("scope" in fields_used(row)) else (None,):
                if scope == "micro" and method in ("looksam", "carried", "random"):
                    continue  # refused; random draws anew for each micro-batch or once a step, which is its own choice
                for accumulation in (1, 2):
                    if (accumulation == 1 and scope in ("micro", "global")) or (name, scope) == ("defaults", "global"):
                        continue  # that of "device"
                    sam = {"method": method, **fields, **({"scope": scope} if scope else {})}
                    args = {"gradient_accumulation_steps": accumulation, **(adamw if name == "defaults" else {})}
                    found[f"{method} {name} {scope or 'one pass'} {accumulation}"] = Case(sam, args)
        if "m" in fields_used(row):
            sam = {"method": method, **variation, "scope": "micro", "m": 2}
            found[f"{method} m=2"] = Case(sam, {"gradient_accumulation_steps": 2})
    for name, fields in SHARED.items():
        scopes = ("device",) if fields.get("method", "sam") != "sam" else ("micro", "device")
        for scope in scopes if fields.get("method") != "previous" else (None,):
            sam = {"rho": 0.2, **fields, **({"scope": scope} if scope else {})}
            found[f"{name} {scope}"] = Case(sam, {"gradient_accumulation_steps": 2})
    found["measured at times"] = Case({"rho": 0.2}, logging_steps=3)
    found["gsam measured at times"] = Case({"method": "gsam", "rho": 0.2}, logging_steps=3)
    found["asam measured at times"] = Case({"method": "asam"}, logging_steps=3)
    for method in ("sam", "wsam", "previous", "random"):
        sam = {"method": method, "rho": 0.2, "stochastic_rounding": True}
        found[f"{method} rounded at random"] = Case(sam, {"gradient_accumulation_steps": 2}, dtype=torch.bfloat16)
    found["bf16 weights"] = Case({"rho": 0.2}, dtype=torch.bfloat16)
    found["float32 weights"] = Case({"rho": 0.2}, dtype=torch.float32)
    return found


def process_cases() -> dict[str, Case]:
    """The runs on two processes, by name."""
    found: dict[str, Case] = {}
    for method in ("sam", "gsam", "wsam", "looksam", "friendly", "random", "esam"):
        for scope in ("device", "global"):
            sam = {"method": method, **VARIATIONS[method], "scope": scope}
            found[f"two processes {method} {scope}"] = Case(sam, {"gradient_accumulation_steps": 2})
    return found


class Recorded(InOrder, SAMTrainer):
    """Keeps what each call of `training_step` returned, by optimizer step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.losses: dict[int, float] = {}

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        step = self.state.global_step
        self.losses[step] = self.losses.get(step, 0.0) + loss.item()
        return loss


def run(case: Case, folder: Path) -> dict[str, Any]:
    """Train; the weights after the last step, the loss of each step, and each entry of the log that is SAM's."""
    config = SAMConfig(**case.sam)
    is_lora = config.method == "bilora"
    defaults = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "optim_args": "momentum=0.9",
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "lr_scheduler_type": "linear",
        "logging_steps": case.logging_steps,
    }
    options = {**defaults, **case.args}
    if options.get("optim", "sgd") != "sgd":
        options["optim_args"] = None
    trainer = Recorded(
        model=lora(dropout=0.2) if is_lora else tiny_classifier(case.dtype, dropout=0.2),
        args=arguments(folder, **options),
        train_dataset=examples(32, case.dtype),
        sam_config=config,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    # With a pass on a part of the batch, or on the hardest-hit examples, these are not losses of one set of examples.
    left_out = {"sam_cost"}
    is_part = (config.ascent_fraction or 1.0) < 1
    if is_part or config.method == "esam":
        left_out.add("sam_sharpness")
    entries = [e for e in trainer.state.log_history if any(key.startswith("sam_") for key in e)]
    return {
        "weights": {name: p.detach().clone() for name, p in trainer.model.named_parameters()},
        "losses": [] if is_part else [trainer.losses[step] for step in sorted(trainer.losses)],
        "log": [{k: v for k, v in entry.items() if k.startswith("sam_") and k not in left_out} for entry in entries],
    }


def process_runs() -> dict[str, Callable[[Path], dict[str, Any]]]:
    """For `distributed/worker.py`."""
    return {name: functools.partial(run, case) for name, case in process_cases().items()}


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a run that the JSON holds: of its weights, the products with two fixed vectors, and their norm."""
    w = torch.cat([value.double().flatten() for value in result["weights"].values()])
    generator = torch.Generator().manual_seed(7)
    vectors = torch.randn(2, len(w), generator=generator, dtype=torch.float64)
    return {
        "weights": [*(vectors @ w).tolist(), w.norm().item()],
        "losses": result["losses"],
        "log": {
            key: [float(f"{entry[key]:.8g}") for entry in result["log"] if key in entry]  # float32
            for key in sorted({key for entry in result["log"] for key in entry})
        },
    }


# --- by hand -------------------------------------------------------------------------------------------------------


def record(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    from distributed.launching import Launched

    gc.freeze()  # the Trainer collects garbage at the start of each run, which would visit every imported module
    with tempfile.TemporaryDirectory() as scratch:
        for name, case in cases().items():
            torch.save(run(case, Path(scratch, "run")), out / f"{name}.pt")
        launched = Launched(Path(scratch), "trajectories.process_runs")
        for name in process_cases():
            for rank in (0, 1):
                torch.save(launched(name, rank), out / f"{name} rank {rank}.pt")


def golden(out: Path) -> None:
    """One line a run, so that a difference is seen by eye."""
    numbers = {path.stem: summary(torch.load(path)) for path in sorted(out.glob("*.pt")) if "rank 1" not in path.stem}
    lines = [f"{json.dumps(name)}: {json.dumps(values)}" for name, values in numbers.items()]
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def compare(left: Path, right: Path) -> list[str]:
    """The differences between two recordings, one line each."""
    names = sorted({path.name for folder in (left, right) for path in folder.glob("*.pt")})
    differences = [] if names else [f"no recording in {left} or {right}"]
    for name in names:
        if not ((left / name).is_file() and (right / name).is_file()):
            differences.append(f"{name}: only in one of the two")
            continue
        a, b = torch.load(left / name), torch.load(right / name)
        if a["weights"].keys() != b["weights"].keys():
            differences.append(f"{name}: other parameters")
            continue
        other = [key for key, value in a["weights"].items() if not torch.equal(value, b["weights"][key])]
        if other:
            gap = max((a["weights"][key].double() - b["weights"][key].double()).abs().max().item() for key in other)
            differences.append(f"{name}: weights differ by up to {gap:.2g} in {', '.join(other)}")
        for key in ("losses", "log"):
            if a[key] != b[key]:
                differences.append(f"{name}: {key} {a[key]} and {b[key]}")
    return differences


if __name__ == "__main__":
    what, *folders = sys.argv[1:]
    if what == "compare":
        found = compare(*map(Path, folders))
        print("\n".join(found) or "the same bits")
        sys.exit(bool(found))
    {"record": record, "golden": golden}[what](*map(Path, folders))
