"""What all commands that make many runs do alike: show or cancel their jobs, and end cleanly on Ctrl-C."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ..experiments.driver import cancel_all
from ..experiments.executors import Choice
from ..experiments.standing import describe_standing, standing_of
from ..experiments.workshop import Workshop


def cancelled_or_shown(workshop: Workshop, choice: Choice, cancel: bool, status: bool) -> bool:
    """Cancel the jobs or print their state, if asked to; return whether the command has thereby done its work."""
    if cancel:
        print(f"Cancelled {cancel_all(workshop, choice)} jobs. Repeat the command without --cancel to resume.")
    elif status:
        print(describe_standing(standing_of(workshop, choice)))
    return cancel or status


@contextmanager
def interruptible(choice: Choice) -> Iterator[None]:
    """Turn Ctrl-C into one line that says how to resume, and exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        stays = "" if choice.kind == "local" else "Submitted jobs continue. "
        print(f"\nInterrupted. {stays}Repeat the command to resume.", file=sys.stderr)
        sys.exit(130)
