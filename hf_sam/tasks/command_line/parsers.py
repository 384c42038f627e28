"""Parsers of the tasks without dataclasses: `compare`, `find-rho`, `demo`. Imports nothing slow."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

from ...evaluation.metrics import METRICS_KEPT
from ...suggestions import did_you_mean
from .. import TRAINING
from .config_files import find_config, resolve, unknown_key
from .errors import UserError
from .help import HELP_ALL, command_words, describe

DEMO_SEEDS = 3


class Parser(argparse.ArgumentParser):
    """A parser that raises `UserError` on mistakes."""

    def __init__(self, task: str, description: str | None = None):
        super().__init__(
            prog=" ".join(command_words(task)),
            description=description or describe(task),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument(*HELP_ALL, action="help", help=argparse.SUPPRESS)  # --help already shows every option

    def error(self, message: str):
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        known = [action.dest for action in self._actions]
        raise UserError(unknown_key(unknown[1], known) if unknown else message)


EXECUTORS = ("local", "ray", "slurm")


def add_executor_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose where the runs of a study are executed."""
    parser.add_argument("--workers", type=int, help="Number of simultaneous runs on this machine; default: 1.")
    parser.add_argument(
        "--executor", choices=EXECUTORS, help="Where to execute the runs; default: local, this machine."
    )
    parser.add_argument(
        "--executor_options",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="Options of the executor; see docs/clusters.md.",
    )


def check_workers(workers: int | None) -> None:
    """
    Check the number of workers.

    Raises:
        UserError: If it is less than one.
    """
    if workers is not None and workers < 1:
        raise UserError(f"workers={workers} must be at least 1.")


# --- compare -----------------------------------------------------------------------------------------------------------


def study_parser() -> argparse.ArgumentParser:
    parser = Parser("compare")
    parser.add_argument("study", nargs="?", help="YAML file of the comparison, or the name of a shipped one.")
    parser.add_argument("--output_dir", type=Path, help="Output folder; overrides the YAML.")
    parser.add_argument("--seeds", type=int, nargs="+", help="Seeds; override those in the YAML.")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="Only the runs of these arms.")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="Only the runs of these tasks.")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="Settings to override in every run.")
    parser.add_argument("--plan", action="store_true", help="Print the plan and exit.")
    parser.add_argument("--report", action="store_true", help="Report on the finished runs, without running anything.")
    parser.add_argument("--retry_failed", action="store_true", help="Run failed runs again.")
    parser.add_argument("--status", action="store_true", help="Print the state of the runs and exit.")
    parser.add_argument("--cancel", action="store_true", help="Cancel queued and running jobs and exit.")
    parser.add_argument(
        "--external", type=Path, nargs="+", default=[], help="Output folders of plain Trainers to include."
    )
    add_executor_arguments(parser)
    return parser


def parse_study(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """
    Parse the command line of `compare`.

    Raises:
        UserError: If no study is given, or a value is invalid.
    """
    args = study_parser().parse_args(argv)
    if not args.study:
        raise UserError("Give the YAML file of a comparison, such as configs/comparison/digits.yaml.")
    args.study = find_config(args.study, "comparison")
    check_workers(args.workers)
    if args.seeds and len(set(args.seeds)) < len(args.seeds):
        raise UserError(f"seeds={args.seeds} must be distinct whole numbers.")
    for word in args.set:
        if "=" not in word:
            raise UserError(f"--set takes key=value pairs, not {word!r}.")
    for folder in args.external:
        if not folder.is_dir():
            raise UserError(f"external={folder} is not a folder; give the output folder of a Trainer.")
    return args


# --- find-rho ----------------------------------------------------------------------------------------------------------


def search_parser() -> argparse.ArgumentParser:
    parser = Parser("find_rho")
    parser.add_argument("recipe", help=f"{', '.join(TRAINING)}; then its command line.")
    parser.add_argument("--budget", type=float, default=2.0, help="Maximum cost, in ordinary runs without SAM.")
    parser.add_argument("--rhos", type=float, nargs="+", help="Values to try, instead of those that a probe suggests.")
    parser.add_argument(
        "--low",
        type=float,
        help="Smallest value of a geometric grid instead; default with --high: a tenth of the paper's rho.",
    )
    parser.add_argument(
        "--high", type=float, help="Largest value of the grid; default with --low: four times the paper's rho."
    )
    parser.add_argument("--points", type=int, default=4, help="Number of values, besides 0.")
    parser.add_argument("--reduction", type=int, default=2, help="Keep one in this many values at each rung.")
    parser.add_argument(
        "--seeds", type=int, default=3, help="Minimum number of seeds in the confirmation; more if the budget allows."
    )
    parser.add_argument(
        "--annealed",
        action="store_true",
        help="Give short runs a full learning rate schedule, instead of pausing long ones.",
    )
    parser.add_argument("--metric", help=f"Metric to compare: {', '.join(METRICS_KEPT)}; default: detected.")
    parser.add_argument("--plan", action="store_true", help="Print what would run and its cost, then exit.")
    parser.add_argument("--retry_failed", action="store_true", help="Run failed runs again.")
    parser.add_argument("--launcher", default="", help="Command that starts each run, such as 'accelerate launch'.")
    add_executor_arguments(parser)
    return parser


def parse_search(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """
    Parse the options of a search for rho; also return the command line of the recipe.

    Raises:
        UserError: If a value is invalid; the message names the option and what is allowed.
    """
    options, words = search_parser().parse_known_args(argv)
    name = options.recipe.replace("-", "_")
    if name in TRAINING:
        options.recipe = name
    if options.recipe.startswith("-") or options.recipe.endswith((".yaml", ".yml", ".json")):
        raise UserError("Give the recipe first, such as image_classification, then its command line.")
    check_recipe(options.recipe)
    check_workers(options.workers)
    if not math.isfinite(options.budget) or options.budget <= 0:
        raise UserError(f"budget={options.budget:g} must be above 0 (the cost of the search, in ordinary runs).")
    for name, least in (("points", 1), ("seeds", 2), ("reduction", 2)):
        if getattr(options, name) < least:
            raise UserError(f"{name}={getattr(options, name)} must be at least {least}.")
    if options.rhos:
        options.rhos = sorted(
            {float(f"{rho:g}") for rho in options.rhos} - {0.0}
        )  # as in folders; 0 is always included
        if not options.rhos or not all(0 < rho < math.inf for rho in options.rhos):
            raise UserError("rhos must be numbers above 0; 0 is always included.")
    for name in ("low", "high"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{name}={value:g} must be a number above 0; 0 is always included.")
    if options.metric is not None and options.metric not in METRICS_KEPT:
        hint = did_you_mean(options.metric, METRICS_KEPT)
        raise UserError(
            f"metric={options.metric} is not a mean over examples.{hint} Allowed: {', '.join(METRICS_KEPT)}."
        )
    return options, resolve(words, options.recipe)


def check_recipe(name: str) -> None:
    """
    Check that a recipe exists.

    Raises:
        UserError: If the name is neither a training task nor an importable custom module.
    """
    if name not in TRAINING and "." not in name:
        raise UserError(
            f"recipe {name!r} does not exist.{did_you_mean(name, TRAINING)} Allowed: {', '.join(TRAINING)}."
        )


# --- demo --------------------------------------------------------------------------------------------------------------


def demo_parser() -> argparse.ArgumentParser:
    parser = Parser("demo")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"), help="Output folder.")
    parser.add_argument(
        "--processes", type=int, default=min(2, os.cpu_count() or 1), help="Number of simultaneous runs."
    )
    parser.add_argument("--seeds", type=int, default=DEMO_SEEDS, help="Runs per cell of the table.")
    parser.add_argument(
        "--max_steps", type=int, help="Stop every run early, to test the setup; the table is then meaningless."
    )
    return parser


def parse_demo(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """
    Parse the command line of `demo`.

    Raises:
        UserError: If a value is invalid.
    """
    args = demo_parser().parse_args(argv)
    for name in ("processes", "seeds", "max_steps"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"{name}={value} must be at least 1.")
    return args


PARSERS = {"compare": study_parser, "find_rho": search_parser, "demo": demo_parser}
