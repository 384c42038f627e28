"""Configuration files as they lie on disk, and words that are no argument; imports nothing that takes time."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from ...suggestions import did_you_mean
from .errors import UserError, one_line

# Beside the package in a clone, inside it where a wheel was installed.
CONFIGS = next(folder for up in (3, 2) if (folder := Path(__file__).parents[up] / "configs").is_dir() or up == 2)
CONFIG_SUFFIXES = (".yaml", ".yml", ".json")


def split_command_line(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The configuration files that lead the command line, and the options that follow."""
    count = next((i for i, word in enumerate(argv) if not word.endswith(CONFIG_SUFFIXES)), len(argv))
    return list(argv[:count]), list(argv[count:])


def read_layers(path: Path, above: tuple[Path, ...] = ()) -> list[tuple[str, dict[str, Any]]]:
    """Name and keys of a configuration file, after those of its `base`; raises like `read_config`."""
    if path.resolve() in above:
        raise UserError(f"{path} is its own base; remove that `base:`.")
    try:
        text = path.read_text(encoding="utf-8")
        words, typed = yaml.load(text, yaml.BaseLoader), yaml.safe_load(text)
    except OSError:
        others = sorted(p.name for p in path.parent.glob("*") if p.suffix in CONFIG_SUFFIXES)
        there = f" {path.parent} has: {', '.join(others)}." if others else ""
        raise UserError(f"Configuration file {path} cannot be read.{there}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no YAML: {one_line(error)}") from None
    if not isinstance(typed, dict):
        raise UserError(f"{path} must hold lines of the form `key: value`.")
    values = {key: typed[key] if isinstance(typed[key], dict) else words[key] for key in words if key in typed}
    values = {key: None if typed[key] is None else value for key, value in values.items()}
    below = []
    if "base" in values:
        below = read_layers(path.parent / str(values.pop("base")), (*above, path.resolve()))
    return [*below, (path.name, values)]


def unknown_key(word: str, known: Iterable[str]) -> str:
    """The message for a word on the command line, or a key of a file, that is no argument."""
    name = word.split("=")[0].lstrip("-").replace("-", "_")
    if not re.fullmatch(r"\w+", name):
        return f"{word!r} is no argument: give `--key value` pairs, after the configuration file."
    return f"{name!r} is no argument of this recipe.{did_you_mean(name, known, ' --help lists all arguments.')}"
