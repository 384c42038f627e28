"""`check_method`: run all checks on a method, in this process and on several ones."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..config import SAMConfig
from ..methods.base import Needs
from .checks import CHECKS, DROPOUT, TOLERANCE, Case, LeftOut, chooses_examples, shortened, with_scope
from .kit import frozen_garbage, run
from .processes import run_on_processes


@dataclass
class Report:
    """The result of `check_method`.

    Attributes:
        method (`str`): The method's name.
        passes (`float`, *optional*): Counted forward-backward passes over the batch in a perturbed step.
        copies (`float`, *optional*): Peak copies of the perturbed weights in addition to the stock Trainer.
        checked (`list[str]`): The checks that passed.
        left_out (`dict[str, str]`): The checks that were left out, and why.
    """

    method: str
    passes: float | None = None
    copies: float | None = None
    checked: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        costs = [f"{self.passes:.3g} passes"] if self.passes is not None else []
        costs += [f"{self.copies:.2f} copies of the weights"] if self.copies is not None else []
        lines = [f"{self.method}: {', '.join(costs)}", *(f"  holds     {name}" for name in self.checked)]
        return "\n".join([*lines, *(f"  left out  {name}: {why}" for name, why in self.left_out.items())])


PROCESSES = "two processes"


def check_method(config: SAMConfig, *, processes: int = 2, leave_out: Sequence[str] = ()) -> Report:
    """Check that a method keeps the guarantees of the package; takes seconds and needs no network access.

        check_method(SAMConfig(ascent=MyAscent(), descent=MyDescent()))

    Args:
        config (`SAMConfig`): The method, given by name or by custom objects.
        processes (`int`, *optional*, defaults to 2): Number of processes for a distributed run; 1 leaves it out.
        leave_out (`Sequence[str]`, *optional*): Names of checks to leave out.

    Returns:
        `Report`: The cost of a step, and the checks that passed or were left out.

    Raises:
        AssertionError: The method fails a check; the message says which one and what to do.
        ValueError: `rho=0` leaves nothing to check, or `leave_out` has an unknown name.
    """
    if config.rho == 0:
        raise ValueError("rho=0 is the stock Trainer, so there is no method to check. Give a rho above 0.")
    unknown = set(leave_out).difference([*CHECKS, PROCESSES])
    if unknown:
        raise ValueError(
            f"leave_out={list(leave_out)!r}: unknown check {', '.join(sorted(unknown))}. Allowed: {', '.join([*CHECKS, PROCESSES])}."
        )
    report = Report(config.name)
    with tempfile.TemporaryDirectory() as folder, frozen_garbage():
        case = Case(config, Path(folder), report)
        for name, check in CHECKS.items():
            if name in leave_out:
                report.left_out[name] = "by leave_out"
                continue
            try:
                check(case)
            except LeftOut as reason:
                report.left_out[name] = str(reason)
            except AssertionError as error:
                raise AssertionError(f"{config.name}, {name!r}: {error}.") from None
            except Exception as error:  # raised by the method, or by the package for a mistake in it
                raise AssertionError(f"{config.name}, {name!r}: failed with {type(error).__name__}: {error}") from error
            else:
                report.checked.append(name)
    if processes == 1 or PROCESSES in leave_out:
        report.left_out[PROCESSES] = "by leave_out" if processes > 1 else "processes=1"
        return report
    left_out = check_on_processes({config.name: config}, processes)
    report.left_out |= left_out.get(config.name, {})
    if PROCESSES not in report.left_out:
        report.checked.append(PROCESSES)
    return report


def check_on_processes(configs: Mapping[str, SAMConfig], processes: int = 2) -> dict[str, dict[str, str]]:
    """Run the checks of `check_method` that need several processes, for many methods in one launch.

    Ranks must hold the same weights after every step, and `scope="global"` must give the same run as one process.

    Args:
        configs (`Mapping[str, SAMConfig]`): The methods, under arbitrary names.
        processes (`int`, *optional*, defaults to 2): Number of processes.

    Returns:
        `dict[str, dict[str, str]]`: For each method, the checks that were left out, and why.

    Raises:
        AssertionError: Ranks differ, fail or deadlock.
    """
    left_out: dict[str, dict[str, str]] = {name: {} for name in configs}
    runs: dict[tuple[str, str], tuple[SAMConfig, dict]] = {}
    for name, config in configs.items():
        short, needs = shortened(config), config.parts.needs
        interval = short.interval or 1
        options = {"max_steps": 2 * interval + 1, "per_device_train_batch_size": 8 // processes}
        runs[name, "own"] = short, {**options, "dropout": 0.0 if short.m else DROPOUT}
        if chooses_examples(config):
            left_out[name]["global scope"] = "examples are chosen on each process"
        elif needs & Needs.ATTACHMENT:
            left_out[name]["global scope"] = "attached modules differ between processes"
        else:
            runs[name, "global"] = with_scope(short, "global"), options
    with tempfile.TemporaryDirectory() as folder, frozen_garbage():
        found, unsent = run_on_processes(runs, Path(folder), processes)
        for name, reason in unsent.items():
            left_out[name] = {PROCESSES: reason}
        for (name, scope), ranks in found.items():
            for rank in ranks[1:]:
                for step, (one, other) in enumerate(zip(ranks[0], rank, strict=True)):
                    assert torch.equal(one, other), (
                        f"{name}, {PROCESSES!r}: ranks hold different weights after step {step}."
                    )
            if scope == "global":
                config, options = runs[name, scope]
                alone = run(config, Path(folder) / "alone", **{**options, "per_device_train_batch_size": 8})
                for step, (one, other) in enumerate(zip(ranks[0], alone.trajectory, strict=True)):
                    assert (one - other).abs().max() <= TOLERANCE, (
                        f"{name}, {PROCESSES!r}: with scope='global', step {step} differs between {processes} processes and one: "
                        "eps must be the same on every rank. Do not use the rank, and draw random numbers only from "
                        "step.generator or step.shared_random."
                    )
    return left_out
