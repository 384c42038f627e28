"""Read the YAML file of a comparison into a `Plan`, and check every value without importing torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from ..suggestions import did_you_mean
from .plan import BUDGETS, Plan, Question, Tuning, averaging_values, require, slug
from .yaml_loader import UniqueKeyLoader

MAX_FOLDER = 200  # characters of a name that becomes a folder; file systems allow about 255


def read_plan(path: Path, output_dir: Path | None = None) -> Plan:
    """
    Read the YAML file of a comparison. Paths in it are relative to the file.

    Raises:
        ValueError: The file is missing or is not YAML, a key is unknown, or a value is invalid. The message names the
            key and what is allowed.
    """
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), UniqueKeyLoader)
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
        name = single.pop("task", None) or Path(str(single.get("config") or single.get("recipe"))).stem
        values["tasks"] = {str(name): single}
    _check_keys(values, Plan, f"{path}: ")
    for key in ("tasks", "arms"):
        require(
            isinstance(values.get(key), dict) and values[key],
            f"{path}: `{key}` must map at least one name to settings.",
        )
    _check_mappings(values, path)
    if isinstance(values.get("executor"), str):
        values["executor"] = {"kind": values["executor"]}
    require(
        isinstance(values.setdefault("executor", {}), dict),
        f"{path}: `executor` must be local, ray, slurm, or a mapping with `kind` and the options of each.",
    )
    arms = values["arms"]
    _read_tasks(values["tasks"], path)
    values["question"] = _read_question(values.get("question"), arms, path)
    values["tuning"] = _read_tuning(values.get("tuning"), arms, path)
    values["survival"] = _read_survival(values.get("survival"), path)
    values["sharpness"] = _read_measure("sharpness", values.get("sharpness"), path)
    values["launcher"] = _read_launcher(values.get("launcher"), path)
    _check_scalars(values, path)
    values["name"] = str(values.get("name") or Path(path).stem)
    values["output_dir"] = Path(output_dir or values.get("output_dir") or f"outputs/comparison/{Path(path).stem}")
    for key in ("tasks", "arms", "conditions"):
        _check_folders(key, values.get(key, {}), path)
    for arm in arms:
        averaging_values(arms[arm])  # raises if invalid
    return Plan(**values)


def _read_tasks(tasks: dict[str, dict[str, Any]], path: Path) -> None:
    """Check the tasks, and make the paths of their configurations absolute."""
    for name, task in tasks.items():
        require(task.get("recipe"), f"{path}: task {name} needs a `recipe`.")
        unknown = set(task) - {"recipe", "config", "settings"}
        require(
            not unknown,
            f"{path}: task {name} has unknown keys: {', '.join(sorted(unknown))}. Allowed: recipe, config, settings.",
        )
        for key, kind, words in (("recipe", str, "a name"), ("config", str, "a path"), ("settings", dict, "a mapping")):
            given = task.get(key)
            is_kind = given is None or isinstance(given, kind)
            require(is_kind, f"{path}: {key}={given!r} of task {name} must be {words}.")
        if task.get("config"):
            task["config"] = str((Path(path).parent / task["config"]).resolve())
            require(Path(task["config"]).is_file(), f"{path}: config {task['config']} of task {name} does not exist.")


def _check_scalars(values: Mapping[str, Any], path: Path) -> None:
    """Check the values that are numbers, switches, paths, or lists of such."""
    seeds, budgets, every = values.get("seeds", [0]), values.get("budgets", ["steps"]), values.get("checkpoint_every")
    passes, keep, folder = values.get("reference_passes"), values.get("keep_models", False), values.get("output_dir")
    are_seeds = isinstance(seeds, list) and seeds and all(type(seed) is int for seed in seeds)
    require(
        are_seeds and len(set(seeds)) == len(seeds),
        f"{path}: seeds={seeds!r} must be a list of distinct whole numbers.",
    )
    are_budgets = isinstance(budgets, list) and budgets and all(budget in [*BUDGETS] for budget in budgets)
    require(
        are_budgets and len(set(budgets)) == len(budgets),
        f"{path}: budgets={budgets!r} must be a list of: {', '.join(BUDGETS)}.",
    )
    require(
        every is None or (type(every) is int and every > 0), f"{path}: checkpoint_every={every!r} must be at least 1."
    )
    require(
        passes is None or (_is_number(passes) and passes > 0),
        f"{path}: reference_passes={passes!r} must be a number above 0.",
    )
    require(isinstance(keep, bool), f"{path}: keep_models={keep!r} must be true or false.")
    require(folder is None or isinstance(folder, str), f"{path}: output_dir={folder!r} must be a path.")


def _check_folders(key: str, names: Iterable[str], path: Path) -> None:
    """Check that every name can have a folder of its own."""
    folders: dict[str, str] = {}
    for name in names:
        is_short = len(name) <= MAX_FOLDER
        require(is_short, f"{path}: {key} {name[:20]!r}... must have at most {MAX_FOLDER} characters.")
        other = folders.setdefault(slug(name), name)
        require(other == name, f"{path}: {key} {other!r} and {name!r} would share a folder. Rename one.")


def _check_mappings(values: dict[str, Any], path: Path) -> None:
    for key in ("tasks", "arms", "conditions", "settings"):
        entry = values.get(key, {})
        require(isinstance(entry, dict), f"{path}: `{key}` must be a mapping, not {entry!r}.")
        if key == "settings":
            _check_names(entry, f"{path}: settings")
            continue
        for name, settings in entry.items():
            require(
                not isinstance(name, bool) and name is not None,
                f"{path}: {key} {name}: YAML reads on, off, yes, no and null as values. Put the name in quotes.",
            )
            require(isinstance(settings, dict | None), f"{path}: {key} {name} must map settings to values.")
            _check_names(settings or {}, f"{path}: {key} {name}")
        if key in values:
            values[key] = {str(name): settings or {} for name, settings in entry.items()}  # 0.05 is a name, too
            require(values[key], f"{path}: `{key}` must map at least one name to settings, or be left out.")


def _check_names(settings: Mapping[Any, Any], where: str) -> None:
    odd = [name for name in settings if not isinstance(name, str)]
    require(not odd, f"{where}: {odd} are not names of settings.")


def _read_question(values: Any, arms: Mapping[str, Any], path: Path) -> Question:
    values = values or {}
    require(isinstance(values, dict), f"{path}: `question` must map control, treatment, metric and margin to values.")
    _check_keys(values, Question, f"{path}: question.")
    names = list(arms)
    question = Question(
        control=str(values.get("control", names[0])),
        treatment=str(values.get("treatment", names[min(1, len(names) - 1)])),
        metric=str(values.get("metric", "accuracy")),
        margin=values.get("margin"),
    )
    margin = question.margin
    require(
        margin is None or (_is_number(margin) and margin > 0),
        f"{path}: question.margin={margin!r} must be a number above 0.",
    )
    for key in ("control", "treatment"):
        arm = getattr(question, key)
        require(arm in arms, f"{path}: question.{key}={arm!r} is not an arm. Allowed: {', '.join(names)}.")
    return question


def _read_tuning(values: Any, arms: Mapping[str, Any], path: Path) -> Tuning | None:
    if values is None:
        return None
    require(isinstance(values, dict), f"{path}: `tuning` must map trials and space to values.")
    _check_keys(values, Tuning, f"{path}: tuning.")
    trials, share = values.get("trials"), values.get("validation_size", 0.2)
    require(type(trials) is int and trials > 0, f"{path}: tuning.trials={trials!r} must be a whole number, at least 1.")
    parallel = values.get("parallel", 1)
    require(type(parallel) is int and parallel > 0, f"{path}: tuning.parallel={parallel!r} must be at least 1.")
    require(isinstance(share, float) and 0 < share < 1, f"{path}: tuning.validation_size={share!r} must be in (0, 1).")
    seed, storage = values.get("seed", 0), values.get("storage")
    require(type(seed) is int and seed >= 0, f"{path}: tuning.seed={seed!r} must be a whole number, at least 0.")
    require(storage is None or isinstance(storage, str), f"{path}: tuning.storage={storage!r} must be a URL.")
    for key in ("space", "spaces"):
        values[key] = values.get(key) or {}
        require(isinstance(values[key], dict), f"{path}: tuning.{key} must be a mapping, not {values[key]!r}.")
    for name, space in values["spaces"].items():
        require(isinstance(space, dict), f"{path}: tuning.spaces.{name} must map settings to values, not {space!r}.")
    unknown = set(map(str, values["spaces"])) - set(arms)
    require(
        not unknown,
        f"{path}: tuning.spaces has unknown arms: {', '.join(sorted(unknown))}. Allowed: {', '.join(arms)}.",
    )
    tuning = Tuning(**values)
    for arm in arms:
        require(tuning.of(arm), f"{path}: tuning has no search space for arm {arm}. Set tuning.space.")
        for name, entry in tuning.of(arm).items():
            is_range = isinstance(entry, dict) and {"low", "high"} <= set(entry) <= {"low", "high", "log", "int"}
            is_choice = isinstance(entry, list) and len(entry) > 0
            require(
                is_range or is_choice,
                f"{path}: the search space of {name} must be a list of choices or {{low, high, log, int}}, not {entry!r}.",
            )
            if is_range:
                low, high = entry["low"], entry["high"]
                require(
                    _is_number(low) and _is_number(high) and low < high and (low > 0 or not entry.get("log")),
                    f"{path}: search space of {name}: low={low!r} must be a number below high={high!r}, and above 0 for "
                    f"log (write 1.0e-5, since YAML reads 1e-5 as text).",
                )
                require(
                    not entry.get("int") or type(low) is type(high) is int,
                    f"{path}: search space of {name}: low={low!r} and high={high!r} must be whole numbers with int.",
                )
    return tuning


def _read_launcher(values: Any, path: Path) -> list[str]:
    if values is None:
        return []
    require(
        isinstance(values, list) and all(isinstance(word, str | int) for word in values),
        f"{path}: launcher={values!r} must be a list of words, such as [accelerate, launch].",
    )
    return list(map(str, values))


def _read_measure(key: str, values: Any, path: Path) -> dict[str, Any] | None:
    """Read what to measure of every trained model; `true` stands for the defaults."""
    if values is None or values is False:
        return None
    values = {} if values is True else values
    require(isinstance(values, dict), f"{path}: `{key}` must be true, false or a mapping, not {values!r}.")
    return values


def _read_survival(values: Any, path: Path) -> dict[str, Any] | None:
    values = _read_measure("survival", values, path)
    if values is None:
        return None
    from ..evaluation.survival import SurvivalConfig  # imports torch, so only if it is needed

    _check_keys(values, SurvivalConfig, f"{path}: survival.")
    try:
        SurvivalConfig(**values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: survival.{error}") from None
    return values


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_keys(values: Mapping[str, Any], kind: type, prefix: str) -> None:
    known = [entry.name for entry in fields(kind)]
    for key in values:
        if key not in known:
            hint = did_you_mean(key, known, f" Allowed: {', '.join(known)}.")
            raise ValueError(f"{prefix}{key} is not a key of a comparison.{hint}")
