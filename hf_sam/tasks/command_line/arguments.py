"""Parse YAML files and `--key value` overrides into dataclasses; an unknown key is an error with a suggestion."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from argparse import Action
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from transformers import HfArgumentParser

from hf_sam.config import SAMConfig
from hf_sam.methods.users import load_parts

from ...experiments.method_settings import Merged, explain, merge
from .config_files import read_layers, split_command_line, unknown_key
from .docstrings import described
from .early import RENAMED
from .errors import UserError, as_user_error
from .help import option_page, wants_all, wants_help

COMMAND_LINE = "command line"
_SAM_OPTION = re.compile(r"--(?P<key>sam[_-][\w-]+)(=(?P<value>.*))?$", re.DOTALL)


def parse_arguments(dataclass_types: Sequence[type], argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """
    Fill one instance of each dataclass from `[CONFIG.yaml ...] [--key value ...]`; later values win.

    A configuration file may extend another one with `base: FILE`, a path relative to the file itself. A `null` value
    keeps the default. All values, from files and from the command line, are parsed by `argparse`.

    Args:
        dataclass_types (`Sequence[type]`): The classes to fill; a key must be a field of one of them.
        argv (`Sequence[str]`, *optional*, defaults to `sys.argv[1:]`): The command line.

    Raises:
        UserError: If a file cannot be read, a key is unknown, or a value has the wrong type or is out of range.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(dataclass_types, allow_abbrev=False)
    if wants_help(argv):
        print(parser.format_help() if wants_all(argv) else option_page(dataclass_types, parser.actions))
        sys.exit(0)
    files, options = split_command_line(argv)
    layers = [layer for file in files for layer in read_layers(Path(file))]
    for name, values in layers:
        for key in values:
            if key not in parser.actions:
                raise UserError(f"{name}: {unknown_key(key, parser.actions)}")
    merged = merge([*layers, (COMMAND_LINE, _sam_options(options))])
    from_files = {key: value for key, value in merged.values.items() if merged.sources[key] != COMMAND_LINE}
    namespace, rest = parser.parse_known_args([*_tokens(from_files, parser), *options])
    if rest:
        raise UserError(unknown_key(rest[0], parser.actions))
    values = vars(namespace)
    with as_user_error(ValueError, TypeError, ImportError):
        parsed = tuple(
            kind(**{field.name: values[field.name] for field in dataclasses.fields(kind) if field.init})
            for kind in dataclass_types
        )
    for arguments in parsed:
        if isinstance(arguments, _SAMArguments):
            arguments.merged = merged
    return parsed


def read_config(path: Path) -> dict[str, Any]:
    """
    Read a configuration file, with its keys overriding those of its `base`. Scalars stay text, so that YAML does not
    turn `no` into a boolean or misread `5e-5`; mappings are typed.

    Raises:
        UserError: If the file does not exist, is not a mapping, or is its own base.
    """
    return merge(read_layers(path)).values


def _tokens(values: dict[str, Any], parser: _Parser) -> Iterator[str]:
    """Turn the values of configuration files into command-line words."""
    for key, value in values.items():
        if value is None:
            continue
        if isinstance(value, list) and parser.actions[key].nargs == "+":
            yield from (f"--{key}", *map(str, value))
        elif isinstance(value, list):
            yield f"--{key}={','.join(map(str, value))}"
        else:
            yield f"--{key}={json.dumps(value) if isinstance(value, dict) else value}"


def _sam_options(options: Sequence[str]) -> dict[str, str]:
    """Return the SAM fields set on the command line, with their values as text."""
    found = {}
    for word, following in zip(options, [*options[1:], ""][: len(options)], strict=True):
        if match := _SAM_OPTION.match(word):
            found[match["key"].replace("-", "_")] = match["value"] if match["value"] is not None else following
    return found


class _Parser(HfArgumentParser):
    """An `HfArgumentParser` that raises `UserError` on mistakes and gives access to its arguments by name."""

    actions: dict[str, Action]

    def __init__(self, dataclass_types: Sequence[type], **kwargs):
        super().__init__(
            dataclass_types, conflict_handler="resolve", **kwargs
        )  # a field of two classes is one argument
        self.actions = {action.dest: action for action in self._actions if action.dest != "help"}
        older = self._option_string_actions.get("--gradient_checkpointing")
        if older is not None and RENAMED not in self.actions:
            self.actions[RENAMED] = self._option_string_actions[f"--{RENAMED}"] = older
        for name, text in ((name, text) for kind in dataclass_types for name, text in described(kind).items()):
            if name in self.actions and not self.actions[name].help:
                self.actions[name].help = text.replace("%", "%%")

    def error(self, message: str):
        raise UserError(message)


# --- SAM fields, generated from SAMConfig --------------------------------------------------------------------------


class _SAMArguments:
    """The fields of `SAMConfig` with the prefix `sam_`."""

    merged: Merged | None = None  # where each value came from; set by `parse_arguments`

    def explain(self) -> str:
        """Describe the effective configuration in one line, and where each part of it came from."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return explain(self.to_config(), self.merged or merge([(COMMAND_LINE, given)]))

    @property
    def has_rho_for_training_from_scratch(self) -> bool:
        """Whether rho is the default of a method whose paper trained from scratch, and not chosen by the user."""
        return self.sam_rho is None and self.to_config().row.rho_is_from_scratch

    def to_config(self) -> SAMConfig:
        """
        Build the `SAMConfig`.

        Raises:
            UserError: If `SAMConfig` rejects a value; the message uses the name of the command-line option.
        """
        values = {name: getattr(self, f"sam_{name}") for name in SAMConfig.fields()}
        for name in ("start", "end"):  # an int is a step, a float a fraction of the run
            text = values[name]
            if text is not None:
                with as_user_error(ValueError, prefix=f"sam_{name}: "):
                    values[name] = int(text) if re.fullmatch(r"\d+", text) else float(text)
        if values["perturb"] is not None:
            patterns = [pattern.strip() for pattern in values["perturb"].split(",")]
            values["perturb"] = patterns[0] if len(patterns) == 1 else patterns
        options = values["options"]
        if isinstance(options, str):
            with as_user_error(ValueError, prefix=f"sam_options={options!r} is not a JSON object: "):
                options = dict(json.loads(options))
        with as_user_error(ValueError):
            values |= load_parts(values["ascent"], values["descent"], options)
        with as_user_error(ValueError, prefix="sam_"):
            return SAMConfig(**values)


def _argument_type(hint: Any) -> Any:
    """Return the type `argparse` uses for a `SAMConfig` field: its own type if it has a single one, otherwise text."""
    kinds = [kind for kind in getattr(hint, "__args__", (hint,)) if kind is not type(None)]
    return kinds[0] | None if len(kinds) == 1 and kinds[0] in (str, int, float, bool) else str | None


_HINTS = get_type_hints(SAMConfig)
SAMArguments = dataclasses.make_dataclass(
    "SAMArguments",
    [
        (
            f"sam_{field.name}",
            _argument_type(_HINTS[field.name]),
            dataclasses.field(
                default="sam" if field.name == "method" else None,
                metadata={"help": described(SAMConfig)[field.name].replace("%", "%%")},
            ),
        )
        for field in dataclasses.fields(SAMConfig)
    ],
    bases=(_SAMArguments,),
)
