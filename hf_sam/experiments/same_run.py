"""Whether two runs have the same arguments, as far as these affect the result."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .json_files import plain

if TYPE_CHECKING:
    from .records import RunRecord

# Training arguments that affect the result; the others control logging, saving and speed.
ARGUMENTS_OF_A_RUN = (
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio", "weight_decay"),
    *("optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "label_smoothing_factor"),
    *("num_train_epochs", "max_steps", "seed", "data_seed", "bf16", "fp16", "neftune_noise_alpha"),
    *("train_sampling_strategy", "dataloader_drop_last", "max_length", "packing", "completion_only_loss"),
    "assistant_only_loss",
)
# Recipe arguments that do not affect training: paths and names, and what is evaluated afterwards.
NO_PART_OF_A_RUN = frozenset(
    ["dataset", "model_name_or_path", "tokenizer_name", "validation_samples", "test_samples", "check_images"]
)


def changed_arguments(earlier: RunRecord, now: RunRecord) -> list[str]:
    """The arguments in which two runs differ, each with its old and new value."""
    found = {}
    before, after = (plain(run.config.get("training_arguments") or {}) for run in (earlier, now))
    for name in ARGUMENTS_OF_A_RUN:
        if name in before and name in after:
            found[name] = before[name], after[name]
    sizes = [_batch_size(run) for run in (earlier, now)]
    if None not in sizes and sizes[0] != sizes[1]:
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            found[name] = before.get(name), after.get(name)
        found.setdefault("examples a step", tuple(sizes))
    before, after = (plain(run.config.get("recipe") or {}) for run in (earlier, now))
    for group in before.keys() & after.keys():
        if isinstance(before[group], dict) and isinstance(after[group], dict):
            for name in sorted(before[group].keys() & after[group].keys() - NO_PART_OF_A_RUN):
                found[name] = before[group][name], after[group][name]
    before, after = (plain(run.config.get("sam") or {}) for run in (earlier, now))
    for name in sorted(before.keys() | after.keys()):
        found[f"sam_{name}"] = before.get(name), after.get(name)
    prints = [(run.data.get("train") or {}).get("fingerprint") for run in (earlier, now)]
    if None not in prints:
        found["the training data"] = tuple(prints)
    return [f"{name} was {old} and is now {new}" for name, (old, new) in found.items() if old != new]


def _batch_size(run: RunRecord) -> int | None:
    """Number of examples per optimizer step, over all processes."""
    values = run.config.get("training_arguments") or {}
    parts = [values.get("per_device_train_batch_size"), values.get("gradient_accumulation_steps")]
    parts.append(((run.environment or {}).get("hardware") or {}).get("processes"))
    return math.prod(parts) if all(isinstance(part, int) for part in parts) else None
