"""At a vanishing rho a run is the stock trainer's: runs of both kinds, and everything in which they could differ.

A case is a function that builds a trainer, given the class to build: the stock trainer's own or the same with the mixin.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from integration import tiny
from torch import Tensor, nn
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_sam import SAMConfig, SAMTrainerMixin

VANISHING = SAMConfig(rho=1e-30)
Snapshot = dict[str, Any]


# --- what a run leaves -----------------------------------------------------------------------------------------------


class Observed(tiny.Watched):
    """A watched trainer that keeps, after every step, all that its modules hold.

    Attributes:
        snapshots (`list[Snapshot]`): Before the first step and after each one: parameters, buffers, and the tensors,
            numbers and generators that modules keep as plain attributes or in containers; of the model and of modules
            that hang on the trainer.
        randomness (`Snapshot`): The state of every generator when training had ended.
        evaluation (`dict[str, float]`): The metrics of an evaluation after training.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.snapshots: list[Snapshot] = []
        self.randomness: Snapshot = {}
        self.evaluation: dict[str, float] = {}
        self.add_callback(_Snapshots(self))


class _Snapshots(TrainerCallback):
    def __init__(self, trainer: Observed):
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self._trainer.snapshots.append(contents(self._trainer))

    on_step_end = on_train_begin

    def on_train_end(self, args, state, control, **kwargs):
        self._trainer.randomness = {
            "torch": torch.get_rng_state(),
            "numpy": np.random.get_state(),
            "python": random.getstate(),
        }


def contents(trainer: Trainer) -> Snapshot:
    """A copy of all that the modules of a trainer hold, by name, and of what else the optimizer steps."""
    held = {"model": trainer.model, **vars(trainer)}
    for name, value in vars(trainer).items():  # a loss for each data set
        if isinstance(value, dict):
            held |= {f"{name}.{key}": part for key, part in value.items()}
    modules = {name: value for name, value in held.items() if isinstance(value, nn.Module)}
    found: Snapshot = {}
    seen: set[int] = set()
    for root, module in modules.items():
        for path, part in module.named_modules(prefix=root):
            if id(part) in seen:
                continue
            seen.add(id(part))
            for name, value in {**part._parameters, **part._buffers, **vars(part)}.items():
                if name not in _INSIDE:
                    _note(found, f"{path}.{name}", value)
    return found


# Where `nn.Module` itself keeps things.
_INSIDE = frozenset(vars(nn.Module()))


def _note(found: Snapshot, name: str, value: Any) -> None:
    """Add what of `value` can change: tensors, numbers, states of generators, also those in containers."""
    if isinstance(value, Tensor):
        found[name] = value.detach().clone()
    elif isinstance(value, int | float):
        found[name] = value
    elif isinstance(value, torch.Generator):
        found[name] = value.get_state()
    elif isinstance(value, random.Random):
        found[name] = value.getstate()
    elif isinstance(value, np.random.Generator):
        found[name] = repr(value.bit_generator.state)
    elif isinstance(value, dict | list | tuple | deque):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            _note(found, f"{name}[{key}]", part)


# --- both kinds of run -----------------------------------------------------------------------------------------------


def classes(stock: type[Trainer]) -> tuple[type[Trainer], type[Trainer]]:
    """`stock` and the same with the mixin, both observed."""
    return type(f"Observed{stock.__name__}", (Observed, stock), {}), type(
        f"SAM{stock.__name__}", (Observed, SAMTrainerMixin, stock), {}
    )


def run(build: Callable[..., Trainer], cls: type[Trainer], **sam) -> Trainer:
    """Build a trainer with a fixed seed, train and, where it has data for that, evaluate it."""
    set_seed(2)
    trainer = build(cls, **sam)
    trainer.train()
    if trainer.eval_dataset is not None:
        trainer.evaluation = trainer.evaluate(metric_key_prefix="final")
    return trainer


def assert_same_as_stock(
    build: Callable[..., Trainer], stock: type[Trainer] = Trainer, *, sam: SAMConfig = VANISHING
) -> None:
    """Two passes with a vanishing rho leave bitwise what the stock trainer leaves.

    Args:
        build (`Callable`): Called as `build(cls)` for the stock trainer and as `build(cls, sam_config=...)` for ours; it
            returns a new trainer on new, identical objects.
        stock (`type`, *optional*, defaults to `Trainer`): The stock trainer's class.
        sam (`SAMConfig`, *optional*): At rho = 1e-30 by default.
    """
    plain, mixed = classes(stock)
    theirs = run(build, plain)
    ours = run(build, mixed, sam_config=sam)
    found = differences(ours, theirs)
    if found:
        again = differences(run(build, plain), theirs)
        remark = "the stock run does not repeat itself either" if again else "the stock run repeats itself"
        raise AssertionError("\n".join([f"{len(found)} differences ({remark}):", *found[:12]]))
    assert len(ours.passes) == 2 * len(theirs.passes) > 0, "this was no run of two passes"
    first, last = theirs.snapshots[0], theirs.snapshots[-1]
    assert any(not same(first[name], last.get(name)) for name in first), "nothing was trained"


def assert_first_entry_is_the_stock_trainers(
    build: Callable[..., Trainer], stock: type[Trainer] = Trainer, *, but: set[str] = frozenset()
) -> None:
    """With a perturbation that matters, what is logged first was still collected in the clean pass alone.

    A mean over both passes of a vanishing perturbation would hide what was collected twice.

    Args:
        build (`Callable`): As for `assert_same_as_stock`; to log its first entry after one step.
        stock (`type`, *optional*, defaults to `Trainer`): The stock trainer's class.
        but (`set[str]`, *optional*): Keys that come from the perturbed pass.
    """
    plain, mixed = classes(stock)
    theirs, ours = run(build, plain), run(build, mixed, sam_config=SAMConfig(rho=5.0))
    (mine, *_), (yours, *_) = logged(ours), logged(theirs)
    assert mine.keys() == yours.keys()
    found = [
        f"{key}: {told(mine[key], yours[key])}" for key in yours if key not in but and not same(mine[key], yours[key])
    ]
    assert not found, "\n".join(found)
    (perturbed,) = tiny.logged(ours, "sam_perturbed_loss")
    assert abs(perturbed - yours["loss"]) > 1e-4, "this perturbation does not matter"


def differences(ours: Observed, stock: Observed) -> list[str]:
    """One line for each thing in which two runs differ, in the order in which it went wrong."""
    lines = []
    if len(ours.snapshots) != len(stock.snapshots):
        lines.append(f"{len(ours.snapshots) - 1} steps, not {len(stock.snapshots) - 1}")
    for step, (mine, yours) in enumerate(zip(ours.snapshots, stock.snapshots, strict=False)):
        for name in [*yours, *(name for name in mine if name not in yours)]:
            if not same(mine.get(name), yours.get(name)):
                lines.append(f"after step {step}: {name}: {told(mine.get(name), yours.get(name))}")
    mine, yours = logged(ours), logged(stock)
    if len(mine) != len(yours):
        lines.append(f"{len(mine)} entries were logged, not {len(yours)}")
    for left, right in zip(mine, yours, strict=False):
        for key in [*right, *(key for key in left if key not in right)]:
            if not same(left.get(key), right.get(key)):
                lines.append(f"logged at step {right.get('step')}: {key}: {told(left.get(key), right.get(key))}")
    for what, mine, yours in (
        ("evaluation", without_runtimes(ours.evaluation), without_runtimes(stock.evaluation)),
        ("random state", ours.randomness, stock.randomness),
    ):
        for key in yours.keys() | mine.keys():
            if not same(mine.get(key), yours.get(key)):
                lines.append(f"{what}: {key}: {told(mine.get(key), yours.get(key))}")
    return lines


def logged(trainer: Trainer) -> list[dict[str, Any]]:
    """What was logged, without our own keys and without the time it took."""
    return [without_runtimes(entry) for entry in trainer.state.log_history]


def without_runtimes(entry: dict[str, Any]) -> dict[str, Any]:
    """Without our own keys, the time taken, and the operations counted, which the second pass doubles."""
    return {
        key: value
        for key, value in entry.items()
        if not key.startswith("sam_") and not key.endswith(("_runtime", "_per_second", "_time")) and key != "total_flos"
    }


def same(left: Any, right: Any) -> bool:
    """Whether both are bitwise the same; NaN is NaN."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return (
            left.dtype == right.dtype
            and left.shape == right.shape
            and torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))
            if left.dim()
            else left.dtype == right.dtype and same(left.item(), right.item())
        )
    if isinstance(left, np.ndarray) and isinstance(right, np.ndarray):
        return np.array_equal(left, right)
    if isinstance(left, tuple) and isinstance(right, tuple):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    if isinstance(left, float) and isinstance(right, float) and math.isnan(left) and math.isnan(right):
        return True
    return type(left) is type(right) and left == right


def told(mine: Any, yours: Any) -> str:
    """The difference in words short enough for a line."""
    if isinstance(mine, Tensor) and isinstance(yours, Tensor) and mine.shape == yours.shape and mine.numel():
        gap = (mine.double() - yours.double()).abs().max().item() if not mine.is_complex() else float("nan")
        return f"off by at most {gap:.3g} where values reach {yours.double().abs().max().item():.3g}"
    shown = [f"shape {tuple(v.shape)}" if isinstance(v, Tensor) else repr(v)[:60] for v in (mine, yours)]
    return f"{shown[0]}, not {shown[1]}"


# --- parts of cases --------------------------------------------------------------------------------------------------


def arguments(folder: Path | str, cls: type[TrainingArguments] = TrainingArguments, **overrides) -> TrainingArguments:
    """A run of three steps that evaluates after the second and logs each one."""
    defaults = {
        "output_dir": str(folder),
        "use_cpu": True,
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 3,
        "bf16": False,  # which TRL turns on by itself
    }
    return cls(**{**defaults, **overrides})


def checksums(prediction) -> dict[str, float]:
    """Metrics that depend on every number that a model predicts."""
    found: dict[str, float] = {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, dict):
            value = tuple(value.values())
        if isinstance(value, list | tuple):
            for i, part in enumerate(value):
                add(f"{name}_{i}", part)
        elif isinstance(value, np.ndarray) and value.dtype != object:
            found[name] = float(
                np.sum(np.asarray(value, dtype=np.float64) * (1 + np.arange(value.size)).reshape(value.shape))
            )

    add("predictions", prediction.predictions)
    return found


def arguments_of(trainer: type[Trainer]) -> type[TrainingArguments]:
    """The class of training arguments that a trainer of transformers takes."""
    return Seq2SeqTrainingArguments if issubclass(trainer, Seq2SeqTrainer) else TrainingArguments
