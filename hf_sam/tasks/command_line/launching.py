"""Run a subcommand in several processes with `accelerate launch`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...suggestions import did_you_mean
from .config_files import CONFIGS
from .errors import UserError

ACCELERATE_CONFIG = "accelerate_config"
NUMBERS = ("num_processes", "num_machines", "machine_rank", "main_process_port")
LAUNCH_OPTIONS = (ACCELERATE_CONFIG, *NUMBERS, "main_process_ip")


def split_launch_options(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """
    Split the command line into the options for `accelerate launch` and the rest.

    Raises:
        UserError: If an option has no value, a value should be a number and is not, or a configuration is unknown.
    """
    options: dict[str, str] = {}
    rest = []
    left = iter(words)
    for word in left:
        key, equals, value = word.partition("=")
        name = key.removeprefix("--").replace("-", "_")
        if not key.startswith("--") or name not in LAUNCH_OPTIONS:
            rest.append(word)
            continue
        value = value if equals else next(left, "")
        if not value or value.startswith("--"):
            raise UserError(f"argument --{name}: expected one argument")
        least = 0 if name == "machine_rank" else 1
        if name in NUMBERS and not (value.isdecimal() and int(value) >= least):
            raise UserError(f"{name}={value} must be a whole number, at least {least}.")
        options[name] = value
    if ACCELERATE_CONFIG in options:
        options[ACCELERATE_CONFIG] = str(find_accelerate_config(options[ACCELERATE_CONFIG]))
    return options, rest


def find_accelerate_config(word: str) -> Path:
    """
    Find a configuration file for Accelerate: a file on disk, or a shipped one by name, such as `fsdp2`.

    Raises:
        UserError: If no such file exists.
    """
    shipped = {path.stem: path for path in sorted((CONFIGS / "accelerate").glob("*.yaml"))}
    found = Path(word) if Path(word).is_file() else shipped.get(word.removesuffix(".yaml"))
    if found is None:
        hint = did_you_mean(word, shipped)
        raise UserError(
            f"{ACCELERATE_CONFIG}={word} is neither a file nor shipped. Shipped: {', '.join(shipped)}.{hint}"
        )
    return found


def launch(name: str, options: Mapping[str, str], words: Sequence[str]) -> None:
    """
    Replace this process by `accelerate launch`.

    Args:
        name (`str`): The subcommand.
        options (`Mapping[str, str]`): The options that `split_launch_options` returned.
        words (`Sequence[str]`): The subcommand's own command line.
    """
    command = launch_words(name, with_default(options), words)
    sys.stdout.flush()
    if os.name == "nt":  # on Windows exec returns to the shell at once
        sys.exit(subprocess.call(command))
    os.execv(command[0], command)


def launch_words(name: str, options: Mapping[str, str], words: Sequence[str]) -> list[str]:
    """Return the whole command."""
    flags = [
        part
        for option, value in options.items()
        for part in ("--config_file" if option == ACCELERATE_CONFIG else f"--{option}", value)
    ]
    return [sys.executable, "-m", "accelerate.commands.launch", *flags, "-m", "hf_sam", name, *words]


def with_default(options: Mapping[str, str]) -> dict[str, str]:
    """
    Add a configuration for the CPU if none is named, the user has no default one, and there is no GPU; without it,
    `accelerate launch --num_processes 2` would start a single process on such a machine.
    """
    if ACCELERATE_CONFIG in options or int(options.get("num_processes", 1)) == 1:
        return dict(options)
    import torch
    from accelerate.commands.config.config_args import default_config_file

    if torch.accelerator.is_available() or Path(default_config_file).is_file():
        return dict(options)
    return {ACCELERATE_CONFIG: str(find_accelerate_config("cpu")), **options}
