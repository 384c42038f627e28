"""
A first look at the command line, before torch and transformers are imported, which takes seconds.

The names of arguments are read from the source of the classes that hold them, without importing these. What cannot be
found out so is left to the parser proper; it has the last word in any case.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ...experiments.plan import layers_of, read_plan
from ...suggestions import did_you_mean
from .. import TRAINING
from .config_files import read_layers, split_command_line, unknown_key
from .errors import UserError, as_user_error
from .parsers import check_recipe, parse_demo, parse_search, parse_study

TASKS = Path(__file__).parents[1]
HF_CLASSES = {  # what a recipe's own classes stand beside: package, module, class
    "TrainingArguments": ("transformers", "training_args.py"),
    "Seq2SeqTrainingArguments": ("transformers", "training_args_seq2seq.py"),
    "SFTConfig": ("trl", "trainer/sft_config.py"),
    "SAMConfig": ("hf_sam", "config.py"),
    "SharpnessConfig": ("hf_sam", "sharpness/profile.py"),
    "SurvivalConfig": ("hf_sam", "evaluation/survival.py"),
}
SHARED = ("ModelArguments", "DataArguments", "RunArguments")
# The classes, beside its own and those of the tasks that train, of a task that takes any of their data.
EVALUATING = {
    "report": ("DataArguments", "SharpnessConfig", "SurvivalConfig"),
    "survival": ("DataArguments", "SurvivalConfig"),
    "sharpness": ("DataArguments", "SharpnessConfig"),
    "benchmark": ("ModelArguments", "DataArguments", "TrainingArguments"),
}
RENAMED = "activation_checkpointing"  # what transformers 5.23 and newer call gradient_checkpointing
NUMBERS = {"int": int, "float": float}


def check(task: str, argv: Sequence[str]) -> None:
    """
    Args:
        task (`str`): A module of `hf_sam.tasks`.
        argv (`Sequence[str]`): Its command line.

    Raises:
        UserError: A configuration file that cannot be read, a key that is no argument, a word where a number belongs, a
            method that there is not.
    """
    if task == "compare":
        check_study(argv)
    elif task == "find_rho":
        options, words = parse_search(argv)
        check(options.recipe, words)
    elif task == "demo":
        parse_demo(argv)
    else:
        check_words(task, argv)


def check_study(argv: Sequence[str]) -> None:
    """The plan of a comparison, and what it gives each recipe; raises like `check`."""
    args = parse_study(argv)
    with as_user_error(ValueError):
        plan = read_plan(args.study, args.output_dir)
    for name, task in plan.tasks.items():
        check_recipe(task["recipe"])
        try:
            known = arguments_of(task["recipe"])
        except LookupError:
            continue
        layers = read_layers(Path(task["config"])) if task.get("config") else []
        for condition in plan.conditions:
            for arm in plan.arms:
                layers += [(where, keys) for where, keys in layers_of(plan, name, condition, arm)]
        layers.append(("--set", dict(word.split("=", 1) for word in args.set)))
        _check_values([(f"{where}: ", key, value) for where, keys in layers for key, value in keys.items()], known)


def check_words(task: str, argv: Sequence[str]) -> None:
    """The command line of a task that parses it into dataclasses; raises like `check`."""
    files, options = split_command_line(argv)
    try:
        known = arguments_of(task)
    except LookupError:  # a module of the user's own, or a class that is not where it used to be
        for file in files:
            read_layers(Path(file))
        return
    given = [
        (f"{name}: ", key, value)
        for file in files
        for name, keys in read_layers(Path(file))
        for key, value in keys.items()
    ]
    for word, following in zip(options, [*options[1:], None][: len(options)], strict=True):
        if word.startswith("--"):
            key, equals, value = word.removeprefix("--").partition("=")
            key = key.replace("-", "_")
            if known.get(key.removeprefix("no_")) != "bool":  # the parser adds `--no_...` for switches that are on
                given.append(("", key, value if equals else following))
    _check_values(given, known)


def _check_values(given: list[tuple[str, str, Any]], known: dict[str, str]) -> None:
    """Names and values, each with the words that begin a complaint about it."""
    for where, key, value in given:
        if key not in known:
            raise UserError(f"{where}{unknown_key(key, known)}")
        if not isinstance(value, str) or value.startswith("--"):
            continue
        if known[key] in NUMBERS and not _is_number(value):
            raise UserError(f"{where}argument --{key}: invalid {known[key]} value: {value!r}")
        if key == "sam_method" and value not in method_names():
            hint = did_you_mean(value, method_names())
            raise UserError(f"{where}sam_method={value!r} is unknown.{hint} Allowed: {', '.join(method_names())}.")


def arguments_of(task: str) -> dict[str, str]:
    """
    The arguments of a task, each with its type where that is a plain number.

    Raises:
        LookupError: The task parses its arguments otherwise, or a class cannot be found.
    """
    if task in EVALUATING:
        found: dict[str, str] = {}
        for name in (task, *TRAINING):
            found |= _own_fields(TASKS / f"{name}.py")
        for name in EVALUATING[task]:
            found |= _own_fields(Path(__file__).with_name("options.py"), (name,)) if name in SHARED else _fields(name)
        return found
    if task == "forgetting":
        return _own_fields(TASKS / "forgetting.py")
    if task not in TRAINING:
        raise LookupError(f"{task} parses its arguments otherwise")
    source = (TASKS / f"{task}.py").read_text(encoding="utf-8")
    found = {**_own_fields(TASKS / f"{task}.py"), **_own_fields(Path(__file__).with_name("options.py"), SHARED)}
    found |= {f"sam_{name}": kind for name, kind in _fields("SAMConfig").items() if name not in ("start", "end", "p")}
    found |= dict.fromkeys(("sam_start", "sam_end", "sam_p"), "")
    found[RENAMED] = "bool"  # by whatever name this version of transformers has it
    named = next((name for name in ("SFTConfig", "Seq2SeqTrainingArguments") if name in source), "TrainingArguments")
    return found | _fields(named)


@cache
def method_names() -> tuple[str, ...]:
    """The names in the table of methods."""
    tree = ast.parse((TASKS.parent / "methods/table.py").read_text(encoding="utf-8"))
    rows = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "Method"]
    return tuple(row.args[0].value for row in rows)


def _own_fields(path: Path, names: Sequence[str] | None = None) -> dict[str, str]:
    """The fields of the dataclasses of a file that hold arguments, or of those that are named."""
    classes = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]
    wanted = [node for node in classes if (node.name in names if names else node.name.endswith("Arguments"))]
    return {name: kind for node in wanted if node.decorator_list for name, kind in _annotated(node)}


@cache
def _fields(name: str, package: str | None = None, module: str | None = None) -> dict[str, str]:
    """The fields of a dataclass of a package, those of its bases included."""
    package, module = (package, module) if package else HF_CLASSES[name]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise LookupError(f"{package} is not installed")
    path = Path(spec.submodule_search_locations[0], module)
    if not path.is_file():
        raise LookupError(f"{package} has no {module}")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    node = next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name), None)
    if node is None:
        raise LookupError(f"{module} of {package} has no class {name}")
    found: dict[str, str] = {}
    for base in node.bases:
        base_name = ast.unparse(base)
        if base_name in HF_CLASSES:
            found |= _fields(base_name)
        else:  # imported from a module beside it
            beside = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level == 1]
            home = next((n.module for n in beside if base_name in [alias.name for alias in n.names]), None)
            if home is None:
                raise LookupError(f"{base_name}, a base of {name}, is in no module that could be found")
            found |= _fields(base_name, package, f"{Path(module).parent}/{home.replace('.', '/')}.py")
    return found | dict(_annotated(node))


def _annotated(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            yield line.target.id, ast.unparse(line.annotation).removesuffix(" | None")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
