"""A task as a program: what is wrong with its command line is said before anything slow is imported."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from . import early
from .errors import run


def run_task(name: str, argv: Sequence[str] | None = None) -> None:
    """
    Run a task of `hf_sam.tasks` and end the process as a program does.

    Args:
        name (`str`): The module, such as `"image_classification"`.
        argv (`Sequence[str]`, *optional*, defaults to `sys.argv[1:]`): Its command line.
    """
    words = list(sys.argv[1:] if argv is None else argv)

    def main() -> None:
        if {"-h", "--help"}.isdisjoint(words):
            early.check(name, words)
        import_module(f"hf_sam.tasks.{name}").main(words)

    run(main)
