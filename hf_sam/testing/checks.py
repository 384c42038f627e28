"""The checks that every method must pass, one function each, on a tiny float64 network with the Trainer."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer

from ..config import SAMConfig
from ..methods.base import FORWARD_SHARE, Needs, overrides
from ..trainer import SAMTrainer
from ..update.vector import Vector
from .kit import Run, arguments, flat, run

TOLERANCE = 1e-12
DROPOUT = 0.3
LONGEST_INTERVAL = 3


class LeftOut(Exception):
    """Raised when a check does not apply to a method; the message says why."""


class Case:
    """A method under test.

    Args:
        config (`SAMConfig`): The configuration; its schedule is shortened by `shortened`.
        folder (`Path`): Folder for checkpoints.
        report (`Report`): The report, which receives measurements.
    """

    def __init__(self, config: SAMConfig, folder: Path, report: Any):
        self.config, self.folder, self.report = shortened(config), folder, report
        self.interval = self.config.interval or 1
        self.needs, self.parts = self.config.parts.needs, self.config.parts
        # Parts of a batch draw other dropout masks than the whole batch.
        self.dropout = 0.0 if self.config.m else DROPOUT

    def run(self, config: SAMConfig | None = None, **options) -> Run:
        """Run the method, for two intervals and one step unless `max_steps` is given."""
        options = {"max_steps": 2 * self.interval + 1, **options}
        return run(config or self.config, self.folder / "run", **options)

    @cached_property
    def whole(self) -> Run:
        """A run with dropout that leaves a checkpoint in the middle of an interval."""
        folder = self.folder / "whole"
        return run(self.config, folder, **self.long)

    @property
    def long(self) -> dict:
        """Options of runs that are compared with `whole`."""
        steps = 2 * self.interval + 3
        return {"max_steps": steps, "dropout": self.dropout, "save_strategy": "steps", "save_steps": 2}


def shortened(config: SAMConfig) -> SAMConfig:
    """Adapt the configuration to a run of a few steps and to the parameter names of the test network."""
    changes = {"start": 0.0, "end": 1.0}
    if (config.interval or 1) > LONGEST_INTERVAL:
        changes["interval"] = LONGEST_INTERVAL
    if config.perturb is not None and config.perturb not in ("norm", "no-norm-no-bias"):
        changes["perturb"] = "all"  # the network has neither embeddings, nor a head, nor the user's names
    return config.changed(**changes)


def chooses_examples(config: SAMConfig) -> bool:
    """Whether the method treats examples of a micro-batch differently."""
    ascent, needs = config.parts.ascent, config.parts.needs
    return bool(needs & Needs.SUBSET) or any(overrides(ascent, name) for name in ("examples", "perturbed_examples"))


def with_scope(config: SAMConfig, scope: str) -> SAMConfig:
    """The configuration with this scope and without fractions of batches, so that batches may be split in any way."""
    changes = {"m": None, "ascent_fraction": None if config.ascent_fraction is None else 1.0}
    return config.changed(**changes, **({"scope": scope} if config.scope is not None else {}))


# --- the checks, in the order in which they run ----------------------------------------------------------------------


def trains(case: Case) -> None:
    """The method trains."""
    seen = case.run(dropout=case.dropout)
    for step, weights in enumerate(seen.trajectory):
        assert torch.isfinite(weights).all(), f"the weights are not finite after step {step}"
    assert not torch.equal(seen.trajectory[-1], seen.initial), "no step has changed the weights"


def fresh_runs_agree(case: Case) -> None:
    """Two runs from the same seed are bitwise equal."""
    again = run(case.config, case.folder / "again", **case.long)
    assert_equal(
        again,
        case.whole,
        'two runs from the same seed differ, so some state outlives a run. Keep state in step.memory, declared as memory = ("name",) '
        "in the class, not in an attribute, a global or a closure, and draw from step.generator or step.shared_random",
    )


def resumes(case: Case) -> None:
    """A run resumed in the middle of an interval is bitwise equal to the uninterrupted one."""
    folder = Path(case.whole.trainer.args.output_dir) / "checkpoint-2"
    seen = run(case.config, case.folder / "resumed", resume=folder, **case.long)
    for step, weights in enumerate(seen.trajectory, start=2):
        assert torch.equal(weights, case.whole.trajectory[step]), (
            f"a run resumed after step 1 differs from the uninterrupted one in step {step}, so some state is missing from "
            'checkpoints. Keep state in step.memory, declared as memory = ("name",) in the class'
        )


def draws_from_the_step(case: Case) -> None:
    """The method does not depend on global random number generators."""

    def reseed_global_generators(step: int) -> None:
        torch.manual_seed(1000 + step)
        np.random.seed(1000 + step)
        random.seed(1000 + step)

    assert_equal(
        case.run(at_step=reseed_global_generators),
        case.run(),
        "the run depends on global random number generators: draw with torch.randn(..., generator=step.generator), or from "
        "step.shared_random if ranks must agree",
    )


def copies_in_place(case: Case) -> None:
    """In-place operations give the same result as copies: no Vector is read after one has consumed it."""

    def copied(vector: Vector) -> list[Tensor]:
        vector._data, vector._factor = vector.clone()._data, None
        vector._data.norms.clear()
        return vector._data.tensors

    with mock.patch.object(Vector, "_owned", copied):
        expected = case.run()
    assert_equal(
        case.run(),
        expected,
        "a Vector is read after an in-place operation has consumed it: g * 2 shares the memory of g, which g -= ... overwrites. "
        "Clone Vectors that are needed again, or write g = g - ...",
        TOLERANCE,
    )


def restores(case: Case) -> None:
    """Apart from the updates of the optimizer, weights are bitwise unchanged after every step."""
    seen = case.run(dropout=case.dropout, learning_rate=0.0)
    for step, weights in enumerate(seen.trajectory):
        assert torch.equal(weights, seen.initial), (
            f"with a learning rate of 0, step {step} has changed weights: the method must not write to step.weights"
        )


def restores_after_exceptions(case: Case) -> None:
    """Weights are also restored when the model raises an error or KeyboardInterrupt, in any pass of a step."""

    passes = case.run(max_steps=case.interval).passes
    for number, (step, direction, _) in enumerate(passes):
        kind = KeyboardInterrupt if direction == "backward" else _Interrupted
        interrupted: list[Run] = []
        with suppress(kind):
            case.run(max_steps=case.interval, learning_rate=0.0, at_pass=partial(_interrupt, interrupted, number, kind))
        assert interrupted, (
            f"two runs from the same seed run different passes: {direction} {number} of the first is missing"
        )
        assert torch.equal(flat(interrupted[0].trainer.model), interrupted[0].initial), (
            f"{kind.__name__} in the {direction} pass of step {step} leaves perturbed weights behind"
        )


class _Interrupted(RuntimeError):
    pass


def _interrupt(interrupted: list[Run], number: int, kind: type[BaseException], seen: Run, direction: str) -> None:
    if len(seen.passes) == number + 1:
        interrupted.append(seen)
        raise kind


def vanishes(case: Case) -> None:
    """At rho = 1e-30 the run equals that of the stock Trainer."""
    if case.needs & Needs.SUBSET:
        raise LeftOut("the method descends on a subset of the examples")
    changes = {"rho": 1e-30, "rho_min": None}
    changes |= {"interval": 1} if case.config.interval else {}
    changes |= {"replay_rng": True} if case.config.replay_rng is not None else {}
    changes |= {"ascent_fraction": 1.0} if case.config.ascent_fraction is not None else {}
    config = case.config.changed(**changes)
    sees_all = not chooses_examples(case.config)  # otherwise passes draw other dropout masks than the whole batch
    # Without logging, which would warn that such a small perturbation is lost to rounding.
    options = {"dropout": case.dropout if sees_all else 0.0, "max_steps": 3, "logging_strategy": "no"}
    assert_equal(
        case.run(config, **options),
        case.run(stock=True, **options),
        "at rho = 1e-30 the run differs from the stock Trainer's: eps must vanish with step.rho, and Descent.gradient must return g "
        "if g_s = g",
        1e-10,
    )


def accumulates(case: Case) -> None:
    """One micro-batch of eight examples and eight micro-batches of one give the same steps."""
    reasons = {
        "examples are chosen in each micro-batch": chooses_examples(case.config),
        "scope='micro' computes one perturbation for each micro-batch": case.config.scope == "micro" or case.config.m,
    }
    for reason, holds in reasons.items():
        if holds:
            raise LeftOut(reason)
    config = with_scope(case.config, "device")
    assert_equal(
        case.run(config, per_device_train_batch_size=1, gradient_accumulation_steps=8),
        case.run(config, per_device_train_batch_size=8),
        "8 micro-batches of 1 example and 1 of 8 differ: the method must not depend on single micro-batches or count calls of eps; "
        "step.index counts steps",
        TOLERANCE,
    )


def counts_passes(case: Case) -> None:
    """The network runs as many passes as `config.passes_per_step` states."""
    if case.needs & Needs.HVP:
        raise LeftOut("a Hessian-vector product is not a pass that can be counted in the network")
    batch, steps = 8, 2 * case.interval + 1
    seen = case.run(per_device_train_batch_size=batch)
    share = {"forward": FORWARD_SHARE, "backward": 1 - FORWARD_SHARE}
    by_step = [sum(share[kind] * n / batch for at, kind, n in seen.passes if at == step) for step in range(steps)]
    case.report.passes = by_step[2 * case.interval]
    for step, counted in enumerate(by_step):
        expected = seen.trainer._sam.schedule.passes(step)
        # The tolerance: a fraction of a batch is rounded to whole examples. Without eps there is no second pass.
        may_be_fewer = case.parts.ascent.may_skip or step == 0
        assert counted <= expected + 0.2, wrong_passes(step, counted, expected)
        assert may_be_fewer or counted >= expected - 0.2, wrong_passes(step, counted, expected)


def wrong_passes(step: int, counted: float, expected: float) -> str:
    return (
        f"step {step} takes {counted:.3g} passes over the batch, but config.passes_per_step promises {expected:.3g}: correct "
        "ascent_steps, needs or the extra_passes of the descent; an ascent that returns None in some steps must declare "
        "may_skip = True"
    )


def holds_its_copies(case: Case) -> None:
    """At the end of every backward pass, at most `config.parts.copies` extra copies of the weights are held."""
    if case.needs & Needs.ATTACHMENT:
        raise LeftOut("the size of attached modules is not known")
    stock, ours = (peak_copies(case, is_stock) for is_stock in (True, False))
    case.report.copies = ours - stock
    assert case.report.copies <= case.parts.copies + 0.1, (
        f"{case.report.copies:.2f} copies of the weights are held, but memory and needs allow {case.parts.copies}: use in-place "
        "operations (g -= ..., g *= ...) on Vectors that are not needed again, or declare the memory"
    )


class Wide(nn.Module):
    """A network whose memory is almost entirely weights."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(256, 256, bias=False) for _ in range(4))
        self.norm = nn.LayerNorm(256)
        self.head = nn.Linear(256, 3, bias=False)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        logits = self.head(self.norm(x))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def peak_copies(case: Case, is_stock: bool) -> float:
    torch.manual_seed(0)
    model, measured = Wide(), []
    data = [{"x": torch.randn(256), "labels": i % 3} for i in range(8)]
    model.layers[0].weight.register_post_accumulate_grad_hook(lambda _: measured.append(live_bytes(model)))
    before = live_bytes(model)
    steps = {"max_steps": case.interval + 1, "per_device_train_batch_size": 1}
    common = {"model": model, "args": arguments(case.folder / "wide", case.needs, **steps), "train_dataset": data}
    config = case.config.changed(perturb="all") if case.config.perturb is not None else case.config
    trainer = Trainer(**common) if is_stock else SAMTrainer(sam_config=config, **common)
    trainer.log = lambda *args, **kwargs: None
    trainer.train()
    return (max(measured) - before) / sum(p.nbytes for p in model.parameters())


def live_bytes(model: nn.Module) -> int:
    """Bytes of all distinct storages of live tensors, including gradients."""
    gradients = [p.grad for p in model.parameters()]  # makes them visible to gc
    sizes = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, nn.Parameter):
            storage = thing.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    del gradients
    return sum(sizes.values())


def survives_zero_gradients(case: Case) -> None:
    """Steps whose gradient is exactly zero leave weights and memory finite."""
    zero = {0, case.interval + 1}
    seen = case.run(factor=lambda seen: float(seen.step not in zero), max_steps=2 * case.interval + 2)
    advice = "divide by norms through hf_sam.methods.steepest, or guard them with hf_sam.methods.geometry.usable"
    assert_finite(seen, f"after a step whose gradient is exactly zero; {advice}")


def survives_overflows(case: Case) -> None:
    """In fp16, a pass that overflows leaves no trace."""
    at, steps = case.interval, 2 * case.interval + 2
    for lost in ("every", "first", "last"):

        def factor(seen: Run, lost: str = lost) -> float:
            if seen.step != at or not torch.is_grad_enabled():
                return 1.0
            number = sum(step == at and kind == "forward" for step, kind, _ in seen.passes)
            return torch.inf if lost == "every" or number == {"first": 1, "last": 2}[lost] else 1.0

        seen = case.run(factor=factor, dtype=torch.float32, scaled=True, max_steps=steps)
        what = f"after an fp16 overflow in {lost if lost == 'every' else 'the ' + lost} pass of a step"
        assert_finite(seen, what)
        before, after = seen.memories[at - 1], seen.memories[at]
        if torch.equal(seen.trajectory[at], seen.trajectory[at - 1]):  # the step was skipped
            same = before.keys() == after.keys() and all(torch.allclose(before[k], after[k]) for k in before)
            assert same, f"step.memory has changed {what}, although the optimizer skipped the step"
        else:
            assert lost != "every", f"the weights have changed {what}"
        assert not torch.equal(seen.trajectory[-1], seen.trajectory[at]), f"the weights no longer change {what}"


CHECKS: dict[str, Callable[[Case], None]] = {
    "trains": trains,
    "fresh runs agree": fresh_runs_agree,
    "resumes bitwise": resumes,
    "draws from the step": draws_from_the_step,
    "reads nothing consumed": copies_in_place,
    "restores weights": restores,
    "restores weights after exceptions": restores_after_exceptions,
    "vanishes with rho": vanishes,
    "1 x 8 = 8 x 1": accumulates,
    "passes": counts_passes,
    "copies": holds_its_copies,
    "zero gradients": survives_zero_gradients,
    "fp16 overflows": survives_overflows,
}


# --- comparing -------------------------------------------------------------------------------------------------------


def assert_equal(one: Run, other: Run, message: str, tolerance: float = 0.0) -> None:
    """Assert that two runs have the same weights after every step."""
    for step, (mine, theirs) in enumerate(zip(one.trajectory, other.trajectory, strict=True)):
        distance = (mine - theirs).abs().max().item()
        assert distance <= tolerance, f"{message} (step {step}, by {distance:.2g})"


def assert_finite(seen: Run, when: str) -> None:
    """Assert that weights and memory are always finite."""
    for step, (weights, memory) in enumerate(zip(seen.trajectory, seen.memories, strict=True)):
        assert torch.isfinite(weights).all(), f"the weights are not finite in step {step}, {when}"
        for name, value in memory.items():
            assert torch.isfinite(value).all(), (
                f"step.memory[{name.partition('/')[0]!r}] is not finite in step {step}, {when}"
            )
