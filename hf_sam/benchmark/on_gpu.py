"""
Measure the cost of a step of each method on the available GPU, in a few minutes.

    python -m hf_sam.benchmark.on_gpu --minutes 8 --output_dir outputs/bench-gpu

A cell is a model, a batch size and a precision. In each cell, all variants take the same steps from the same initial
state: a few to warm up, two under the profiler, five in which the passes are timed separately, and then the timed
steps, in turns. `bench.json` and `bench.md` are rewritten after every cell. When the time is up, or on SIGTERM or
Ctrl-C, the results so far are kept and the remaining cells are listed.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import transformers
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import TrainingArguments, set_seed

from .counting import PassClock
from .gpu_cells import AUTOCAST, COMPILED, MODELS, PURE, TF32, Cell, cells
from .gpu_page import page
from .measure import Measurement, turns
from .stepping import SteppedTrainer, stepped_trainer
from .variants import STOCK, VARIANTS, Variant

NAMES = ("trainer", "hand-loop", "pytorch-optimizer", "sam", "asam", "gsam", "looksam", "msam", "periodic", "previous")
WARMUP, PROFILED, SPLIT = 5, 2, 5  # steps before the timed ones; the schedules' period is 5
BLOCK, SLOW = 5, 0.3  # steps per turn, and seconds per step above which there is only one turn
WHEN_COMPILED = ("trainer", "hand-loop", "sam")  # few, since each is compiled separately
ENDING = 10.0  # seconds of `--minutes` reserved for the end
# The profiler's names for launches of kernels and copies, and for waits for the device. On the CPU, these are dispatched
# operations, and reads of numbers from tensors.
LAUNCHES = re.compile(r"(cuda|cu|hip)(Ext)?(Module)?(LaunchKernel|GraphLaunch|MemcpyAsync|MemsetAsync)|aten::")
SYNCHRONISATIONS = re.compile(
    r"(cuda|cu|hip)(Stream|Event|Device|Ctx)Synchronize|(cuda|hip)Memcpy$|aten::_local_scalar_dense$"
)
COUNTED = {"launches": LAUNCHES, "synchronisations": SYNCHRONISATIONS}


class Stop(BaseException):
    """The time is up, or the process received a signal to stop."""


# --- one variant -------------------------------------------------------------------------------------------------------


def build(cell: Cell, variant: Variant, model: Any, example: dict[str, Tensor], device: str) -> SteppedTrainer:
    """A prepared trainer that repeats one batch, which is on the device."""
    is_compiled = cell.precision == COMPILED
    for name in [name for name in os.environ if name.startswith("ACCELERATE_DYNAMO_")]:
        del os.environ[name]  # left over from the arguments of a compiled cell
    torch.set_float32_matmul_precision("high" if cell.precision == TF32 else "highest")
    args = TrainingArguments(
        tempfile.gettempdir(),  # required, but unused
        use_cpu=device == "cpu",
        bf16=cell.precision in (AUTOCAST, COMPILED),
        torch_compile=is_compiled,
        torch_compile_backend=("eager" if device == "cpu" else "inductor") if is_compiled else None,
        per_device_train_batch_size=cell.batch_size,
        max_steps=1000,
        learning_rate=1e-5,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=1,
    )
    args._n_gpu = min(args.n_gpu, 1)
    set_seed(1)
    model = copy.deepcopy(model).to(torch.bfloat16 if cell.precision == PURE else torch.float32)
    if cell.precision == PURE and "pixel_values" in example:
        example = example | {"pixel_values": example["pixel_values"].bfloat16()}
    trainer = stepped_trainer(variant, model=model, args=args, train_dataset=[example] * cell.batch_size)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.prepare()
    trainer._batches = itertools.repeat(next(trainer._batches))  # collating is not measured
    return trainer


def profiled(step: Callable[[], None], clock: Any, device: str) -> dict[str, int]:
    """Number of launches and waits in one step, from the profiler."""
    kind = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    clock.wait()
    clock.watch = watch = profile(activities=[kind])
    step()
    clock.watch = None
    table = watch.key_averages()
    return {name: sum(row.count for row in table if pattern.match(row.key)) for name, pattern in COUNTED.items()}


class EmptyStep:
    """An empty step, to measure the launches and waits of the profiler itself."""

    def __init__(self, clock: Any):
        self._clock = clock

    def __call__(self) -> None:
        self._clock.start()
        self._clock.stop()


def inspect_step(cell: Cell, variant: Variant, trainer: SteppedTrainer, before: int, device: str) -> dict[str, Any]:
    """
    Counts of one step, its peak memory, and the time outside its passes, after a warm-up.

    Args:
        before (`int`): Bytes allocated before this trainer was built.
    """
    trainer.take_steps(WARMUP)
    own = profiled(EmptyStep(trainer.clock), trainer.clock, device)
    counts = [profiled(lambda: trainer.take_steps(1), trainer.clock, device) for _ in range(PROFILED)]
    row: dict[str, Any] = {
        name: weighted(variant, WARMUP, [max(0, count[name] - own[name]) for count in counts], np.mean)
        for name in COUNTED
    }
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    outside, whole = [], []
    for _ in range(SPLIT):
        if cell.precision == COMPILED:  # hooks would break the graph
            trainer.take_steps(1)
            continue
        with PassClock(trainer) as passes:
            trainer.take_steps(1)
        whole.append(trainer.clock.seconds[-1])
        outside.append(whole[-1] - passes.seconds)
    if whole:
        row["outside"] = weighted(variant, WARMUP + PROFILED, outside, np.median)
        row["watched_step"] = weighted(variant, WARMUP + PROFILED, whole, np.median)
    row["peak_memory"] = torch.cuda.max_memory_allocated() - before if device == "cuda" else None
    return row


def weighted(variant: Variant, first: int, values: Sequence[float], average: Callable) -> float:
    """The averages of perturbed and plain steps, weighted by their fractions in a long run."""
    kinds, share = np.array(variant.perturbs(first + len(values))[first:]), variant.share_perturbed
    parts = ((share, np.array(values)[kinds]), (1 - share, np.array(values)[~kinds]))
    return float(sum(weight * average(part) for weight, part in parts if weight))


# --- one cell ----------------------------------------------------------------------------------------------------------


def run_cell(cell: Cell, variants: Sequence[Variant], device: str, steps: int) -> list[dict[str, Any]]:
    """One row per variant. If memory runs out, the group is repeated with two variants at a time."""
    set_seed(0)
    try:
        model, example = MODELS[cell.model].build(device == "cpu")
    except ImportError as error:
        return [{"variant": c.name, "problem": f"{error.name} is not installed"} for c in variants]
    if cell.precision == COMPILED:
        variants = [variant for variant in variants if variant.name in WHEN_COMPILED]
    rows: dict[str, dict[str, Any]] = {}
    size = MODELS[cell.model].at_once - 1
    others = [variant for variant in variants if variant != STOCK]
    while others:
        group, others = others[:size], others[size:]
        try:
            found = run_group(cell, [STOCK, *group], model, example, device, steps)
        except torch.OutOfMemoryError:
            if size > 1:
                others, size = [*group, *others], 1
                continue
            found = {name: {"problem": "out of memory"} for name in (STOCK.name, group[0].name)}
        finally:
            gc.collect()
            torch.compiler.reset()
            if device == "cuda":
                torch.cuda.empty_cache()
        rows = {**found, **rows} if STOCK.name in rows and "problem" not in rows[STOCK.name] else {**rows, **found}
    return [{"variant": c.name} | rows[c.name] for c in variants]


def run_group(
    cell: Cell, group: Sequence[Variant], model: Any, example: dict[str, Tensor], device: str, steps: int
) -> dict[str, dict[str, Any]]:
    """The rows of the variants in memory at the same time; the stock Trainer is first."""
    trainers, rows = {}, {}
    for variant in group:
        before = torch.cuda.memory_allocated() if device == "cuda" else 0
        try:
            trainer = build(cell, variant, model, example, device)
            rows[variant.name] = inspect_step(cell, variant, trainer, before, device)
        except ValueError as error:
            rows[variant.name] = {"problem": " ".join(str(error).split())}
        else:
            trainers[variant.name] = trainer
    first = WARMUP + PROFILED + SPLIT
    steps = min(steps, BLOCK) if max(trainer.clock.seconds[-1] for trainer in trainers.values()) > SLOW else steps
    for trainer in trainers.values():
        trainer.clock.seconds.clear()
    for name, count in turns(list(trainers), steps, BLOCK, seed=0):
        trainers[name].take_steps(count)
    stock = trainers[STOCK.name].clock.seconds
    for variant in (variant for variant in group if variant.name in trainers):
        timed = Measurement(
            variant,
            seconds=trainers[variant.name].clock.seconds,
            perturbed=variant.perturbs(first + steps)[first:],
            stock_seconds=stock,
        )
        row = rows[variant.name]
        low, high = timed.ratio_interval(np.random.default_rng(0))
        row |= {"passes": variant.expected_passes, "ratio": timed.ratio(), "ratio_low": low, "ratio_high": high}
        row |= {f"seconds_{at}": timed.step_seconds(at / 100) for at in (25, 50, 75)}
        if "outside" in row:
            row["bookkeeping"] = (row["outside"] - rows[STOCK.name]["outside"]) / row["watched_step"]
        trainers[variant.name].close()
    return rows


# --- all cells ---------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None, age: float = 0.0) -> int:
    """
    Measure all cells within the time limit.

    Args:
        argv (`Sequence[str]`, *optional*, defaults to `sys.argv[1:]`): The command line.
        age (`float`, *optional*, defaults to 0): Seconds already used.

    Returns:
        `int`: The exit status.
    """
    began = time.monotonic() - age
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].strip())
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="Limit of the wall-clock time, including start and end."
    )
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/bench-gpu"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run with tiny models.")
    parser.add_argument("--only", default="", help="Measure only cells whose name matches this regular expression.")
    parser.add_argument("--variants", nargs="+", default=NAMES, choices=list(VARIANTS), metavar="NAME")
    parser.add_argument("--steps", type=int, default=15, help="Timed steps per variant, at least 5.")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("No CUDA device is available. Use --device cpu for a dry run.", file=sys.stderr)
        return 1
    variants = [STOCK, *(VARIANTS[name] for name in options.variants if name != STOCK.name)]
    left = [cell for cell in cells(options.device == "cpu") if re.search(options.only, str(cell))]
    document = {"environment": environment(options.device), "minutes": options.minutes, "cells": [], "left_out": []}
    transformers.utils.logging.set_verbosity_error()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    status, reason = 0, "all cells were measured"

    def stop(number: int, frame: Any) -> None:
        raise Stop(number)

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGINT)}
    try:
        signal.setitimer(signal.ITIMER_REAL, max(1.0, 60 * options.minutes - ENDING - (time.monotonic() - began)))
        while left:
            print(f"{time.monotonic() - began:4.0f} s  {left[0]}", flush=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                rows = run_cell(left[0], variants, options.device, options.steps)
            document["cells"].append(asdict(left.pop(0)) | {"rows": rows})
            write(document, options.output_dir, began, left, "still running")
    except Stop as error:
        number = signal.Signals(error.args[0])
        reason = "the time was up" if number == signal.SIGALRM else f"ended by {number.name}"
        status = 0 if number == signal.SIGALRM else 128 + number
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    write(document, options.output_dir, began, left, reason)
    print(f"{reason}: {len(document['cells'])} cells in {options.output_dir}, {len(left)} left out")
    return status


def environment(device: str) -> dict[str, Any]:
    """The GPU and software versions."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU, tiny models: a dry run",
        "memory": torch.cuda.get_device_properties(0).total_memory if device == "cuda" else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "python": sys.version.split()[0],
    }


def write(document: dict[str, Any], folder: Path, began: float, left: Sequence[Cell], reason: str) -> None:
    """Write both files atomically, so that they are complete whenever the process ends."""
    document |= {"seconds": round(time.monotonic() - began, 1), "left_out": [str(c) for c in left], "end": reason}
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("bench.json", json.dumps(document, indent=1)), ("bench.md", page(document))):
        beside = folder / f".{name}.{random.getrandbits(32):08x}"
        beside.write_text(text + "\n", encoding="utf-8")
        beside.replace(folder / name)


if __name__ == "__main__":
    sys.exit(main(age=time.time() - psutil.Process().create_time()))
