"""Find and read configuration files, and report unknown arguments; imports nothing slow."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from ...experiments.yaml_loader import UniqueKeyLoader
from ...suggestions import did_you_mean
from .errors import UserError, instead_of, one_line

PACKAGE = Path(__file__).parents[2]
# Inside the package if installed from a wheel, next to it in a clone.
CONFIGS = PACKAGE / "configs" if (PACKAGE / "configs").is_dir() else PACKAGE.parent / "configs"
# What other programs call these arguments.
USUAL_NAMES = {
    "batch_size": "per_device_train_batch_size",
    "bs": "per_device_train_batch_size",
    "data": "dataset",
    "data_dir": "dataset",
    "dataset_name": "dataset",
    "epochs": "num_train_epochs",
    "grad_accum": "gradient_accumulation_steps",
    "gradient_accumulation": "gradient_accumulation_steps",
    "image_col": "image_column",
    "label_column_name": "label_column",
    "lora_rank": "lora_r",
    "lr": "learning_rate",
    "max_seq_length": "max_length",
    "max_train_samples": "train_samples",
    "method": "sam_method",
    "model": "model_name_or_path",
    "model_name": "model_name_or_path",
    "num_epochs": "num_train_epochs",
    "num_steps": "max_steps",
    "out_dir": "output_dir",
    "output": "output_dir",
    "resume": "resume_from_checkpoint",
    "rho": "sam_rho",
    "samples": "num_examples",
    "steps": "max_steps",
    "text_column_name": "text_column",
    "train_batch_size": "per_device_train_batch_size",
    "wd": "weight_decay",
}
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
        words, typed = yaml.load(text, yaml.BaseLoader), yaml.load(text, UniqueKeyLoader)
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
    problem = "cannot be read" if path.exists() else "does not exist"
    return f"Configuration file {path} {problem}.{instead_of(path, others)}"


def unknown_key(word: str, known: Iterable[str]) -> str:
    """Return the error message for an unknown word on the command line or an unknown key in a file."""
    name = word.split("=")[0].lstrip("-").replace("-", "_")
    known = list(known)
    if not re.fullmatch(r"\w+", name):
        return f"{word!r} is not an argument; give `--key value` pairs after the configuration file."
    usual = USUAL_NAMES.get(name)
    hint = f" Did you mean {usual!r}?" if usual in known else did_you_mean(name, known, " --help lists all arguments.")
    return f"{name!r} is not an argument of this recipe.{hint}"
