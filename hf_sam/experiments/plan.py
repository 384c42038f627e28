"""The plan of a comparison, its runs (arms x conditions x seeds x budgets), and the trials that tune each arm."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a plan is read and checked without importing torch
    from ..baselines.averaging import WeightAveraging
    from ..baselines.entropy_sgd import EntropySGD
    from ..config import SAMConfig

TUNING = "tuning"  # prefix of a trial's budget; trials are counted in the report's setup, but never compared
BUDGETS = {"steps": "equal steps", "passes": "equal passes"}  # a pass: one gradient of the whole effective batch
AVERAGE_KEYS = ("average", "average_start", "average_decay")  # of an arm; all other keys are passed to the recipe
AVERAGES = ("swa", "ema", "entropy-sgd")
SEED_KEYS = ("seed", "subset_seed", "noise_seed")  # set to the run's seed, the same for every arm
# Settings that a study sets for each run, and the key of the plan that they come from.
OF_THE_STUDY = {
    **dict.fromkeys(SEED_KEYS, "seeds"),
    **dict.fromkeys(("save_strategy", "save_steps"), "checkpoint_every"),
    **{"output_dir": "output_dir", "task": "tasks", "condition": "conditions", "arm": "arms", "budget": "budgets"},
}


@dataclass(frozen=True)
class Question:
    """
    The question of a comparison, fixed before its results are known.

    Args:
        control (`str`): The arm that all others are compared with.
        treatment (`str`): The arm that the one-sentence answer is about.
        metric (`str`): The metric to compare.
        margin (`float`, *optional*):
            The smallest difference that matters, in the unit in which the metric is displayed (points of accuracy). An
            effect shown to be smaller counts as no difference.
    """

    control: str
    treatment: str
    metric: str
    margin: float | None = None


@dataclass(frozen=True)
class Tuning:
    """
    How the settings of each arm are tuned.

    Args:
        trials (`int`): Number of trials, the same for every arm.
        space (`dict`): Search space of every arm: setting to `{low, high, log, int}` or to a list of choices.
        spaces (`dict`, *optional*): Search spaces of single arms, in addition to `space`; on conflict, these win.
        validation_size (`float`, *optional*, defaults to 0.2): Fraction of the training data that trials are scored on.
        seed (`int`, *optional*, defaults to 1000): Seed of the trials' runs and of the search.
        parallel (`int`, *optional*, defaults to 1):
            Number of trials of one arm (in one task, condition and budget) that may run at the same time. With more
            than one, the settings of a trial depend on which results were known when it started.
        storage (`str`, *optional*): URL of a database for optuna's trials, instead of a file in the output folder.
    """

    trials: int
    space: dict[str, Any]
    spaces: dict[str, dict[str, Any]] = field(default_factory=dict)
    validation_size: float = 0.2
    seed: int = 1000
    parallel: int = 1
    storage: str | None = None

    def of(self, arm: str) -> dict[str, Any]:
        """The search space of `arm`."""
        return {**self.space, **self.spaces.get(arm, {})}


@dataclass(frozen=True)
class Plan:
    """
    A comparison, as its YAML file defines it.

    Args:
        name (`str`): Title of the report.
        output_dir (`Path`): Folder for all outputs.
        tasks (`dict[str, dict]`): Task to `{recipe, config, settings}`.
        arms (`dict[str, dict]`): Arm to the settings it overrides; `average: swa` or `ema` averages the weights.
        conditions (`dict[str, dict]`): Condition, such as label noise, to the settings it overrides.
        seeds (`list[int]`): Seeds; every arm runs once with each.
        budgets (`list[str]`): `"steps"`, `"passes"` or both.
        settings (`dict`): Settings of every run.
        question (`Question`): The question to answer.
        tuning (`Tuning` or `None`): How settings are tuned; `None` for no tuning.
        checkpoint_every (`int` or `None`): Steps between checkpoints, from which a killed run resumes.
        keep_models (`bool`): Keep the trained weights on disk.
        sharpness (`dict` or `None`): Arguments of `hf-sam sharpness`, to measure every trained model; `true` uses the
            defaults.
        survival (`dict` or `None`): Fields of `SurvivalConfig`, to measure every trained model; `true` uses the
            defaults.
        launcher (`list[str]`): Command that starts each run, such as `["accelerate", "launch"]`; empty for this Python.
        executor (`dict`): Where runs execute: `{kind: local, ray or slurm}`, and the options of each kind under its
            name.
        reference_passes (`float` or `None`):
            Passes per step that the budget `"passes"` grants; those of the most expensive arm if `None`.
    """

    name: str
    output_dir: Path
    tasks: dict[str, dict[str, Any]]
    arms: dict[str, dict[str, Any]]
    question: Question
    conditions: dict[str, dict[str, Any]] = field(default_factory=lambda: {"clean": {}})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    budgets: list[str] = field(default_factory=lambda: ["steps"])
    settings: dict[str, Any] = field(default_factory=dict)
    tuning: Tuning | None = None
    checkpoint_every: int | None = None
    keep_models: bool = False
    sharpness: dict[str, Any] | None = None
    survival: dict[str, Any] | None = None
    launcher: list[str] = field(default_factory=list)
    reference_passes: float | None = None
    executor: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One run of the plan, with its cost relative to the base recipe at one pass per step."""

    task: str
    condition: str
    budget: str
    arm: str
    seed: int
    cost: float
    stretch: float  # its number of steps, as a multiple of the base recipe's
    trial: int | None = None

    @property
    def group(self) -> tuple[str, str, str, str]:
        """The key of the runs that are tuned together."""
        return self.task, self.condition, self.budget, self.arm

    @cached_property
    def folder(self) -> Path:
        """The run's folder, relative to `output_dir`."""
        last = f"seed-{self.seed}" if self.trial is None else f"trial-{self.trial:03d}"
        return Path("runs" if self.trial is None else "trials", *map(slug, self.group), last)


# --- weight averaging of an arm ------------------------------------------------------------------------------------


def averaging_of(arm: Mapping[str, Any]) -> WeightAveraging | EntropySGD | None:
    """
    The callback for an arm's weight averaging: `swa`, `ema`, or `entropy-sgd` with the settings of its paper.

    Raises:
        ValueError: A setting is invalid.
    """
    values = averaging_values(arm)
    if not values:
        return None
    from ..baselines.averaging import WeightAveraging
    from ..baselines.entropy_sgd import EntropySGD

    kind = values.pop("average")
    return EntropySGD() if kind == "entropy-sgd" else WeightAveraging(kind, **values)


def averaging_values(arm: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `WeightAveraging` from the arm's keys, checked as far as possible without importing torch."""
    values = {key.removeprefix("average_"): arm[key] for key in AVERAGE_KEYS if key in arm}
    if not values:
        return {}
    require("average" in values, f"{', '.join(key for key in arm if key in AVERAGE_KEYS)} is used only with average.")
    kind = values["average"]
    require(kind in AVERAGES, f"average={kind!r} is unknown. Allowed: {', '.join(AVERAGES)}.")
    require(
        kind != "entropy-sgd" or len(values) == 1,
        f"average={kind} does not use {', '.join(f'average_{key}' for key in values if key != 'average')}. Remove it.",
    )
    return values


def require(condition: Any, message: str) -> None:
    """Raise `ValueError` with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def slug(name: str) -> str:
    """`name` as the name of a folder."""
    return re.sub(r"[^A-Za-z0-9.+=-]+", "-", name).strip("-.").lower() or "x"


# --- the runs ------------------------------------------------------------------------------------------------------


def mean_passes(config: SAMConfig, steps: int, warmup_steps: int = 0) -> float:
    """Mean number of gradient evaluations per optimizer step in a run of `steps` steps under `config`."""
    from ..update.schedule import Schedule

    if config.rho == 0:
        return 1.0
    return sum(map(Schedule.resolve(config, steps, warmup_steps).passes, range(steps))) / steps


def final_runs(plan: Plan, passes: Callable[[str, str], float]) -> list[Run]:
    """
    The runs that the report is based on, ordered by seed, so that complete pairs finish first.

    Args:
        plan (`Plan`): The comparison.
        passes (`Callable[[str, str], float]`): Mean number of passes per optimizer step of a task and an arm.
    """
    runs = []
    for task in plan.tasks:
        per_step = {arm: passes(task, arm) for arm in plan.arms}
        reference = plan.reference_passes or max(per_step.values())
        for condition in plan.conditions:
            for arm, count in per_step.items():
                for budget, stretch in _stretches(plan.budgets, reference / count):
                    for seed in plan.seeds:
                        runs.append(Run(task, condition, budget, arm, seed, count * stretch, stretch))
    return sorted(runs, key=lambda run: plan.seeds.index(run.seed))


def _stretches(budgets: Sequence[str], ratio: float) -> Iterator[tuple[str, float]]:
    """Each budget with its multiple of the base recipe's steps; one run serves both budgets if they coincide."""
    if len(budgets) > 1 and abs(ratio - 1) < 1e-9:
        yield "+".join(BUDGETS), 1.0
        return
    for budget in budgets:
        yield budget, 1.0 if budget == "steps" else ratio


def trial_runs(plan: Plan, run: Run) -> list[Run]:
    """The trials that tune the group of `run`."""
    tuning = plan.tuning
    return [Run(*run.group, tuning.seed, run.cost, run.stretch, trial) for trial in range(tuning.trials)]


def settings_of(plan: Plan, run: Run, tuned: Mapping[str, Any], length: Mapping[str, Any]) -> dict[str, Any]:
    """
    The settings that a run passes to its recipe.

    Args:
        plan (`Plan`): The comparison.
        run (`Run`): One of its runs.
        tuned (`Mapping`): The tuned settings, or those that a trial tries.
        length (`Mapping`): `max_steps` or `num_train_epochs` of the base recipe under this arm.
    """
    from .method_settings import merge

    settings = {
        **merge([*layers_of(plan, run.task, run.condition, run.arm), ("tuning", tuned)]).values,
        **stretched(length, run.stretch),
        **dict.fromkeys(SEED_KEYS, run.seed),
        "task": run.task,
        "condition": run.condition,
        "arm": run.arm,
        "budget": run.budget if run.trial is None else f"{TUNING} {run.budget}",
        "disable_tqdm": True,
        "report_to": "none",
        "resume_from_checkpoint": "auto",
        **saving(plan),
    }
    if run.trial is not None:
        settings |= {"validation_size": plan.tuning.validation_size, "score_split": "validation"}
    return settings


def saving(plan: Plan) -> dict[str, Any]:
    """The settings that say when a run saves a checkpoint."""
    if not plan.checkpoint_every:
        return {"save_strategy": "no"}
    return {"save_strategy": "steps", "save_steps": plan.checkpoint_every, "save_total_limit": 1}


def layers_of(plan: Plan, task: str, condition: str, arm: str) -> list[tuple[str, dict[str, Any]]]:
    """The plan's settings of a run as named layers, in increasing precedence."""
    return [
        ("settings of the study", plan.settings),
        (f"task {task}", plan.tasks[task].get("settings") or {}),
        (f"condition {condition}", plan.conditions[condition]),
        (f"arm {arm}", {key: value for key, value in plan.arms[arm].items() if key not in AVERAGE_KEYS}),
    ]


def stretched(length: Mapping[str, Any], stretch: float) -> dict[str, Any]:
    """The length of a run, multiplied by `stretch` and rounded down to whole steps."""
    if stretch == 1:
        return dict(length)
    return {
        key: int(value * stretch + 1e-9) if key == "max_steps" else value * stretch for key, value in length.items()
    }


def command_line(config: str | None, settings: Mapping[str, Any], output_dir: Path) -> list[str]:
    """The command-line arguments of a recipe."""
    words = [config] if config else []
    for key, value in {**settings, "output_dir": str(output_dir)}.items():
        if value is None:
            continue
        if isinstance(value, (list, tuple)):
            words += [f"--{key}", *map(str, value)]
        else:
            text = json.dumps(value) if isinstance(value, (dict, bool)) else str(value)
            words.append(f"--{key}={text}")
    return words


def changed_settings(made: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """
    The settings in which two jobs of a run differ. Its folder and its base configuration may have been moved, but the
    latter not edited; a job of an earlier release does not know what was in it.
    """
    words = set(map(str, made["argv"])) ^ set(map(str, now["argv"]))
    edited: set[str] = set()
    if "base" in made and "base" in now:
        edited = {key for key, _ in made["base"].items() ^ now["base"].items()}
        words -= {job["argv"][0] for job in (made, now) if job["base"]}
    return [*sorted(edited), *sorted(word for word in words if not word.startswith("--output_dir="))]


def describe(plan: Plan) -> dict[str, Any]:
    """The parts of the plan that the report needs, as JSON."""
    return {
        "name": plan.name,
        "question": asdict(plan.question),
        "arms": list(plan.arms),
        "seeds": plan.seeds,
        "budgets": plan.budgets,
        "trials": plan.tuning.trials if plan.tuning else 0,
    }
