"""The conformance suite passes for every row of the table, and says what is wrong with a method that is broken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist

from hf_sam import METHODS, Ascent, Descent, Needs, SAMConfig
from hf_sam.methods import number
from hf_sam.testing import check_method, check_on_processes
from hf_sam.testing.conformance import CHECKS, PROCESSES

VARIANTS = {
    "second order": {"second_order": True},
    "two inner steps": {"ascent_steps": 2},
    "p = 1.5": {"p": 1.5},
    "p = inf": {"p": "inf"},
    "adaptive friendly": {"method": "friendly", "adaptive": True},
    "one perturbation for each micro-batch": {"scope": "micro"},
    "chunks": {"m": 2},
    "global": {"scope": "global"},
    "no replay": {"replay_rng": False},
    "every other step": {"interval": 2},
    "patterns": {"perturb": ["*.attention.*"]},
}


EVERY_TIME = ("sam", "gsam", "msam", "esam", "bilora", "imbsam")  # of each kind of step; the others in the slow tests


@pytest.mark.parametrize(
    "name", [name if name in EVERY_TIME else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
)
def test_every_row_passes_on_one_process(name):
    report = check_method(SAMConfig(method=name), processes=1)
    allowed = {
        "esam": {"vanishes with rho", "1 x 8 = 8 x 1"},
        "bilora": {"copies"},
        "flat-lora": {"copies"},
        "imbsam": {"1 x 8 = 8 x 1"},
    }
    assert set(report.left_out) == {PROCESSES} | allowed.get(name, set())
    assert len(report.checked) == len(CHECKS) + 1 - len(report.left_out)


@pytest.mark.slow
@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_fields_pass_on_one_process(fields):
    check_method(SAMConfig(**fields), processes=1)


@pytest.mark.parametrize("perturb", ["no-embeddings-no-head", "classifier.weight", ["classifier.*", "*.bias"]])
def test_a_selection_that_the_test_network_does_not_have_is_no_obstacle(perturb):
    others = [name for name in CHECKS if name != "trains"]
    assert check_method(SAMConfig(perturb=perturb), processes=1, leave_out=others).checked == ["trains"]


@pytest.mark.slow
def test_every_row_and_a_users_class_pass_on_two_processes():
    configs = {name: SAMConfig(method=name) for name in METHODS}
    configs["Ramp + Mixed"] = SAMConfig(ascent=Ramp(slope=0.5), descent=Mixed(), rho=0.1)
    configs["Sometimes"] = SAMConfig(ascent=Sometimes(), rho=0.1)
    left_out = {name: reasons for name, reasons in check_on_processes(configs).items() if reasons}
    assert left_out.keys() == {"esam", "bilora", "flat-lora", "imbsam"}


# --- methods that are right ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ramp(Ascent):
    """A radius that grows from step to step, kept in memory as the factor of a Vector."""

    memory: ClassVar = ("size",)
    slope: float = number(0.1, 0)

    def eps(self, g, step):
        size = step.memory.get("size")
        step.memory["size"] = step.weights * 0 + 1.0 if size is None else size + self.slope
        grown = step.memory["size"].norm(float("inf"))
        return g * (step.rho * grown / g.norm())


@dataclass(frozen=True)
class Mixed(Descent):
    needs: ClassVar = Needs.CLEAN_GRADIENT

    def gradient(self, g, g_s, step):
        g_s += g
        return g_s * 0.5


def test_a_users_method_passes_and_is_reported():
    report = check_method(SAMConfig(ascent=Ramp(), descent=Mixed()), processes=1)
    assert report.method == "Ramp + Mixed"
    assert report.passes == 2
    assert 2 < report.copies < 3.1
    assert "holds     resumes bitwise" in str(report)
    assert f"left out  {PROCESSES}: processes=1" in str(report)


@dataclass(frozen=True)
class Sometimes(Ascent):
    """Returns None in half of the steps, on each rank in others where its gradient is its own."""

    may_skip: ClassVar = True

    def eps(self, g, step):
        return g * (step.rho / g.norm()) if g.norm() * 1e4 % 2 < 1 else None


@pytest.mark.parametrize("descent", [Descent(), Mixed()], ids=["plain", "mixed"])
def test_an_ascent_that_skips_steps_passes(descent):
    check_method(SAMConfig(ascent=Sometimes(), descent=descent), processes=1)


def test_a_class_that_cannot_be_sent_is_checked_on_one_process():
    @dataclass(frozen=True)
    class Local(Ascent):
        def eps(self, g, step):
            return g * (step.rho / g.norm())

    report = check_method(SAMConfig(ascent=Local()))
    assert report.left_out == {PROCESSES: "Local is defined inside a function: define it at module level"}


def test_checks_can_be_left_out():
    report = check_method(SAMConfig(), processes=1, leave_out=["copies"])
    assert report.left_out["copies"] == "by leave_out"
    with pytest.raises(ValueError, match=r"unknown check copy\. Allowed: trains, fresh runs agree"):
        check_method(SAMConfig(), leave_out=["copy"])


def test_the_stock_trainer_is_no_method():
    with pytest.raises(ValueError, match="rho=0 is the stock Trainer"):
        check_method(SAMConfig(rho=0))


# --- methods that are broken -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StateInAnAttribute(Ascent):
    def eps(self, g, step):
        mean = getattr(self, "mean", None)
        mean = g.clone() if mean is None else mean * 0.9 + g * 0.1
        object.__setattr__(self, "mean", mean)
        return mean * (step.rho / mean.norm())


@dataclass(frozen=True)
class StateOfOneRun(Ascent):
    """Forgets what it keeps when a run begins, so that only resuming shows it."""

    kept: ClassVar[dict] = {}

    def eps(self, g, step):
        if step.is_first:
            self.kept.clear()
        mean = self.kept.get("mean", g)
        self.kept["mean"] = mean * 0.9 + g * 0.1
        return g * (step.rho / mean.norm())


@dataclass(frozen=True)
class GlobalNoise(Ascent):
    def eps(self, g, step):
        noise = g.map(torch.randn_like)
        return noise * (step.rho / noise.norm())


@dataclass(frozen=True)
class ReadsWhatIsConsumed(Ascent):
    def eps(self, g, step):
        direction = g * 0.5
        g -= step.weights
        direction += g
        return direction * (step.rho / direction.norm())


@dataclass(frozen=True)
class WritesToTheWeights(Ascent):
    def eps(self, g, step):
        for tensor in step.weights.tensors:
            tensor.data.mul_(1.001)
        return g * (step.rho / g.norm())


@dataclass(frozen=True)
class IgnoresRho(Ascent):
    def eps(self, g, step):
        return g * (0.05 / g.norm())


@dataclass(frozen=True)
class TwiceTheGradient(Descent):
    def gradient(self, g, g_s, step):
        return g_s * 2.0


@dataclass(frozen=True)
class WrongExtraPasses(Descent):
    extra_passes: ClassVar[float] = 1.0


@dataclass(frozen=True)
class SkipsWithoutSaying(Ascent):
    def eps(self, g, step):
        return g * (step.rho / g.norm()) if step.index % 2 == 0 else None


@dataclass(frozen=True)
class ManyCopies(Ascent):
    held: ClassVar[list] = []

    def eps(self, g, step):
        self.held[:] = [g.clone() for _ in range(4)]
        return g * (step.rho / g.norm())


@dataclass(frozen=True)
class Undeclared(Ascent):
    def eps(self, g, step):
        step.memory["mean"] = g.clone()
        return g * (step.rho / g.norm())


@dataclass(frozen=True)
class WrongShape(Ascent):
    def eps(self, g, step):
        return g.map(lambda t: t.reshape(-1)) * step.rho


@dataclass(frozen=True)
class WrongType(Ascent):
    def eps(self, g, step):
        return [t * step.rho for t in g.tensors]


@dataclass(frozen=True)
class GradientOfTheWrongType(Descent):
    def gradient(self, g, g_s, step):
        return g_s.tensors


@dataclass(frozen=True)
class NanOfAZeroGradient(Descent):
    needs: ClassVar = Needs.CLEAN_GRADIENT

    def gradient(self, g, g_s, step):
        return g_s * (g.norm() / g_s.norm())


@dataclass(frozen=True)
class NanInMemory(Ascent):
    memory: ClassVar = ("direction",)

    def eps(self, g, step):
        step.memory["direction"] = g.clone() / g.norm()
        return g * (step.rho / g.norm())


@dataclass(frozen=True)
class FailsOnNan(Ascent):
    def eps(self, g, step):
        return g * (step.rho / g.norm()) if int(g.norm()) >= 0 else None


@dataclass(frozen=True)
class OtherOnEachRank(Ascent):
    def eps(self, g, step):
        rank = dist.get_rank() if dist.is_initialized() else 0
        return g * (step.rho * (1 + rank) / g.norm())


@dataclass(frozen=True)
class SkipsOnOneRank(Ascent):
    def eps(self, g, step):
        is_left_out = dist.is_initialized() and dist.get_rank() == 1 and step.index == 1
        return None if is_left_out else g * (step.rho / g.norm())


@dataclass(frozen=True)
class RaisesOnOneRank(Ascent):
    def eps(self, g, step):
        if dist.is_initialized() and dist.get_rank() == 1:
            raise RuntimeError("the model is on fire")
        return g * (step.rho / g.norm())


BROKEN = {
    StateInAnAttribute: r"two runs from the same seed differ.*step\.memory.*declared as memory",
    StateOfOneRun: r"resumed after step 1 differs.*step\.memory.*declared as memory",
    GlobalNoise: r"the run depends on global random number generators.*step\.generator",
    ReadsWhatIsConsumed: r"read after an in-place operation has consumed it.*[Cc]lone",
    WritesToTheWeights: r"learning rate of 0, step 0 has changed weights",
    IgnoresRho: r"at rho = 1e-30 the run differs from the stock Trainer's: eps must vanish with step\.rho",
    TwiceTheGradient: r"Descent\.gradient must return g if g_s = g",
    WrongExtraPasses: r"takes 2 passes over the batch, but config\.passes_per_step promises 3.*extra_passes",
    SkipsWithoutSaying: r"takes 1 passes over the batch, .* promises 2.*may_skip = True",
    ManyCopies: r"6\.\d\d copies of the weights are held, but memory and needs allow 2",
    Undeclared: r"ValueError: .*step\.memory\['mean'\] without declaring it: write memory = \('mean',\)",
    WrongShape: r"WrongShape\.eps must have the shape of the weights: for first\.weight its shape is \[20\] instead of \[4, 5\]",
    WrongType: r"WrongType\.eps must return a Vector.*not list",
    GradientOfTheWrongType: r"GradientOfTheWrongType\.gradient must return a Vector.*not list",
    NanOfAZeroGradient: r"weights are not finite in step 0, after a step whose gradient is exactly zero.*usable",
    FailsOnNan: r"'fp16 overflows': failed with ValueError: cannot convert float NaN to integer",
    NanInMemory: r"step\.memory\['direction'\] is not finite in step 0, after a step whose gradient is exactly zero",
}


@pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind.__name__)
def test_a_broken_method_fails_and_the_message_says_what_to_do(kind):
    part = {"ascent": kind()} if issubclass(kind, Ascent) else {"descent": kind()}
    with pytest.raises(AssertionError, match="(?s)" + BROKEN[kind]) as failure:
        check_method(SAMConfig(**part, rho=0.1), processes=1)
    assert kind.__name__ in str(failure.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (OtherOnEachRank, r"with scope='global', step 0 differs between 2 processes and one"),
        (SkipsOnOneRank, r"SkipsOnOneRank, 'two processes': .*"),
        (RaisesOnOneRank, r"a process failed.*the model is on fire"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_method_that_is_broken_on_two_processes_only(kind, message):
    with pytest.raises(AssertionError, match="(?s)" + message):
        check_method(SAMConfig(ascent=kind(), rho=0.1), leave_out=list(CHECKS))
