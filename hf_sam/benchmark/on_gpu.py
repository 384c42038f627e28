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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import transformers
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from .counting import PassClock
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


# --- models ------------------------------------------------------------------------------------------------------------


def vit(tiny: bool, hidden: int, heads: int, patch: int) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    size = {
        "hidden_size": hidden,
        "num_hidden_layers": 12,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
    }
    if tiny:
        size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    side = 2 * patch if tiny else 224
    model = ViTForImageClassification(ViTConfig(**size, image_size=side, patch_size=patch, num_labels=10))
    return model, {"pixel_values": torch.randn(3, side, side), "labels": torch.tensor(1)}


def bert(tiny: bool) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    size = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 1536}
    if tiny:
        size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertForSequenceClassification(BertConfig(**size, vocab_size=64 if tiny else 30522, num_labels=10))
    ids = torch.randint(1, 64, (8 if tiny else 128,))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor(1)}


def llama(tiny: bool, lora: bool) -> tuple[Any, dict[str, Tensor]]:
    """A Llama of 0.5 billion parameters with tied embeddings."""
    size = {"hidden_size": 1024, "num_hidden_layers": 30, "num_attention_heads": 16, "num_key_value_heads": 8}
    size |= {"intermediate_size": 4096, "vocab_size": 32000}
    if tiny:
        size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
        size |= {"intermediate_size": 16, "vocab_size": 64}
    model = LlamaForCausalLM(LlamaConfig(**size, tie_word_embeddings=True, use_cache=False))
    if lora:
        from peft import LoraConfig, get_peft_model

        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        model = get_peft_model(model, LoraConfig(r=8, target_modules=targets, init_lora_weights=False))
    ids = torch.randint(1, 64, (8 if tiny else 512,))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


@dataclass(frozen=True)
class Model:
    """
    A model to measure.

    Args:
        build (`Callable`): Returns the model and one example; the argument says whether the model should be tiny.
        batches (`tuple[int, int]`): A batch size that leaves a large GPU partly idle, and one that fills it.
        home (`str`): The precision in which the model is usually trained; its cells come first.
        at_once (`int`): Number of variants in memory at the same time.
    """

    build: Callable[[bool], tuple[Any, dict[str, Tensor]]]
    batches: tuple[int, int]
    home: str
    at_once: int = len(NAMES)


AUTOCAST, TF32, PURE, COMPILED = "bf16 autocast", "fp32 with TF32", "pure bf16", "bf16 autocast, compiled"
PRECISIONS = (AUTOCAST, TF32, PURE, COMPILED)
MODELS: dict[str, Model] = {
    "ViT-S/14": Model(lambda tiny: vit(tiny, 384, 6, 14), (8, 128), AUTOCAST),
    "ViT-B/16": Model(lambda tiny: vit(tiny, 768, 12, 16), (8, 128), AUTOCAST),
    "MiniLM": Model(bert, (8, 256), TF32),
    "Llama 0.5B, LoRA": Model(lambda tiny: llama(tiny, True), (1, 16), PURE, 5),
    "Llama 0.5B": Model(lambda tiny: llama(tiny, False), (1, 16), AUTOCAST, 4),
}


@dataclass(frozen=True)
class Cell:
    """One setting; `fills` says whether the batch is meant to fill the GPU."""

    model: str
    precision: str
    batch_size: int
    fills: bool

    def __str__(self) -> str:
        return f"{self.model}, {self.precision}, batch {self.batch_size}"


def cells(tiny: bool) -> list[Cell]:
    """All cells: first every model in its home precision, then the first model in the others, then the rest."""
    found = []
    for (name, model), precision, fills in itertools.product(MODELS.items(), PRECISIONS, (True, False)):
        batch_size = 2 + fills if tiny else model.batches[fills]
        rank = 0 if precision == model.home else 1 if name == next(iter(MODELS)) else 2
        found.append((rank, Cell(name, precision, batch_size, fills)))
    return [cell for _, cell in sorted(found, key=lambda entry: entry[0])]


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


HEAD = ("variant", "step (ms), quartiles", "ratio, 95 %", "passes", "peak (MiB)", "launches", "synchronisations")
HEAD += ("bookkeeping",)


def page(document: dict[str, Any]) -> str:
    """The report in Markdown: a summary, then one table per cell."""
    made, where = document["cells"], document["environment"]
    lines = [f"# What a step costs on {where['device']}", "", *summary(made), ""]
    for cell in made:
        fills = "fills the card" if cell["fills"] else "leaves it idle"
        title = f"{cell['model']}, {cell['precision']}, batch {cell['batch_size']} ({fills})"
        lines += [f"## {title}", "", f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|", *map(line, cell["rows"]), ""]
    lines.append(
        "Medians of interleaved steps with quartiles; the ratio is to the stock Trainer's steps in the same turns. Launches are "
        "kernels, copies and fills that the host starts, synchronisations are its waits, both by the profiler in one step "
        "(perturbed and plain ones weighted by the schedule). Bookkeeping is the time outside of forward and backward passes "
        "beyond the stock step's, as a share of the step, with the device waited for around every pass."
    )
    versions = ", ".join(f"{name} {where[name]}" for name in ("torch", "cuda", "transformers", "python") if where[name])
    lines += ["", f"{versions}; {document['seconds']:.0f} s, {document['end']}."]
    if document["left_out"]:
        lines += ["", f"Left out: {'; '.join(document['left_out'])}."]
    return "\n".join(lines)


def line(row: dict[str, Any]) -> str:
    if "problem" in row:
        return f"| {row['variant']} | {row['problem']} |" + " |" * (len(HEAD) - 2)
    low, median, high = (1e3 * row[f"seconds_{at}"] for at in (25, 50, 75))
    cells_ = [
        row["variant"],
        f"{median:.2f} [{low:.2f}, {high:.2f}]",
        f"{row['ratio']:.3f} [{row['ratio_low']:.3f}, {row['ratio_high']:.3f}]",
        f"{row['passes']:.2f}",
        "" if row["peak_memory"] is None else f"{row['peak_memory'] / 2**20:.0f}",
        f"{row['launches']:.0f}",
        f"{row['synchronisations']:.1f}",
        f"{row['bookkeeping']:.1%}" if "bookkeeping" in row else "",
    ]
    return f"| {' | '.join(cells_)} |"


def summary(made: Sequence[dict[str, Any]]) -> list[str]:
    """A short summary of the worst ratios."""
    lines = []
    for name, fills, what in (
        ("sam", True, "where the batch fills the card"),
        ("sam", False, "where it does not"),
        ("hand-loop", True, "where the batch fills the card"),
        ("hand-loop", False, "where it does not"),
        ("msam", None, "in any cell"),
        ("previous", None, "in any cell"),
    ):
        rows = [
            (row, cell)
            for cell in made
            for row in cell["rows"]
            if row["variant"] == name and "ratio" in row and fills in (None, cell["fills"])
        ]
        if rows:
            row, cell = max(rows, key=lambda entry: entry[0]["ratio"])
            where = f"{cell['model']}, {cell['precision']}, batch {cell['batch_size']}"
            lines.append(f"- `{name}` costs at most {row['ratio']:.3f} stock steps {what} ({where}).")
    return lines


if __name__ == "__main__":
    sys.exit(main(age=time.time() - psutil.Process().create_time()))
