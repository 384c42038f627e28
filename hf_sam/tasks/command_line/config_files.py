"""Find and read configuration files, and report unknown arguments; imports nothing slow."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from ...suggestions import did_you_mean
from .errors import UserError, one_line

PACKAGE = Path(__file__).parents[2]
# Inside the package if installed from a wheel, next to it in a clone.
CONFIGS = PACKAGE / "configs" if (PACKAGE / "configs").is_dir() else PACKAGE.parent / "configs"
CONFIG_SUFFIXES = (".yaml", ".yml", ".json")


def shipped_configs() -> dict[str, Path]:
    """Return the configuration files shipped with the package, by name, such as `image_classification/digits`."""
    files = sorted(CONFIGS.glob("*/*.yaml"))
    return {file.relative_to(CONFIGS).with_suffix("").as_posix(): file for file in files}


def find_config(word: str, folder: str | None = None) -> Path:
    """
    Find the configuration file named by `word`: a file on disk, otherwise a shipped one.

    Args:
        word (`str`): A path, or the name of a shipped file; the prefix `configs/` and the suffix `.yaml` are optional.
        folder (`str`, *optional*): The folder of shipped files whose names may omit it. If `None`, any unique name may
            omit its folder.

    Raises:
        UserError: If no such file exists; the message suggests the nearest name.
    """
    if Path(word).is_file():
        return Path(word)
    shipped = shipped_configs()
    name = word.removeprefix("configs/").removesuffix(".yaml")
    found = shipped.get(name) or shipped.get(f"{folder}/{name}")
    if found is not None:
        return found
    called_so = [known for known in shipped if folder is None and known.endswith(f"/{name}")]
    if len(called_so) == 1:
        return shipped[called_so[0]]
    if called_so:
        raise UserError(f"Several configurations are named {name}: {', '.join(called_so)}; add the folder.")
    in_folder = [known.split("/")[1] for known in shipped if folder is None or known.startswith(f"{folder}/")]
    near = did_you_mean(name, [*in_folder, *shipped])
    if near or Path(word).suffix not in CONFIG_SUFFIXES:
        hint = near or " `hf-sam configs` lists them."
        raise UserError(f"{word} is neither a file nor the name of a shipped configuration.{hint}")
    raise UserError(_unreadable(Path(word)))


def config_name(path: str) -> str | None:
    """Return the name of a shipped configuration file given its full path; `None` for any other word."""
    is_shipped = path.endswith(".yaml") and CONFIGS in Path(path).parents
    return Path(path).relative_to(CONFIGS).with_suffix("").as_posix() if is_shipped else None


def resolve(argv: Sequence[str], folder: str | None) -> list[str]:
    """
    Replace the names of shipped configurations at the start of the command line by their paths.

    Raises:
        UserError: See `find_config`.
    """
    count = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    return [*(str(find_config(word, folder)) for word in argv[:count]), *argv[count:]]


def split_command_line(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the command line into the configuration files at its start and the options that follow."""
    is_file = [
        word.endswith(CONFIG_SUFFIXES) and not word.startswith("-") for word in argv
    ]  # --dataset=a.json is not one
    count = next((i for i, found in enumerate(is_file) if not found), len(argv))
    return list(argv[:count]), list(argv[count:])


def read_layers(path: Path, above: tuple[Path, ...] = ()) -> list[tuple[str, dict[str, Any]]]:
    """Return name and keys of a configuration file, preceded by those of its `base`; raises like `read_config`."""
    if path.resolve() in above:
        raise UserError(f"{path} is its own base; remove that `base:`.")
    try:
        text = path.read_text(encoding="utf-8")
        words, typed = yaml.load(text, yaml.BaseLoader), yaml.safe_load(text)
    except OSError:
        raise UserError(_unreadable(path)) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {one_line(error)}") from None
    if not isinstance(typed, dict):
        raise UserError(f"{path} must contain lines of the form `key: value`.")
    values = {key: typed[key] if isinstance(typed[key], dict) else words[key] for key in words if key in typed}
    values = {key: None if typed[key] is None else value for key, value in values.items()}
    below = []
    if "base" in values:
        base = str(values.pop("base"))
        beside = path.parent / base
        known = shipped_configs().get(base.removesuffix(".yaml"))
        below = read_layers(known if known and not beside.is_file() else beside, (*above, path.resolve()))
    return [*below, (path.name, values)]


def _unreadable(path: Path) -> str:
    others = sorted(p.name for p in path.parent.glob("*") if p.suffix in CONFIG_SUFFIXES)
    there = f" {path.parent} contains: {', '.join(others)}." if others else ""
    return f"Configuration file {path} cannot be read.{there}"


def unknown_key(word: str, known: Iterable[str]) -> str:
    """Return the error message for an unknown word on the command line or an unknown key in a file."""
    name = word.split("=")[0].lstrip("-").replace("-", "_")
    if not re.fullmatch(r"\w+", name):
        return f"{word!r} is not an argument; give `--key value` pairs after the configuration file."
    return f"{name!r} is not an argument of this recipe.{did_you_mean(name, known, ' --help lists all arguments.')}"
