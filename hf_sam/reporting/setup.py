"""Set-up and provenance sections of a report: what was compared, and how."""

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

# The Trainer's arguments that can distinguish arms.
ARGUMENTS = {
    "optim": "optimizer",
    "learning_rate": "learning rate",
    "weight_decay": "weight decay",
    "lr_scheduler_type": "schedule",
    "per_device_train_batch_size": "batch",
    "gradient_accumulation_steps": "accumulation",
}


def setup_blocks(study: Study) -> list[Block]:
    """Describe arms, data, seeds, budgets and tuning, as far as the records contain them."""
    done = _done(study)
    facts = {
        "tasks": _span(cell.task for cell in study.cells),
        "conditions": _span((cell.condition for cell in study.cells), most=12),
        "seeds": _span((run.seed for run in done), most=20),
        "budgets": _span(BUDGETS.get(cell.budget, cell.budget) for cell in study.cells),
        "model": _told(done, "model", "name"),
        "architecture": _told(done, "model", "class"),
        "parameters": _told(done, "model", "parameters"),
        "trainable": _told(done, "model", "trainable_parameters"),
        "training examples": _told(done, "data", "train", "examples"),
        "test examples": _told(done, "data", "test", "examples"),
    }
    return [
        _arm_table(study, done),
        _facts(facts, "Common to all"),
        Text(
            "Runs with the same seed are pairs: every arm has the same initial weights, examples, order, wrong labels and test "
            "split. Differing fingerprints are listed under the limits. The test split is used once, at the last "
            "checkpoint. At equal passes, an arm with cheaper steps takes more of them."
        ),
    ]


def provenance_blocks(study: Study) -> list[Block]:
    """Describe software, hardware and dates."""
    done = _done(study)
    packages = ("python", "torch", "transformers", "hf-sam")
    versions = {name: _told(done, "environment", "packages", name) for name in packages}
    facts = {
        "software": ", ".join(f"{name} {version}" for name, version in versions.items() if version != NOTHING),
        "commit": _told(done, "environment", "git", "commit"),
        "accelerators": _told(done, "environment", "hardware", "accelerators"),
        "processors": _told(done, "environment", "hardware", "processors"),
        "processes": _told(done, "environment", "hardware", "processes"),
        "started": min((run.started for run in done if run.started), default=NOTHING),
        "ended": max((run.ended for run in done if run.ended), default=NOTHING),
    }
    return [_facts(facts, "Where and when the runs were made; each record has the details of its run")]


def _done(study: Study) -> list[RunRecord]:
    return [run for run in study.records if run.status == "finished" and not is_trial(run)]


def _facts(facts: dict[str, str], caption: str) -> Table:
    return Table(
        ["what", "value"], [[name, value] for name, value in facts.items() if value not in ("", NOTHING)], caption, 99
    )


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
    """Whether a SAM setting differs from the default that all methods share."""
    return any(sam.get(name) != DEFAULTS.get(name) for sam in sams)


def _told(runs: list[RunRecord], *path: str) -> str:
    """Format the distinct values of the records under `path`."""
    return _span(_dig(run, path) for run in runs)


def _dig(run: RunRecord, path: tuple[str, ...]) -> Any:
    value = getattr(run, path[0])
    for key in path[1:]:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _span(values: Iterable[Any], most: int = 6) -> str:
    """Format the distinct values in order."""
    texts = dict.fromkeys(_text(value) for value in values if value not in (None, "", []))
    shown = sorted(texts, key=natural)
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "") or NOTHING


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) and value >= 10_000 else str(value)
