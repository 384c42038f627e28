"""What was compared and how: the set-up section of a report."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..config import DEFAULTS
from ..experiments.plan import BUDGETS
from ..experiments.records import RunRecord
from .document import Block, Table, Text
from .formatting import NOTHING
from .results import count_trials, is_trial, natural, uses_sam
from .study import Study

# What distinguishes arms, as far as the Trainer's own arguments go.
ARGUMENTS = {
    "optim": "optimizer",
    "learning_rate": "learning rate",
    "weight_decay": "weight decay",
    "lr_scheduler_type": "schedule",
    "per_device_train_batch_size": "batch",
    "gradient_accumulation_steps": "accumulation",
}


def setup_blocks(study: Study) -> list[Block]:
    """Arms, data, seeds, budgets, tuning, software and hardware, each as far as the records say."""
    done = [run for run in study.records if run.status == "finished" and not is_trial(run)]
    return [
        _arm_table(study, done),
        Table(["what", "value"], _fact_rows(study, done), "Common to all", 99),
        Text(
            "Runs with the same seed are pairs: the same initial weights, examples, order, wrong labels and test split "
            "for every arm. Where the fingerprints in the records say otherwise, it is listed under the threats. The "
            "test split is read once, at the last checkpoint. A pass is one gradient of the whole effective batch; "
            "at equal passes an arm with cheaper steps takes as many more of them."
        ),
    ]


def _arm_table(study: Study, done: list[RunRecord]) -> Table:
    columns = ["arm", "method", *ARGUMENTS.values(), "other SAM settings", "tuning trials"]
    rows, counted = [], count_trials(study.records)
    for arm in study.arms:
        runs = [run for run in done if run.arm == arm]
        sams = [run.config["sam"] for run in runs if uses_sam(run)]
        settings = [name for name in dict.fromkeys(key for sam in sams for key in sam) if name not in ("method", "rho")]
        others = [f"{name} {_span(sam.get(name) for sam in sams)}" for name in settings if _matters(name, sams)]
        method = _span(sam.get("method") for sam in sams)
        rho = _span(sam.get("rho") for sam in sams)
        trials = _span(counted.get(arm, {0}))
        arguments = [run.config.get("training_arguments") or {} for run in runs]
        rows.append(
            [arm, method if rho == NOTHING else f"{method}, rho {rho}"]
            + [_span(values.get(name) for values in arguments) for name in ARGUMENTS]
            + [", ".join(others) or NOTHING, trials]
        )
    told = [index for index in range(len(columns)) if any(row[index] != NOTHING for row in rows)]
    return Table([columns[index] for index in told], [[row[index] for index in told] for row in rows], "Arms", 99)


def _matters(name: str, sams: list[dict[str, Any]]) -> bool:
    """Whether a SAM setting is anything but the default that every method has."""
    return any(sam.get(name) != DEFAULTS.get(name) for sam in sams)


def _fact_rows(study: Study, done: list[RunRecord]) -> list[list[str]]:
    def span(*path: str) -> str:
        return _span(_dig(run, path) for run in done)

    packages = ("python", "torch", "transformers", "hf-sam")
    facts = {
        "tasks": _span(cell.task for cell in study.cells),
        "conditions": _span((cell.condition for cell in study.cells), most=12),
        "seeds": _span((run.seed for run in done), most=20),
        "budgets": _span(BUDGETS.get(cell.budget, cell.budget) for cell in study.cells),
        "model": span("model", "name"),
        "architecture": span("model", "class"),
        "parameters": span("model", "parameters"),
        "trainable": span("model", "trainable_parameters"),
        "training examples": span("data", "train", "examples"),
        "test examples": span("data", "test", "examples"),
        "software": ", ".join(f"{name} {span('environment', 'packages', name)}" for name in packages),
        "commit": span("environment", "git", "commit"),
        "accelerators": span("environment", "hardware", "accelerators"),
        "processors": span("environment", "hardware", "processors"),
        "processes": span("environment", "hardware", "processes"),
        "started": min((run.started for run in done if run.started), default=NOTHING),
        "ended": max((run.ended for run in done if run.ended), default=NOTHING),
    }
    return [[name, value] for name, value in facts.items()]


def _dig(run: RunRecord, path: tuple[str, ...]) -> Any:
    value = getattr(run, path[0])
    for key in path[1:]:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _span(values: Iterable[Any], most: int = 6) -> str:
    """The distinct values, in order, in words."""
    texts = dict.fromkeys(_text(value) for value in values if value not in (None, "", []))
    shown = sorted(texts, key=natural)
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "") or NOTHING


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) and value >= 10_000 else str(value)
