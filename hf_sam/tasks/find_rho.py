"""Find a rho for your model and data at the cost of one or two ordinary runs, or learn that SAM does not help there.

    hf-sam find-rho image-classification digits --label_noise 0.4

Give the recipe, its usual command line, and the options of the search, in any order. After an interruption, the same
command resumes. docs/find_rho.md describes the search, the rule for the recommendation, and its limits.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from hf_sam.config import SAMConfig
from hf_sam.update.schedule import Schedule

from ..experiments.driver import drive, make_one, study_lock
from ..experiments.execution import JOB_NAME, LENGTH_NAME, LOG_NAME, remove_checkpoints
from ..experiments.executors import Choice, choose
from ..experiments.json_files import plain, write_json
from ..experiments.records import RECORD_NAME, RecordError, read_record
from ..experiments.workshop import retry_failed
from ..reporting import rho_search as rho_report
from ..rho_search.halving import Rung, SearchPlan, geometric_grid, make_plan
from ..rho_search.phases import PROBE, UNTRAINED, Phase, RhoWorkshop, Search, pass_counter
from ..rho_search.probe import has_a_scale, middle_rho, probe_steps, values_around
from .command_line.arguments import parse_arguments
from .command_line.errors import UserError, as_user_error
from .command_line.help import command_again
from .command_line.parsers import parse_search
from .compare import argument_types
from .output_folder import is_finished
from .studies import interruptible

PLAN_NAME, RESULT_NAME = "search.json", "find_rho.json"
VALIDATION_SIZE = 0.2
RHO_OF_THE_PAPER = 0.05  # Foret et al. 2021


def main(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    options, words = parse_search(argv)
    types = argument_types(options.recipe)
    args, sam_config, data_args = parse_recipe(types, words, sam_rho=1e30)  # any rho: this is about the method
    rhos = options.rhos or grid(options, sam_config)
    configs = [parse_recipe(types, words, sam_rho=rho)[1] for rho in rhos]  # invalid values fail before any run
    settings = {} if data_args.validation_size or data_args.validation_split else {"validation_size": VALIDATION_SIZE}
    if settings and data_args.streaming:
        raise UserError(
            "A search needs a validation split, which cannot be taken from a streamed training split. Give --validation_split."
        )

    with as_user_error(ValueError, prefix=f"launcher={options.launcher!r} is not a command: "):
        launcher = shlex.split(options.launcher)
    output_dir = Path(args.output_dir) / "find_rho"
    search = Search(
        output_dir,
        launcher,
        options.recipe,
        tuple(words),
        settings,
        tuple(rhos),
        args.seed,
        options.metric,
        plan=None,
    )
    choice = choose({}, options.executor, options.workers, options.executor_options)
    length = find_length(search, choice)
    with as_user_error(ValueError):
        begins = Schedule.resolve(sam_config, length, args.get_warmup_steps(length)).start
    are_given = bool(options.rhos or options.low or options.high)
    is_probed = not are_given and has_a_scale(sam_config) and begins < probe_steps(length)
    plan = plan_of(options, length, probe_steps(length) if is_probed else 0, configs, args.get_warmup_steps)
    if is_probed and not options.plan:
        search = dataclasses.replace(search, rhos=tuple(probed(search, plan.probe, options.points, choice)))
    if options.annealed:
        search = dataclasses.replace(search, settings={**settings, "max_steps": plan.horizon})
    workshop = RhoWorkshop(dataclasses.replace(search, plan=plan))
    print_plan(workshop.search, options.budget, values_follow=is_probed and options.plan)
    if options.plan:
        return None
    keep_plan(workshop.search)
    if options.retry_failed:
        print(f"Retrying {retry_failed(workshop)} failed runs.")
    make_all(workshop, choice)
    typed = sys.argv[1:] if argv is None else argv
    again = command_again("find_rho", [word for word in typed if word != "--retry_failed"])
    return report(workshop, options.budget, again)


def parse_recipe(
    types: Sequence[type], words: Sequence[str], sam_rho: float
) -> tuple[TrainingArguments, SAMConfig, Any]:
    """The training, SAM and data arguments of the recipe, parsed from the user's command line with another rho."""
    parsed = parse_arguments(types, [*words, f"--sam_rho={sam_rho}"])
    by_name = {type(values).__name__: values for values in parsed}
    training = next(values for values in parsed if isinstance(values, TrainingArguments))
    return training, by_name["SAMArguments"].to_config(), by_name["DataArguments"]


def grid(options: argparse.Namespace, sam_config: SAMConfig) -> list[float]:
    """The grid of rho: by default, from a tenth to four times the rho of the method's paper."""
    usual = sam_config.row.defaults.get("rho", RHO_OF_THE_PAPER)
    low, high = options.low or usual / 10, options.high or usual * 4
    if low >= high and options.points > 1:
        raise UserError(f"low={low:g} must be below high={high:g}.")
    return geometric_grid(low, high, options.points)


def find_length(search: Search, choice: Choice) -> int:
    """
    The number of optimizer steps of an ordinary run.

    A run is started and stopped before its first step: the Trainer itself determines its length, errors in model or
    data show up, and the untrained model is evaluated.

    Raises:
        UserError: The run failed; the message is the run's own.
    """
    folder = make_alone(search, choice, UNTRAINED, {"sam_rho": 0}, 0, LENGTH_NAME)
    return json.loads((folder / LENGTH_NAME).read_text())["max_steps"]


def probed(search: Search, steps: int, points: int, choice: Choice) -> list[float]:
    """
    `points` values around the rho at which sharpness is a tenth of the loss; `search.rhos` if that cannot be measured.

    A run with the smallest of `search.rhos` logs it in the first `steps` steps.

    Raises:
        UserError: The run failed; the message is the run's own.
    """
    settings = {"sam_rho": search.rhos[0], "logging_strategy": "steps", "logging_steps": 1}
    folder = make_alone(search, choice, PROBE, settings, steps, RECORD_NAME)
    remove_checkpoints(folder)
    middle = middle_rho(read_record(folder / RECORD_NAME).curves)
    if middle is None:
        print(f"probe: sharpness could not be measured in {steps} steps; the values are the usual ones")
        return list(search.rhos)
    print(f"probe: sharpness is a tenth of the loss at about rho {middle:.2g} ({steps} steps)")
    return values_around(middle, points)


def make_alone(search: Search, choice: Choice, name: str, settings: dict[str, Any], pause_at: int, result: str) -> Path:
    """
    Make one run beside the search, unless it is there already; return its folder.

    Args:
        search (`Search`): The search.
        choice (`Choice`): The executor.
        name (`str`): The run's arm, and its folder in that of the search.
        settings (`dict`): The run's own settings.
        pause_at (`int`): The step after which it stops.
        result (`str`): The file that it leaves.

    Raises:
        UserError: The run failed; the message is the run's own.
    """
    folder = search.output_dir / name
    job = search.job(folder, name, settings, pause_at)

    def is_there() -> bool:  # a kill may come between the record and the other file
        return is_finished(folder) and (folder / result).exists()

    with study_lock(search.output_dir):
        if not is_there() or json.loads((folder / JOB_NAME).read_text()) != job:
            shutil.rmtree(folder, ignore_errors=True)
            write_json(folder / JOB_NAME, job)
            make_one(folder, choice.make(search.launcher), result)
    if not is_there():
        raise UserError(_error_in(folder))
    return folder


def plan_of(
    options: argparse.Namespace,
    length: int,
    probe: int,
    configs: Sequence[SAMConfig],
    warmup_steps: Callable[[int], int],
) -> SearchPlan:
    """
    The plan of the search within the budget, for ordinary runs of `length` steps and a probe of `probe` steps.

    Raises:
        UserError: The budget is too small, or the method does not perturb before the end of the first rung.
    """
    with as_user_error(ValueError):
        plan = make_plan(
            length,
            len(configs),
            options.budget,
            pass_counter(configs[0], warmup_steps),
            seeds=options.seeds,
            reduction=options.reduction,
            annealed=options.annealed,
            probe=probe,
        )
        begins = Schedule.resolve(configs[0], plan.schedule, warmup_steps(plan.schedule)).start
    first = (*plan.rungs, Rung(plan.horizon, 1))[0].step
    if begins >= first:
        raise UserError(
            f"method={configs[0].method} perturbs from step {begins} of {plan.schedule} on, but runs are first compared "
            f"after step {first}. Raise the budget, give fewer points, lower sam_start, or try --annealed."
        )
    return plan


def _error_in(folder: Path) -> str:
    """The error that ended the run in `folder`."""
    try:
        error = read_record(folder / RECORD_NAME).error
    except RecordError:
        error = None
    return error["message"] if error else f"The run ended without a result; see {folder / LOG_NAME}."


def keep_plan(search: Search) -> None:
    """
    Write the settings of the search to its folder.

    Raises:
        UserError: The folder contains a search with other settings.
    """
    path = search.output_dir / PLAN_NAME
    content = plain(dataclasses.asdict(search))
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in content if content[name] != before.get(name)]
        if changed:
            raise UserError(
                f"{search.output_dir} contains a search with other settings ({', '.join(changed)}). Repeat its command, "
                "delete that folder, or choose another output_dir."
            )
    write_json(path, content)


def print_plan(search: Search, budget: float, values_follow: bool) -> None:
    """Print the runs of the search and their cost; the values of rho are not known if they follow from the probe."""
    plan = search.plan
    share = f"{100 * plan.horizon / plan.length:.0f} %"
    if values_follow:
        print(
            f"rho: 0, and {len(search.rhos)} values around the one at which sharpness is a tenth of the loss, from a probe of "
            f"{plan.probe} steps"
        )
    else:
        print(f"rho: 0, {', '.join(f'{rho:g}' for rho in search.rhos)}")
    for number, rung in enumerate(plan.rungs, start=1):
        print(f"rung {number}: 0 and {rung.rhos} values up to step {rung.step}, seed {search.seed}")
    how = "annealed to that length" if plan.schedule == plan.horizon else "with the schedule of the whole run"
    print(
        f"confirmation: 0 and the best value up to step {plan.horizon}, {plan.seeds} other seeds; fewer if the first settle "
        "the question"
    )
    print(f"Runs cover {share} of an ordinary run of {plan.length} steps, {how}.")
    print(
        f"Cost: at most {plan.passes:g} gradient passes, {plan.passes / plan.length:.2f} ordinary runs; budget {budget:g}.",
        flush=True,
    )


def make_all(workshop: RhoWorkshop, choice: Choice) -> None:
    """Run every phase, rung by rung."""

    def tell(phase: Phase, what: str) -> None:
        print(f"{what:>10}  rho {phase.rho:g}, seed {phase.seed}, steps {phase.begin} to {phase.end}", flush=True)

    with interruptible(choice):
        drive(workshop, choice, tell)


def next_command(recipe: str, words: Sequence[str], rho: float) -> str:
    """The command that trains with the recommended rho, by `hf-sam` or a script, as the search itself was started."""
    return command_again(recipe, [*words, f"--sam_rho={rho:g}"])


def failed_control(workshop: RhoWorkshop) -> Phase | None:
    """Return a run with `rho = 0` whose failure leaves no answer: the first of all, or both runs of a pair failed."""
    stages, plan = workshop.stages(), workshop.search.plan
    confirmation = stages[-1] if len(stages) > len(plan.rungs) else []
    broken = [phase.control for phase in confirmation if phase.rho and workshop.score(phase) is None]
    return next((phase for phase in (stages[0][0], *broken) if workshop.score(phase) is None), None)


def report(workshop: RhoWorkshop, budget: float, again: str) -> dict[str, Any]:
    """
    Write and print the result.

    Raises:
        UserError: Runs with `rho = 0` failed, so there is nothing to compare with.
    """
    search = workshop.search
    if (phase := failed_control(workshop)) is not None:
        raise UserError(
            f"The run with rho=0 and seed {phase.seed} failed or diverged, so there is no answer: "
            f"{_error_in(workshop.folder(phase))} Fix the cause and repeat the command with --retry_failed."
        )
    points = rho_report.curve(workshop)
    rho, _, sentence = rho_report.conclusion(workshop)
    command = next_command(search.recipe, search.words, rho)
    found = plain(rho_report.summary(workshop, points, budget, command))
    write_json(search.output_dir / RESULT_NAME, found)
    points.to_csv(search.output_dir / "find_rho.csv", index=False)
    page = rho_report.write_rho_report(workshop, points, found, again)
    print(f"\n{rho_report.table(points)}\n\n{sentence}")
    print(f"Spent: {found['passes']['spent']:g} of {found['passes']['allowed']:g} gradient passes.")
    print(f"Written: {search.output_dir}/find_rho.json, find_rho.csv\nReport: {page}\n\nTrain with\n\n    {command}")
    return found
