"""Compare arms (AdamW, SGD, any SAM method, averaged weights) on tasks, paired over seeds, and write a report.

    hf-sam compare digits --plan      # print what would run
    hf-sam compare digits             # run what is missing, then report

Repeat the command to resume. --workers 4 executes four runs at a time on this machine, --executor ray or slurm submits
them to a cluster (docs/clusters.md), and --status prints their state.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainingArguments

from hf_sam.config import SAMConfig

from ..experiments.driver import drive
from ..experiments.execution import LOG_NAME, PLACE_NAME, load_task
from ..experiments.executors import Choice, choose
from ..experiments.external_runs import find_external_runs
from ..experiments.json_files import write_json
from ..experiments.method_settings import explain, merge
from ..experiments.plan import (
    BUDGETS,
    OF_THE_STUDY,
    Plan,
    Run,
    averaging_of,
    command_line,
    describe,
    final_runs,
    layers_of,
    mean_passes,
    saving,
)
from ..experiments.plan_file import read_plan
from ..experiments.records import ENDED, RECORD_NAME
from ..experiments.standing import progress, reason
from ..experiments.workshop import Workshop, counts, records_of, retry_failed
from ..reporting.comparison import write_report
from ..reporting.statistics import detectable_effect, established_effect
from ..suggestions import did_you_mean
from .command_line.arguments import parse_arguments, read_config, read_layers
from .command_line.errors import UserError, as_user_error, one_line
from .command_line.help import command_again
from .command_line.options import DataArguments
from .command_line.parsers import check_recipe, parse_study
from .studies import cancelled_or_shown, interruptible

PLAN_NAME = "comparison.json"
MAX_REASONS = 5
PROGRESS_SECONDS = 1.0  # between two progress lines
REPORT_SHARE, REPORT_SECONDS = 0.05, 60.0  # interim reports: maximum share of the time, minimum seconds between two


def main(argv: Sequence[str] | None = None) -> Path | None:
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parse_study(argv)
    plan = plan_of(args)
    choice = choose(plan.executor, args.executor, args.workers, args.executor_options)
    workshop = open_workshop(plan, args.tasks, args.arms)
    if cancelled_or_shown(workshop, choice, args.cancel, args.status):
        return None
    workshop.check_unchanged(retry_failed=args.retry_failed)
    print_plan(workshop, choice.options.get("workers", 1))
    if args.plan:
        return None
    if args.retry_failed:
        print(f"Retrying {retry_failed(workshop)} failed runs.")
    command = command_again("compare", [word for word in argv if word not in ("--report", "--retry_failed")])
    if not args.report:
        write_json(plan.output_dir / PLAN_NAME, describe(plan))
        make_all(workshop, choice, lambda: report_on(workshop, args.external, command=command))
    failures = describe_failures(workshop)
    report = report_on(workshop, args.external, failures, command)
    print(f"\nReport: {report}")
    if failures and not args.report:
        raise UserError(failures)
    return report


def describe_failures(workshop: Workshop) -> str:
    """The number of failed runs, their reasons and the fix; empty if none failed."""
    outcomes = map(workshop.record, workshop.all_runs())
    failed = [record for record in outcomes if record is not None and record.status == "failed"]
    if not failed:
        return ""
    reasons = Counter(reason(record) for record in failed)
    listed = "; ".join(
        f"{reason.removesuffix('.')}{f' ({count} x)' if count > 1 else ''}"
        for reason, count in reasons.most_common(MAX_REASONS)
    )
    total = sum(counts(workshop)[name] for name in ("finished", "failed", "begun", "waiting"))
    return (
        f"{len(failed)} of {total} runs failed: {listed}. See the log {failed[0].path.parent}/{LOG_NAME}; "
        f"fix the cause and repeat the command with --retry_failed."
    )


def plan_of(args: argparse.Namespace) -> Plan:
    """The plan from the YAML file, with overrides from the command line."""
    plan = read_plan(args.study, args.output_dir)
    given = dict(word.split("=", 1) for word in args.set)
    settings = merge([("settings of the study", plan.settings), ("--set", given)]).values
    return dataclasses.replace(plan, seeds=args.seeds or plan.seeds, settings=settings)


def open_workshop(plan: Plan, tasks: Sequence[str] | None = None, arms: Sequence[str] | None = None) -> Workshop:
    """
    The plan with its runs, or those of some tasks and arms. Every arm of every task is parsed as its recipe would parse it.

    Raises:
        UserError: An arm is not valid for its recipe; the message names task and arm. Or a chosen name is unknown.
    """
    for what, chosen, known in (("tasks", tasks, plan.tasks), ("arms", arms, plan.arms)):
        for name in chosen or ():
            if name not in known:
                raise UserError(
                    f"--{what}: {name!r} is unknown.{did_you_mean(name, known)} Allowed: {', '.join(known)}."
                )
    for arm in plan.arms.values():
        averaging_of(arm)
    if plan.sharpness is not None:
        check_sharpness(plan)
    parsed = {(task, arm): parse_arm(plan, task, arm) for task in plan.tasks for arm in plan.arms}

    def passes(task: str, arm: str) -> float:
        args, sam_config, _ = parsed[task, arm]
        steps = args.max_steps if args.max_steps > 0 else 1000  # with epochs, only proportions matter
        return mean_passes(sam_config, steps, args.get_warmup_steps(steps))

    def length(run: Run) -> dict[str, Any]:
        args, *_ = parsed[run.task, run.arm]
        return {"max_steps": args.max_steps} if args.max_steps > 0 else {"num_train_epochs": args.num_train_epochs}

    in_force = {key: words for key, (*_, words) in parsed.items()}
    bases = {
        name: {key: str(value) for key, value in read_config(Path(task["config"])).items()}
        for name, task in plan.tasks.items()
        if task.get("config")
    }
    # The whole plan sets the length of every run, so that a part of it makes the same ones.
    runs = [
        run for run in final_runs(plan, passes) if run.task in (tasks or plan.tasks) and run.arm in (arms or plan.arms)
    ]
    return Workshop(plan, runs, length, in_force, bases)


def parse_arm(plan: Plan, task: str, arm: str) -> tuple[TrainingArguments, SAMConfig, str]:
    """
    Parse an arm under every condition as its recipe would.

    Returns:
        `tuple`: The training arguments, the SAM configuration, and a description of the latter.

    Raises:
        UserError: A value is invalid, or the arm's SAM settings have no effect.
    """
    types = argument_types(plan.tasks[task]["recipe"])
    config = plan.tasks[task].get("config")
    for name in plan.conditions:
        layers = layers_of(plan, task, name, arm)
        check_settings([*layers, ("tuning", plan.tuning.of(arm) if plan.tuning else {})])
        try:
            parsed = parse_arguments(
                types, command_line(config, {**merge(layers).values, **saving(plan)}, plan.output_dir)
            )
            sam_args = next(values for values in parsed if type(values).__name__ == "SAMArguments")
            sam_config = sam_args.to_config()
            for values in parsed:
                if isinstance(values, DataArguments):
                    values.check_validation_samples()
            in_force = explain(sam_config, merge([*(read_layers(Path(config)) if config else []), *layers]))
        except (UserError, ValueError) as error:
            raise UserError(f"task {task}, condition {name}, arm {arm}: {error}") from error
    check_metric(plan, plan.tasks[task]["recipe"], parsed)
    named = [key for key in plan.arms[arm] if key.startswith("sam_") and key != "sam_rho"]
    if named and sam_config.rho == 0:
        raise UserError(
            f"arm {arm}: {', '.join(named)} has no effect with sam_rho=0, the value of the base recipe. Set sam_rho."
        )
    return next(values for values in parsed if isinstance(values, TrainingArguments)), sam_config, in_force


def check_settings(layers: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """
    Check that no layer sets what the study sets for each run, which would have no effect.

    Raises:
        UserError: One does.
    """
    for where, settings in layers:
        for key in settings.keys() & OF_THE_STUDY.keys():
            raise UserError(
                f"{where}: {key} is set for each run, from `{OF_THE_STUDY[key]}` of the study; leave it out."
            )


def check_sharpness(plan: Plan) -> None:
    """
    Check the arguments for `hf-sam sharpness`, which would otherwise fail after every run.

    Raises:
        UserError: One is unknown or invalid.
    """
    from . import sharpness
    from .checkpoints import TASKS

    recipes = {task["recipe"] for task in plan.tasks.values()}
    words = ["--checkpoints", "-", *command_line(None, plan.sharpness, plan.output_dir)]
    for task in (task for task in TASKS.values() if task.recipe in recipes):
        with as_user_error(UserError, ValueError, prefix="sharpness: "):
            parse_arguments(sharpness.argument_types(task), words)


def check_metric(plan: Plan, recipe: str, parsed: Sequence[Any]) -> None:
    """
    Check that the recipe measures the metric of the question.

    Raises:
        UserError: It does not.
    """
    known, metric = getattr(load_task(recipe), "METRICS", ()), plan.question.metric
    run_args = next((values for values in parsed if type(values).__name__ == "RunArguments"), None)
    if run_args is not None and run_args.hub_metrics:
        return  # the names of hub metrics are known only once they are computed
    if run_args is not None and run_args.evaluate_train:
        known = (*known, *(f"train_{name}" for name in known))
    if known and metric not in known:
        near = did_you_mean(metric, known)
        raise UserError(f"question.metric={metric!r} is not measured by {recipe}.{near} Allowed: {', '.join(known)}.")


def argument_types(recipe: str) -> tuple[type, ...]:
    """
    The dataclasses that a task parses its command line into.

    Raises:
        UserError: The task does not exist, or does not train.
    """
    check_recipe(recipe)
    with as_user_error(ImportError, prefix=f"recipe {recipe!r} cannot be imported: "):
        task = load_task(recipe)
    if not hasattr(task, "ARGUMENTS"):
        raise UserError(f"recipe {recipe!r} has no ARGUMENTS, the tuple of dataclasses of its command line.")
    return tuple(task.ARGUMENTS)


def make_all(workshop: Workshop, choice: Choice, write: Callable[[], object]) -> None:
    """Execute the missing runs, print their progress, and call `write` for an interim report now and then."""
    count = counts(workshop)
    total = sum(count[name] for name in ("finished", "failed", "begun", "waiting"))
    bar = tqdm(total=total, initial=count["finished"] + count["failed"], unit="run", disable=None, dynamic_ncols=True)
    begun: set[Path] = set()
    due, told = time.monotonic() + REPORT_SECONDS, 0.0

    def tell(run: Run, what: str) -> None:
        nonlocal due, told
        name = " | ".join([*run.group, f"seed {run.seed}" if run.trial is None else f"trial {run.trial}"])
        bar.write(f"{what:>10}  {name}")
        if what in ("started", "queued", "attached"):
            begun.add(run.folder)
            return
        begun.discard(run.folder)
        if what == "failed":
            bar.write(f"{'':>10}  {reason(workshop.record(run))}")
        if what in ENDED:
            bar.update()
            if bar.disable and time.monotonic() > told + PROGRESS_SECONDS:
                told = time.monotonic()
                under_way = sum((workshop.plan.output_dir / folder / PLACE_NAME).exists() for folder in begun)
                bar.write(f"{'':>10}  {progress(workshop, max(under_way, 1))}")
            sys.stdout.flush()
            if run.trial is None and time.monotonic() >= due:
                started = time.monotonic()
                try:
                    write()
                except UserError:  # nothing to report yet
                    pass
                except Exception as error:  # the runs continue; the final report would raise the error again
                    bar.write(f"{'':>10}  The interim report failed: {one_line(error)}")
                now = time.monotonic()
                due = now + max(REPORT_SECONDS, (now - started) / REPORT_SHARE)

    with interruptible(choice), bar:
        drive(workshop, choice, tell)


def print_plan(workshop: Workshop, workers: int) -> None:
    """Print the comparison and its runs."""
    plan, count = workshop.plan, counts(workshop)
    arms, tasks = ([*dict.fromkeys(getattr(run, what) for run in workshop.runs)] for what in ("arm", "task"))
    rows = [("arm", "budget", "steps x", "passes x", "settings")]
    for arm in arms:
        first = {run.budget: run for run in workshop.runs if run.arm == arm}
        for budget, run_ in first.items():
            name = " and ".join(BUDGETS[part] for part in budget.split("+"))
            others = {key: value for key, value in plan.arms[arm].items() if not key.startswith("sam_")}
            settings = ", ".join(f"{key}={value}" for key, value in others.items())
            rows.append((arm, name, f"{run_.stretch:.3g}", f"{run_.cost:.3g}", settings or "as the base recipe"))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    print(f"{plan.name}: {plan.question.treatment} against {plan.question.control}, by {plan.question.metric}")
    print(f"tasks {', '.join(tasks)}; conditions {', '.join(plan.conditions)}; seeds {plan.seeds}")
    for row in rows:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)).rstrip())
    print("SAM configuration in force, with the source of each value:")
    for arm in arms:
        told: dict[str, list[str]] = {}
        for task in tasks:
            told.setdefault(workshop.in_force[task, arm], []).append(task)
        for words, its_tasks in told.items():
            where = f" on {', '.join(its_tasks)}" if len(told) > 1 else ""
            print(f"  {arm}{where}: {words}")
    print(describe_power(plan))
    trials = f" and {count['trials']} trials" if count["trials"] else ""
    print(f"{len(workshop.runs)} runs{trials} in {plan.output_dir}: {progress(workshop, workers)}")


def describe_power(plan: Plan) -> str:
    """The effect sizes that the number of seeds can establish and detect."""
    seeds, cells = len(plan.seeds), len(plan.tasks) * len(plan.conditions)
    if seeds < 2:
        return "With one seed, no verdict is possible. Give at least 3, with --seeds or in the YAML file."
    level = 0.05 / cells
    over = f", Holm correction over {cells} tasks and conditions" if cells > 1 else ""
    return (
        f"With {seeds} seeds, a difference is significant (paired t-test at 5 %{over}) if it exceeds "
        f"{established_effect(seeds, level):.1f} standard deviations of the paired differences. A true difference of "
        f"{detectable_effect(seeds, level):.1f} is detected four times in five; with {2 * seeds} seeds, one of "
        f"{detectable_effect(2 * seeds, level):.1f}."
    )


def report_on(
    workshop: Workshop, external: Sequence[Path] = (), failures: str = "", command: str | None = None
) -> Path:
    """
    Write the report on the runs so far.

    Raises:
        UserError: No run has finished, or no record has the metric of the question.
    """
    plan, records = workshop.plan, records_of(workshop)
    problems: list[str] = []
    for folder in external:
        found, messages = find_external_runs(folder, task=next(iter(plan.tasks)))
        records, problems = records + found, problems + messages
    paths = {workshop.folder(run) / RECORD_NAME for run in workshop.runs}
    final = [record for record in records if record.path in paths]
    done = {entry.arm for entry in final if entry.status == "finished"}
    if not any(record.status in ("finished", "external") for record in records):
        raise UserError(failures or f"No run has finished in {plan.output_dir}, so there is nothing to report.")
    question = dataclasses.asdict(plan.question)
    if not {question["control"], question["treatment"]} <= done:  # too early for the question: show the runs so far
        question = {}
    elif not any(record.metrics.get(plan.question.metric) is not None for record in final):
        measured = sorted({name for record in final for name in record.metrics})
        raise UserError(
            f"question.metric={plan.question.metric!r} is not in any record. Allowed: {', '.join(measured)}."
        )
    return write_report(
        records,
        plan.output_dir / "report",
        title=plan.name,
        command=command,
        arms=list(plan.arms),
        problems=problems,
        missing=len(workshop.runs) - len(final),
        **question,
    )
