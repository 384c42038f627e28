"""The `hf-sam` command and its table of subcommands."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from ... import __version__
from ...suggestions import did_you_mean
from .. import TRAINING
from .errors import UserError, run
from .help import HELP, HELP_ALL, summary_of, terminal_width, wants_help
from .launching import launch, split_launch_options
from .program import look_over, run_task

PACKAGE = Path(__file__).parents[2]


@dataclass(frozen=True)
class Subcommand:
    """
    What `hf-sam NAME` runs.

    Args:
        group (`str`): Its heading in `hf-sam --help`.
        module (`str`): Module inside `hf_sam` with a `main(argv)`; the first line of its docstring is the summary.
        launches (`bool`): Whether it can run in several processes with `accelerate launch`.
    """

    group: str
    module: str
    launches: bool = False

    @property
    def task(self) -> str | None:
        """The name of its module in `hf_sam.tasks`, if it is one."""
        folder, _, name = self.module.rpartition(".")
        return name if folder == "tasks" else None

    @property
    def summary(self) -> str:
        return summary_of(PACKAGE / f"{self.module.replace('.', '/')}.py")


SUBCOMMANDS = {
    **{name.replace("_", "-"): Subcommand("Train", f"tasks.{name}", launches=True) for name in TRAINING},
    "flatten": Subcommand("Train", "tasks.flatten"),
    "find-rho": Subcommand("Train", "tasks.find_rho"),
    "compare": Subcommand("Compare and measure", "tasks.compare"),
    "report": Subcommand("Compare and measure", "tasks.report"),
    "sharpness": Subcommand("Compare and measure", "tasks.sharpness", launches=True),
    "benchmark": Subcommand("Compare and measure", "tasks.benchmark", launches=True),
    "survival": Subcommand("Compare and measure", "tasks.survival"),
    "forgetting": Subcommand("Compare and measure", "tasks.forgetting"),
    "demo": Subcommand("Compare and measure", "tasks.demo"),
    "methods": Subcommand("Look up", "tasks.command_line.methods"),
    "configs": Subcommand("Look up", "tasks.command_line.configs"),
    "env": Subcommand("Look up", "tasks.command_line.environment"),
    "completion": Subcommand("Look up", "tasks.command_line.completion"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """
    Run a subcommand and exit with the proper code.

    Args:
        argv (`Sequence[str]`, *optional*, defaults to `sys.argv[1:]`): The subcommand and its command line.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    run(lambda: _main(words))


def _main(words: Sequence[str]) -> None:
    if not words or words[0] in (*HELP, *HELP_ALL, "help"):
        print(overview())
        return
    if words[0] in ("-V", "--version", "version"):
        print(f"hf-sam {__version__}")
        return
    name, rest = words[0].replace("_", "-"), list(words[1:])
    if name not in SUBCOMMANDS:
        hint = did_you_mean(name, SUBCOMMANDS, " `hf-sam --help` lists them.")
        raise UserError(f"{words[0]!r} is not a subcommand of hf-sam.{hint}")
    subcommand = SUBCOMMANDS[name]
    if subcommand.task is None:
        import_module(f"hf_sam.{subcommand.module}").main(rest)
        sys.stdout.flush()
        return
    if subcommand.launches and not wants_help(rest):
        options, rest = split_launch_options(rest)
        if options:
            look_over(subcommand.task, rest)
            launch(name, options, rest)
            return
    run_task(subcommand.task, rest)


def overview() -> str:
    """Return the text of `hf-sam --help`."""
    width = min(terminal_width(), 120)
    lead = max(map(len, SUBCOMMANDS)) + 4
    lines = ["usage: hf-sam SUBCOMMAND [CONFIG] [--key value ...]", "", summary_of(PACKAGE / "__init__.py")]
    for group in dict.fromkeys(subcommand.group for subcommand in SUBCOMMANDS.values()):
        lines += ["", f"{group}:"]
        for name, subcommand in SUBCOMMANDS.items():
            if subcommand.group == group:
                lines += textwrap.wrap(
                    subcommand.summary, width, initial_indent=f"  {name}".ljust(lead), subsequent_indent=" " * lead
                )
    lines += [
        "",
        "hf-sam SUBCOMMAND --help shows the most used options, --help-all every one.",
        "With --accelerate_config NAME|FILE or --num_processes N, training, sharpness and benchmark run under",
        "`accelerate launch`.",
    ]
    return "\n".join(lines)
