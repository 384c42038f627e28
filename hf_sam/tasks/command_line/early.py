"""
Check the command line before torch and transformers are imported, which takes seconds.

The names of arguments are read from the source of the classes that define them, without importing these. Whatever
cannot be checked this way is left to the full parser, which always runs afterwards.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ...experiments.plan import layers_of
from ...experiments.plan_file import read_plan
from ...suggestions import did_you_mean
from .. import TRAINING
from .config_files import read_layers, split_command_line, unknown_key
from .errors import UserError, as_user_error
from .parsers import check_recipe, parse_demo, parse_search, parse_study

TASKS = Path(__file__).parents[1]
HF_CLASSES = {  # used in addition to a recipe's own classes; class -> package, module
    "TrainingArguments": ("transformers", "training_args.py"),
    "Seq2SeqTrainingArguments": ("transformers", "training_args_seq2seq.py"),
    "SFTConfig": ("trl", "trainer/sft_config.py"),
    "SAMConfig": ("hf_sam", "config.py"),
    "SharpnessConfig": ("hf_sam", "sharpness/profile.py"),
    "SurvivalConfig": ("hf_sam", "evaluation/survival.py"),
}
SHARED = ("ModelArguments", "DataArguments", "RunArguments")
# Tasks that accept the data of any training task: the classes they use besides their own and those of these tasks.
EVALUATING = {
    "report": ("DataArguments", "SharpnessConfig", "SurvivalConfig"),
    "survival": ("DataArguments", "SurvivalConfig"),
    "sharpness": ("DataArguments", "SharpnessConfig"),
    "benchmark": ("ModelArguments", "DataArguments", "TrainingArguments"),
}
RENAMED = "activation_checkpointing"  # the name of gradient_checkpointing in transformers 5.23 and newer
NUMBERS = {"int": int, "float": float}


def check(task: str, argv: Sequence[str]) -> None:
    """
    Check the command line of a task.

    Args:
        task (`str`): A module of `hf_sam.tasks`.
        argv (`Sequence[str]`): Its command line.

    Raises:
        UserError: If a configuration file cannot be read, a key is not an argument, a value should be a number and is
            not, or the method is unknown.
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
    """Check the plan of a comparison and the arguments it passes to each recipe; raises like `check`."""
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
    """Check the command line of a task that parses it into dataclasses; raises like `check`."""
    files, options = split_command_line(argv)
    try:
        known = arguments_of(task)
    except LookupError:  # a custom module, or a class that has moved
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
            if (
                known.get(key.removeprefix("no_")) != "bool"
            ):  # the parser adds `--no_...` for switches that are on by default
                given.append(("", key, value if equals else following))
    _check_values(given, known)


def _check_values(given: list[tuple[str, str, Any]], known: dict[str, str]) -> None:
    """Check `(prefix of the error message, name, value)` triples."""
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
    Return the arguments of a task with their types.

    Raises:
        LookupError: If the task does not parse its arguments into dataclasses, or a class cannot be found.
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
        raise LookupError(f"{task} does not parse its arguments into dataclasses")
    source = (TASKS / f"{task}.py").read_text(encoding="utf-8")
    found = {**_own_fields(TASKS / f"{task}.py"), **_own_fields(Path(__file__).with_name("options.py"), SHARED)}
    found |= {f"sam_{name}": kind for name, kind in _fields("SAMConfig").items() if name not in ("start", "end", "p")}
    found |= dict.fromkeys(("sam_start", "sam_end", "sam_p"), "")
    found[RENAMED] = "bool"  # whichever name this version of transformers uses
    named = next((name for name in ("SFTConfig", "Seq2SeqTrainingArguments") if name in source), "TrainingArguments")
    return found | _fields(named)


@cache
def method_names() -> tuple[str, ...]:
    """Return the names in the table of methods."""
    tree = ast.parse((TASKS.parent / "methods/table.py").read_text(encoding="utf-8"))
    rows = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "Method"]
    return tuple(row.args[0].value for row in rows)


def _own_fields(path: Path, names: Sequence[str] | None = None) -> dict[str, str]:
    """Return the fields of the argument dataclasses in a file, or of the classes in `names`."""
    classes = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]
    wanted = [node for node in classes if (node.name in names if names else node.name.endswith("Arguments"))]
    return {name: kind for node in wanted if node.decorator_list for name, kind in _annotated(node)}


@cache
def _fields(name: str, package: str | None = None, module: str | None = None) -> dict[str, str]:
    """Return the fields of a dataclass of a package, including those of its bases."""
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
        else:  # imported from a module of the same package
            beside = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level == 1]
            home = next((n.module for n in beside if base_name in [alias.name for alias in n.names]), None)
            if home is None:
                raise LookupError(f"no module found for {base_name}, a base of {name}")
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
