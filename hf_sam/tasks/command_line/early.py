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

from .. import TRAINING
from .config_files import read_layers, split_command_line, unknown_key
from .errors import UserError

TASKS = Path(__file__).parents[1]
HF_CLASSES = {  # what a recipe's own classes stand beside: package, module, class
    "TrainingArguments": ("transformers", "training_args.py"),
    "SFTConfig": ("trl", "trainer/sft_config.py"),
    "SAMConfig": ("hf_sam", "config.py"),
}
NUMBERS = {"int": int, "float": float}


def check(task: str, argv: Sequence[str]) -> None:
    """
    Args:
        task (`str`): One that parses its arguments into dataclasses; of any other only files are looked at.
        argv (`Sequence[str]`): Its command line.

    Raises:
        UserError: A configuration file that cannot be read, a key that is no argument, a word where a number belongs.
    """
    files, options = split_command_line(argv)
    try:
        known = arguments_of(task)
    except LookupError:  # not a task that trains, or a class that is not where it used to be
        for file in files:
            if not Path(file).is_file():
                raise UserError(f"{file} cannot be read: there is no such file.") from None
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
    for where, key, value in given:
        if key not in known:
            raise UserError(f"{where}{unknown_key(key, known)}")
        if known[key] in NUMBERS and isinstance(value, str) and not (value.startswith("--") or _is_number(value)):
            raise UserError(f"{where}argument --{key}: invalid {known[key]} value: {value!r}")


def arguments_of(task: str) -> dict[str, str]:
    """
    The arguments of a task, each with its type where that is a plain number.

    Raises:
        LookupError: The task does not train, or a class cannot be found.
    """
    if task not in TRAINING:
        raise LookupError(f"{task} does not train")
    source = (TASKS / f"{task}.py").read_text(encoding="utf-8")
    found = {**_own_fields(TASKS / f"{task}.py"), **_own_fields(Path(__file__).with_name("options.py"))}
    found |= {f"sam_{name}": kind for name, kind in _fields("SAMConfig").items() if name not in ("start", "end", "p")}
    found |= dict.fromkeys(("sam_start", "sam_end", "sam_p"), "")
    return found | _fields("SFTConfig" if "SFTConfig" in source else "TrainingArguments")


def _own_fields(path: Path) -> dict[str, str]:
    """The fields of all dataclasses of a file."""
    classes = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]
    return {name: kind for node in classes if node.decorator_list for name, kind in _annotated(node)}


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
