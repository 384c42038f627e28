"""One-screen `--help`; `--help-all` shows every option. Imports nothing slow."""

from __future__ import annotations

import ast
import dataclasses
import shlex
import shutil
import sys
import textwrap
from argparse import Action
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from .config_files import config_name

TASKS = Path(__file__).parents[1]
OPERANDS = {"flatten": "CHECKPOINT", **dict.fromkeys(("report", "survival", "forgetting"), "CHECKPOINT ...")}
HELP, HELP_ALL = ("-h", "--help"), ("--help-all", "--help_all")
LONGEST = 85  # characters of help per option in --help; --help-all shows the full text

# The options of shared classes that a first run needs. All options of a task's own classes are shown.
SHOWN = {
    "ModelArguments": ("model_name_or_path", "model_type", "lora_r"),
    "DataArguments": ("dataset", "label_column", "validation_size", "test_size", "train_samples", "label_noise"),
    "RunArguments": ("overwrite_output_dir", "evaluate_train"),
    "SAMArguments": ("sam_method", "sam_rho", "sam_scope", "sam_perturb", "sam_start"),
    "SharpnessConfig": ("measures", "rho"),
    "SurvivalConfig": ("treatments", "bits", "merge_with"),
    "TrainingArguments": (
        *("output_dir", "max_steps", "num_train_epochs", "learning_rate", "per_device_train_batch_size"),
        *("eval_strategy", "resume_from_checkpoint", "seed"),
    ),
}

BRIEF = {  # short forms of the descriptions in `SAMConfig`
    "sam_method": "The method, such as sam or asam; `hf-sam methods` lists them.",
    "sam_rho": "Size of the perturbation; default: the method's; 0 is the stock Trainer.",
    "sam_scope": "Examples that share a perturbation: micro, device, global, or auto.",
    "sam_perturb": "Parameters to perturb: all, norm, no-norm-no-bias, or patterns of names.",
    "sam_start": "First step that perturbs, or a fraction of the run such as 0.5.",
}


def wants_help(argv: Sequence[str]) -> bool:
    """Whether help is requested."""
    return not {*HELP, *HELP_ALL}.isdisjoint(argv)


def wants_all(argv: Sequence[str]) -> bool:
    """Whether the full list of options is requested."""
    return not set(HELP_ALL).isdisjoint(argv)


def command_words(task: str) -> list[str]:
    """Return the words that run `task` the way this process was started: a script in `recipes/`, or `hf-sam`."""
    script = Path(sys.argv[0])
    if script.parent.name == "recipes" and script.suffix == ".py":
        return ["python", f"recipes/{task}.py"]
    return ["hf-sam", task.replace("_", "-")]


def command_again(task: str, argv: Sequence[str]) -> str:
    """Return the command line as a user would type it, with shipped configurations by name."""
    return shlex.join([*command_words(task), *(config_name(word) or word for word in argv)])


def terminal_width() -> int:
    """Return the number of columns; unlimited if the output is not a terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize


def docstring_of(path: Path) -> str:
    """Return the docstring of a module, read from its source."""
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def summary_of(path: Path) -> str:
    """Return the first line of the docstring of a module."""
    return docstring_of(path).partition("\n")[0]


def describe(task: str) -> str:
    """Return what a task does and how to call it, for the top of its help."""
    words = command_words(task)
    script = Path(sys.argv[0])
    return docstring_of(script if words[0] == "python" and script.is_file() else TASKS / f"{task}.py")


def heading(task: str) -> str:
    """Return the lines above the options."""
    words = " ".join(command_words(task))
    operands = OPERANDS.get(task, "[CONFIG]")
    return f"usage: {words} {operands} [--key value ...]\n\n{describe(task)}\n"


def option_page(kinds: Sequence[type], actions: Mapping[str, Action]) -> str:
    """
    List the most used options, grouped by class; the others by name only.

    Args:
        kinds (`Sequence[type]`): The dataclasses that the command line is parsed into.
        actions (`Mapping[str, Action]`): The parser's arguments by name.
    """
    width = min(terminal_width(), 120)
    return "\n".join(line for kind in sorted(kinds, key=_is_shared) for line in _section(kind, actions, width))


def _is_shared(kind: type) -> bool:
    return _shown_name(kind) in SHOWN


def _shown_name(kind: type) -> str:
    """Return the name of a class, or of its base class listed in `SHOWN`."""
    return next((base.__name__ for base in kind.__mro__ if base.__name__ in SHOWN), kind.__name__)


def _section(kind: type, actions: Mapping[str, Action], width: int) -> Iterator[str]:
    name = _shown_name(kind)
    names = [field.name for field in dataclasses.fields(kind) if field.init and field.name in actions]
    shown = [key for key in SHOWN[name] if key in names] if name in SHOWN else names
    others = [key for key in names if key not in shown]
    yield f"{name}:"
    if name == "TrainingArguments":  # most users know these
        listed = ", ".join(f"--{key}" for key in shown)
        yield from _wrapped(f"{listed} and {len(others)} more of {kind.__name__}: --help-all", width)
        return
    for key in shown:
        lead = f"  --{key}"
        text = textwrap.shorten(help_of(actions[key]), LONGEST, placeholder=" ...")
        yield f"{lead:<24} {text}"
    if others:
        yield from _wrapped(f"also: {', '.join(others)}", width)


def help_of(action: Action) -> str:
    """Return the help text of an option."""
    return BRIEF.get(action.dest) or (action.help or "").replace("%%", "%")


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
