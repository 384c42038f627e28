"""Run a task as a program, checking its command line before anything slow is imported."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from .. import TRAINING
from . import early
from .config_files import resolve
from .errors import run
from .help import heading, wants_help
from .parsers import PARSERS

# Folder that may be omitted from the names of the shipped configurations of a task.
CONFIG_FOLDERS = {**{name: name for name in TRAINING}, "benchmark": "benchmark"}


def run_task(name: str, argv: Sequence[str] | None = None) -> None:
    """
    Run a task of `hf_sam.tasks` and exit with the proper code.

    Args:
        name (`str`): The module, such as `"image_classification"`.
        argv (`Sequence[str]`, *optional*, defaults to `sys.argv[1:]`): Its command line.
    """
    words = list(sys.argv[1:] if argv is None else argv)

    def main() -> None:
        if wants_help(words) and name in PARSERS:
            PARSERS[name]().print_help()
        elif wants_help(words):
            print(heading(name), flush=True)
            import_module(f"hf_sam.tasks.{name}").main(words)  # lists the options and exits
        else:
            given = look_over(name, words)
            import_module(f"hf_sam.tasks.{name}").main(given)

    run(main)


def look_over(name: str, words: Sequence[str]) -> list[str]:
    """
    Check the command line and replace the names of shipped configurations by their paths.

    Raises:
        UserError: If the command line has an error that can be found without importing torch.
    """
    words = resolve(words, CONFIG_FOLDERS[name]) if name in CONFIG_FOLDERS else list(words)
    early.check(name, words)
    return words
