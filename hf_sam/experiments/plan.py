"""The plan of a comparison: a YAML file gives the runs (arms x conditions x seeds x budgets) and the tuning trials."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..suggestions import did_you_mean

if TYPE_CHECKING:  # a plan is read and checked without importing torch
    from ..baselines.averaging import WeightAveraging
    from ..baselines.entropy_sgd import EntropySGD
    from ..config import SAMConfig

TUNING = "tuning"  # prefix of a trial's budget; trials are counted in the report's setup, but never compared
BUDGETS = {"steps": "equal steps", "passes": "equal passes"}  # a pass: one gradient of the whole effective batch
AVERAGE_KEYS = ("average", "average_start", "average_decay")  # of an arm; all other keys are passed to the recipe
AVERAGES = ("swa", "ema", "entropy-sgd")
SEED_KEYS = ("seed", "subset_seed", "noise_seed")  # set to the run's seed, the same for every arm


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
            Number of trials of one arm (in one task, condition and budget) that may run at the same time. With more than
            one, the settings of a trial depend on which results were known when it started.
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
        sharpness (`dict` or `None`): Arguments of `recipes/sharpness.py`, to measure every trained model.
        survival (`dict` or `None`): Fields of `SurvivalConfig`, to measure every trained model; `true` uses the defaults.
        launcher (`list[str]`): Command that starts each run, such as `["accelerate", "launch"]`; empty for this Python.
        executor (`dict`): Where runs execute: `{kind: local, ray or slurm}`, and the options of each kind under its name.
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


# --- reading -------------------------------------------------------------------------------------------------------


def read_plan(path: Path, output_dir: Path | None = None) -> Plan:
    """
    Read the YAML file of a comparison. Paths in it are relative to the file.

    Raises:
        ValueError: The file is missing or is not YAML, a key is unknown, or a value is invalid. The message names the key
            and what is allowed.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}).") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must contain lines of the form `key: value`.")
    single = {key: values.pop(key) for key in ("recipe", "config", "task") if key in values}
    if single:
        if "tasks" in values:
            raise ValueError(
                f"{path}: give either `recipe` and `config`, or `tasks` with a `recipe` and `config` each."
            )
        values["tasks"] = {single.pop("task", None) or Path(str(single.get("config"))).stem: single}
    _check_keys(values, Plan, f"{path}: ")
    for key in ("tasks", "arms"):
        _check(
            isinstance(values.get(key), dict) and values[key],
            f"{path}: `{key}` must map at least one name to settings.",
        )
    _check_mappings(values, path)
    if isinstance(values.get("executor"), str):
        values["executor"] = {"kind": values["executor"]}
    _check(
        isinstance(values.setdefault("executor", {}), dict),
        f"{path}: `executor` must be local, ray, slurm, or a mapping with `kind` and the options of each.",
    )
    arms, tasks = values["arms"], values["tasks"]
    for name, task in tasks.items():
        _check(isinstance(task, dict) and task.get("recipe"), f"{path}: task {name} needs a `recipe`.")
        unknown = set(task) - {"recipe", "config", "settings"}
        _check(
            not unknown,
            f"{path}: task {name} has unknown keys: {', '.join(sorted(unknown))}. Allowed: recipe, config, settings.",
        )
        if task.get("config"):
            task["config"] = str((Path(path).parent / task["config"]).resolve())
            _check(Path(task["config"]).is_file(), f"{path}: config {task['config']} of task {name} does not exist.")
    values["question"] = _read_question(values.get("question"), arms, path)
    values["tuning"] = _read_tuning(values.get("tuning"), arms, path)
    values["survival"] = _read_survival(values.get("survival"), path)
    seeds, budgets = values.get("seeds", [0]), values.get("budgets", ["steps"])
    _check(
        isinstance(seeds, list)
        and seeds
        and all(type(seed) is int for seed in seeds)
        and len(set(seeds)) == len(seeds),
        f"{path}: seeds={seeds!r} must be a list of distinct whole numbers.",
    )
    _check(
        isinstance(budgets, list) and budgets and set(budgets) <= set(BUDGETS),
        f"{path}: budgets={budgets!r} must be a list of: {', '.join(BUDGETS)}.",
    )
    every = values.get("checkpoint_every")
    _check(
        every is None or (type(every) is int and every > 0), f"{path}: checkpoint_every={every!r} must be at least 1."
    )
    values.setdefault("name", Path(path).stem)
    values["output_dir"] = Path(output_dir or values.get("output_dir") or f"outputs/comparison/{Path(path).stem}")
    for key in ("tasks", "arms", "conditions"):
        folders: dict[str, str] = {}
        for name in values.get(key, {}):
            other = folders.setdefault(slug(name), name)
            _check(other == name, f"{path}: {key} {other!r} and {name!r} would share a folder. Rename one.")
    for arm in arms:
        _averaging_values(arms[arm])  # raises if invalid
    return Plan(**values)


def _check_mappings(values: dict[str, Any], path: Path) -> None:
    for key in ("tasks", "arms", "conditions", "settings"):
        entry = values.get(key, {})
        _check(isinstance(entry, dict), f"{path}: `{key}` must be a mapping, not {entry!r}.")
        for name in [] if key == "settings" else list(entry):
            entry[name] = {} if entry[name] is None else entry[name]
            _check(isinstance(entry[name], dict), f"{path}: {key} {name} must map settings to values.")
            if not isinstance(name, str):
                entry[str(name)] = entry.pop(name)


def _read_question(values: Any, arms: Mapping[str, Any], path: Path) -> Question:
    values = values or {}
    _check(isinstance(values, dict), f"{path}: `question` must map control, treatment, metric and margin to values.")
    _check_keys(values, Question, f"{path}: question.")
    names = list(arms)
    question = Question(
        control=str(values.get("control", names[0])),
        treatment=str(values.get("treatment", names[min(1, len(names) - 1)])),
        metric=str(values.get("metric", "accuracy")),
        margin=values.get("margin"),
    )
    margin = question.margin
    is_number = isinstance(margin, (int, float)) and not isinstance(margin, bool)
    _check(
        margin is None or (is_number and margin > 0), f"{path}: question.margin={margin!r} must be a number above 0."
    )
    for key in ("control", "treatment"):
        arm = getattr(question, key)
        _check(arm in arms, f"{path}: question.{key}={arm!r} is not an arm. Allowed: {', '.join(names)}.")
    return question


def _read_tuning(values: Any, arms: Mapping[str, Any], path: Path) -> Tuning | None:
    if values is None:
        return None
    _check(isinstance(values, dict), f"{path}: `tuning` must map trials and space to values.")
    _check_keys(values, Tuning, f"{path}: tuning.")
    trials, share = values.get("trials"), values.get("validation_size", 0.2)
    _check(type(trials) is int and trials > 0, f"{path}: tuning.trials={trials!r} must be a whole number, at least 1.")
    parallel = values.get("parallel", 1)
    _check(type(parallel) is int and parallel > 0, f"{path}: tuning.parallel={parallel!r} must be at least 1.")
    _check(isinstance(share, float) and 0 < share < 1, f"{path}: tuning.validation_size={share!r} must be in (0, 1).")
    values.setdefault("space", {})
    unknown = set(values.get("spaces") or {}) - set(arms)
    _check(
        not unknown,
        f"{path}: tuning.spaces has unknown arms: {', '.join(sorted(unknown))}. Allowed: {', '.join(arms)}.",
    )
    tuning = Tuning(**values)
    for arm in arms:
        _check(tuning.of(arm), f"{path}: tuning has no search space for arm {arm}. Set tuning.space.")
        for name, entry in tuning.of(arm).items():
            is_range = isinstance(entry, dict) and {"low", "high"} <= set(entry) <= {"low", "high", "log", "int"}
            is_choice = isinstance(entry, list) and len(entry) > 0
            _check(
                is_range or is_choice,
                f"{path}: the search space of {name} must be a list of choices or {{low, high, log, int}}, not {entry!r}.",
            )
            if is_range:
                low, high = entry["low"], entry["high"]
                numbers = all(isinstance(bound, (int, float)) and not isinstance(bound, bool) for bound in (low, high))
                _check(
                    numbers and low < high and (low > 0 or not entry.get("log")),
                    f"{path}: search space of {name}: low={low!r} must be a number below high={high!r}, and above 0 for "
                    f"log (write 1.0e-5, since YAML reads 1e-5 as text).",
                )
    return tuning


def _read_survival(values: Any, path: Path) -> dict[str, Any] | None:
    if values is None or values is False:
        return None
    from ..evaluation.survival import SurvivalConfig  # imports torch, so only if it is needed

    values = {} if values is True else values
    _check(isinstance(values, dict), f"{path}: `survival` must be true, false or a mapping, not {values!r}.")
    _check_keys(values, SurvivalConfig, f"{path}: survival.")
    try:
        SurvivalConfig(**values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: survival.{error}") from None
    return values


def _check(condition: Any, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_keys(values: Mapping[str, Any], kind: type, prefix: str) -> None:
    known = [entry.name for entry in fields(kind)]
    for key in values:
        if key not in known:
            hint = did_you_mean(key, known, f" Allowed: {', '.join(known)}.")
            raise ValueError(f"{prefix}{key} is not a key of a comparison.{hint}")


def averaging_of(arm: Mapping[str, Any]) -> WeightAveraging | EntropySGD | None:
    """
    The callback for an arm's weight averaging: `swa`, `ema`, or `entropy-sgd` with the settings of its paper.

    Raises:
        ValueError: A setting is invalid.
    """
    values = _averaging_values(arm)
    if not values:
        return None
    from ..baselines.averaging import WeightAveraging
    from ..baselines.entropy_sgd import EntropySGD

    kind = values.pop("average")
    return EntropySGD() if kind == "entropy-sgd" else WeightAveraging(kind, **values)


def _averaging_values(arm: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `WeightAveraging` from the arm's keys, checked as far as possible without importing torch."""
    values = {key.removeprefix("average_"): arm[key] for key in AVERAGE_KEYS if key in arm}
    if not values:
        return {}
    _check("average" in values, f"{', '.join(key for key in arm if key in AVERAGE_KEYS)} is used only with average.")
    kind = values["average"]
    _check(kind in AVERAGES, f"average={kind!r} is unknown. Allowed: {', '.join(AVERAGES)}.")
    _check(
        kind != "entropy-sgd" or len(values) == 1,
        f"average={kind} does not use {', '.join(f'average_{key}' for key in values if key != 'average')}. Remove it.",
    )
    return values


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
        "save_strategy": "steps" if plan.checkpoint_every else "no",
    }
    if plan.checkpoint_every:
        settings |= {"save_steps": plan.checkpoint_every, "save_total_limit": 1}
    if run.trial is not None:
        settings |= {"validation_size": plan.tuning.validation_size, "score_split": "validation"}
    return settings


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
