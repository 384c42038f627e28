"""State that a forward pass reads and writes: the second pass starts as the first did, and the step ends as the clean pass did.

Each model keeps its state another way. Two tests run on all of them: under a vanishing rho the run is the stock
Trainer's, and at an ordinary rho every step is that of SAM done by hand, on a copy of the model made before the clean
pass.
"""

from __future__ import annotations

import copy
import queue
import random
import threading
from collections import Counter, OrderedDict, UserDict, deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from in_place import weights_changed_in_place
from integration import equivalence, tiny
from integration.equivalence import FEWER_PASSES, SETTINGS, assert_like_stock, both, trained
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from transformers import TrainerCallback

from hf_sam import SAMConfig, SAMTrainer


class Stateful(nn.Module):
    """Two layers whose loss depends on state; subclasses say what the state is and how a pass moves it."""

    kept: tuple[str, ...] = ()  # attributes that are neither parameters nor buffers

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.last = nn.Linear(8, tiny.CLASSES)
        self.build()

    def build(self) -> None: ...

    def hidden(self, x: Tensor) -> Tensor:
        """What the last layer gets, from what the first one gives."""
        return x

    def penalty(self, hidden: Tensor, logits: Tensor) -> Tensor | float:
        return 0.0

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        hidden = self.hidden(torch.tanh(self.first(x)))
        logits = self.last(hidden)
        return {"loss": F.cross_entropy(logits, labels) + self.penalty(hidden, logits), "logits": logits}

    def state(self) -> dict:
        return {name: getattr(self, name) for name in self.kept}


# --- a momentum teacher: parameters that no gradient moves --------------------------------------------------------


class Teacher(Stateful):
    def build(self):
        self.teacher = copy.deepcopy(self.last).requires_grad_(False)

    def penalty(self, hidden, logits):
        with torch.no_grad():
            self.follow(zip(self.teacher.parameters(), self.last.parameters(), strict=True))
        return F.mse_loss(logits, self.teacher(hidden.detach()))


class TeacherInPlace(Teacher):
    def follow(self, pairs):
        for teacher, student in pairs:
            teacher.mul_(0.5).add_(student, alpha=0.5)


class TeacherCopied(Teacher):
    def follow(self, pairs):
        for teacher, student in pairs:
            teacher.copy_(0.5 * teacher + 0.5 * student)


class TeacherThroughData(Teacher):
    """`.data` hides the change from the version counter."""

    def follow(self, pairs):
        for teacher, student in pairs:
            teacher.data.mul_(0.5).add_(student.data, alpha=0.5)


class TeacherDataReplaced(Teacher):
    def follow(self, pairs):
        for teacher, student in pairs:
            teacher.data = 0.5 * teacher.data + 0.5 * student.data


class TeacherForeach(Teacher):
    def follow(self, pairs):
        teachers, students = zip(*pairs, strict=True)
        torch._foreach_lerp_(list(teachers), list(students), 0.5)


class TeacherReloaded(Teacher):
    """Copied whole in every second pass, as target networks are."""

    kept = ("calls",)
    calls = 0

    def follow(self, pairs):
        self.calls += 1
        if self.calls % 2 == 0:
            self.teacher.load_state_dict(self.last.state_dict())


class TeacherParameterReplaced(Teacher):
    def follow(self, pairs):
        moved = 0.5 * self.teacher.weight + 0.5 * self.last.weight
        self.teacher.weight = nn.Parameter(moved, requires_grad=False)


class TeacherModuleReplaced(Teacher):
    """A frozen copy of the student as it was one pass ago."""

    def penalty(self, hidden, logits):
        loss = F.mse_loss(logits, self.teacher(hidden.detach()))
        self.teacher = copy.deepcopy(self.last).requires_grad_(False)
        return loss


class TeacherMovedAfterUse(Teacher):
    def penalty(self, hidden, logits):
        loss = F.mse_loss(logits, self.teacher(hidden.detach()))
        with torch.no_grad():
            for teacher, student in zip(self.teacher.parameters(), self.last.parameters(), strict=True):
                teacher.lerp_(student, 0.5)
        return loss


# --- buffers ------------------------------------------------------------------------------------------------------


class TeacherInAList(TeacherInPlace):
    """Kept out of the parameters and of checkpoints, as reference models are."""

    def build(self):
        super().build()
        self.others = [self._modules.pop("teacher")]

    @property
    def teacher(self):
        return self.others[0].to(self.last.weight)  # a cast of the model does not reach it

    def state(self):
        return dict(self.teacher.named_parameters())


class TeacherInAnObject(TeacherInPlace):
    def build(self):
        super().build()
        self.helper = SimpleNamespace(teacher=self._modules.pop("teacher"))

    @property
    def teacher(self):
        return self.helper.teacher.to(self.last.weight)

    def state(self):
        return dict(self.teacher.named_parameters())


class Center(Stateful):
    """DINO's running centre of the outputs."""

    def build(self):
        self.register_buffer("center", torch.zeros(tiny.CLASSES))

    def penalty(self, hidden, logits):
        loss = (logits - self.center).square().mean()
        self.move(logits.detach().mean(0))
        return loss

    def move(self, mean):
        self.center.mul_(0.5).add_(mean, alpha=0.5)


class CenterReplaced(Center):
    def move(self, mean):
        self.center = 0.5 * self.center + 0.5 * mean


class CenterThroughData(Center):
    def move(self, mean):
        self.center.data.lerp_(mean, 0.5)


class CenterNotSaved(CenterReplaced):
    def build(self):
        self.register_buffer("center", torch.zeros(tiny.CLASSES), persistent=False)


class CenterFilledLater(Center):
    """None until the first pass."""

    def build(self):
        self.register_buffer("center", None)

    def penalty(self, hidden, logits):
        mean = logits.detach().mean(0)
        self.center = mean if self.center is None else 0.5 * self.center + 0.5 * mean
        return (logits - self.center).square().mean()


class Queue(Stateful):
    """MoCo's queue, written at a pointer."""

    def build(self):
        self.register_buffer("queue", torch.randn(8, 12))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))

    def penalty(self, hidden, logits):
        similarity = (hidden @ self.queue.clone()).logsumexp(1).mean()
        at = int(self.pointer)
        self.queue[:, at : at + len(hidden)] = hidden.detach().T
        self.pointer[0] = (at + len(hidden)) % self.queue.shape[1]
        return 0.1 * similarity


class QueueThatGrows(Stateful):
    """A buffer that changes its shape."""

    def build(self):
        self.register_buffer("queue", torch.randn(8, 1))

    def penalty(self, hidden, logits):
        similarity = (hidden @ self.queue).logsumexp(1).mean()
        self.queue = torch.cat([self.queue, hidden.detach().mean(0)[:, None]], 1)
        return 0.1 * similarity


class Codebook(Stateful):
    """Vector quantisation whose codes are moving averages of what is assigned to them."""

    def build(self):
        self.register_buffer("codes", torch.randn(5, 8))
        self.register_buffer("counts", torch.ones(5))
        self.register_buffer("sums", self.codes.clone())

    def hidden(self, x):
        nearest = torch.cdist(x.detach(), self.codes).argmin(1)
        quantized = self.codes[nearest]
        chosen = F.one_hot(nearest, 5).to(x)
        self.counts.data.mul_(0.7).add_(chosen.sum(0), alpha=0.3)
        self.sums.data.mul_(0.7).add_(chosen.T @ x.detach(), alpha=0.3)
        self.codes.data.copy_(self.sums / self.counts[:, None])
        return x + (quantized - x).detach() + 0.1 * x


class CodebookThatRestartsDeadCodes(Codebook):
    """Draws from the global generator as it moves its codes."""

    def hidden(self, x):
        out = super().hidden(x)
        dead = self.counts < 0.8
        self.codes[dead] = torch.randn(int(dead.sum()), 8).to(self.codes)
        return out


# --- plain attributes ---------------------------------------------------------------------------------------------


class HiddenState(Stateful):
    """Carried from batch to batch, as in truncated backpropagation; None at first."""

    kept = ("carried",)
    carried: Tensor | None = None

    def hidden(self, x):
        out = x if self.carried is None else x + 0.5 * self.carried
        self.carried = torch.tanh(out).detach()
        return out


class HiddenStateInPlace(Stateful):
    kept = ("carried",)

    def build(self):
        self.carried = torch.zeros(8, dtype=torch.float64)

    def hidden(self, x):
        out = x + self.carried.to(x)
        self.carried.mul_(0.5).add_(x.detach().mean(0))
        return out


class HiddenStates(HiddenState):
    """A tuple, as an LSTM's."""

    carried: tuple | None = None

    def hidden(self, x):
        h, c = self.carried or (torch.zeros_like(x), torch.zeros_like(x))
        h, c = torch.tanh(x + h), 0.5 * c + x
        self.carried = (h.detach(), c.detach())
        return h + c


class HiddenStatesInPlace(Stateful):
    """A tuple of tensors that stay the same objects."""

    kept = ("carried",)

    def build(self):
        self.carried = (torch.zeros(8, dtype=torch.float64), [torch.zeros(8, dtype=torch.float64)])

    def hidden(self, x):
        first, (second,) = self.carried
        out = x + (first + second).to(x)
        first.mul_(0.5).add_(x.detach().mean(0))
        second.sub_(x.detach().mean(0), alpha=0.1)
        return out


class Number(Stateful):
    """A temperature that falls with every pass."""

    kept = ("calls", "scale")
    calls = 0
    scale = 1.0

    def hidden(self, x):
        self.calls += 1
        self.scale = 0.9 * self.scale + 0.1 * x.detach().abs().mean().item()
        return x * self.scale / (1 + 0.2 * self.calls)


class History(Stateful):
    """Bounded, and full after two passes."""

    kept = ("history",)

    def build(self):
        self.history = deque(maxlen=2)

    def hidden(self, x):
        out = x + sum(self.history, torch.zeros(8).to(x))
        self.history.append(x.detach().mean(0))
        return out


class Lists(Stateful):
    """Nested, with tensors changed in place inside."""

    kept = ("memory", "seen")

    def build(self):
        self.memory = {"means": [torch.zeros(8, dtype=torch.float64)], "counts": Counter()}
        self.seen = set()

    def hidden(self, x):
        out = x + sum(self.memory["means"]).to(x)
        self.memory["means"][0].add_(x.detach().mean(0), alpha=0.5)
        self.memory["means"].append(-0.1 * x.detach().mean(0))
        self.memory["counts"]["passes"] += 1
        self.seen.add(len(self.memory["means"]))
        return out * (1 + 0.1 * len(self.seen))


class Cache(Stateful):
    """Ordered, and short: the oldest entry goes first."""

    kept = ("cache",)

    def build(self):
        self.cache = OrderedDict()

    def hidden(self, x):
        out = x + sum(self.cache.values(), torch.zeros(8)).to(x)
        self.cache[len(self.cache), x.sum().item()] = x.detach().mean(0)
        if len(self.cache) > 2:
            self.cache.popitem(last=False)
        return out


class Array(Stateful):
    kept = ("mean",)

    def build(self):
        self.mean = np.zeros(8)

    def hidden(self, x):
        out = x + torch.from_numpy(self.mean).to(x)
        self.mean += 0.5 * x.detach().double().mean(0).numpy()
        return out


class Memory:
    """A plain object of the user's."""

    def __init__(self):
        self.value, self.calls = torch.zeros(8, dtype=torch.float64), 0

    def read_and_write(self, x):
        value = self.value.to(x)
        self.value = 0.5 * self.value + x.detach().double().mean(0)
        self.calls += 1
        return value * self.calls


class PlainObject(Stateful):
    kept = ("memory", "config")

    def build(self):
        self.memory = Memory()
        self.config = SimpleNamespace(scale=1.0)

    def hidden(self, x):
        self.config.scale *= 0.8
        return x * self.config.scale + self.memory.read_and_write(x)


class Meter:
    """An object without a `__dict__`."""

    __slots__ = ("__calls", "mean")

    def __init__(self):
        self.__calls = 0

    def read_and_write(self, x):
        self.__calls += 1
        self.mean = 0.5 * getattr(self, "mean", 0.0) + x.detach().mean().item()
        return self.mean * self.__calls

    def state(self):
        return self.__calls, self.mean


class ObjectWithSlots(Stateful):
    def build(self):
        self.meter = Meter()

    def hidden(self, x):
        return x + self.meter.read_and_write(x)

    def state(self):
        return {"meter": self.meter.state()}


class ObjectWithData(Stateful):
    """State beside a list that is too long to be state."""

    def build(self):
        self.memory = Memory()
        self.memory.texts = ["a text"] * 20_000

    def hidden(self, x):
        return x + self.memory.read_and_write(x)

    def state(self):
        return {"memory": (self.memory.value, self.memory.calls)}


class DataObject(Stateful):
    kept = ("data",)

    def build(self):
        self.data = UserDict(calls=0)

    def hidden(self, x):
        self.data["calls"] += 1
        return x / self.data["calls"]


class StatisticsOfAHook(Stateful):
    """Kept by a hook on the layer that it watches, a layer of torch."""

    def build(self):
        self.first.calls, self.first.mean = 0, 0.0
        self.first.register_forward_hook(count_and_average)

    def state(self):
        return {"first": (self.first.calls, self.first.mean)}


def count_and_average(layer, inputs, output):
    layer.calls += 1
    layer.mean = 0.5 * layer.mean + output.detach().mean().item()
    return output + layer.mean * layer.calls


class InASubmodule(Stateful):
    """The state of children in a list, which share one of their containers."""

    kept = ("shared",)

    def build(self):
        self.children_ = nn.ModuleList([HiddenStateInPlace(), Number()])
        self.shared = []
        for child in self.children_:
            child.requires_grad_(False)
            child.shared = self.shared

    def hidden(self, x):
        for child in self.children_:
            x = child.hidden(x)
            child.shared.append(x.detach().mean())
        return x * (1 + 0.01 * len(self.shared))


class CountedByTrain(Stateful):
    """Its dropout of a layer begins after some calls of `train`, which the Trainer makes once a micro-batch."""

    kept = ("trained",)
    trained = 0

    def train(self, mode=True):
        if mode:
            self.trained += 1
        return super().train(mode)

    def hidden(self, x):
        return x * (1 + 0.1 * self.trained)


# --- generators of the model's own --------------------------------------------------------------------------------


class TorchGenerator(Stateful):
    kept = ("generator",)

    def build(self):
        self.generator = torch.Generator().manual_seed(5)

    def hidden(self, x):
        return x * (1 + 0.3 * torch.rand(x.shape, generator=self.generator)).to(x)


class NumpyGenerator(Stateful):
    kept = ("generator",)

    def build(self):
        self.generator = np.random.default_rng(5)

    def hidden(self, x):
        return x * (1 + 0.3 * torch.from_numpy(self.generator.random(x.shape)).to(x))


class PythonGenerator(Stateful):
    kept = ("generator",)

    def build(self):
        self.generator = random.Random(5)

    def hidden(self, x):
        return x * (1 + 0.3 * self.generator.random())


class GeneratorInAContainer(Stateful):
    kept = ("sources",)

    def build(self):
        self.sources = {"noise": [torch.Generator().manual_seed(5), random.Random(1)]}

    def hidden(self, x):
        noise, scale = self.sources["noise"]
        return x * (1 + 0.3 * scale.random() * torch.rand(x.shape, generator=noise)).to(x)


# --- normalisation ------------------------------------------------------------------------------------------------


class Spectral(Stateful):
    """Its power iteration moves two buffers in every pass, and the weight with them."""

    def build(self):
        self.last = parametrizations.spectral_norm(self.last)


class Cumulative(Stateful):
    """`momentum=None`: the mean of all batches so far."""

    def build(self):
        self.norm = nn.BatchNorm1d(8, momentum=None)

    def hidden(self, x):
        return self.norm(x)


class Instance(Stateful):
    def build(self):
        self.norm = nn.InstanceNorm1d(2, track_running_stats=True)

    def hidden(self, x):
        return self.norm(x.reshape(-1, 2, 4)).flatten(1)


class ReleasedByCount(Stateful):
    """BatchNorm in evaluation mode until it has seen the third micro-batch."""

    kept = ("calls",)
    calls = 0

    def build(self):
        self.norm = nn.BatchNorm1d(8)

    def hidden(self, x):
        self.calls += 1
        self.norm.train(self.calls > 3)
        return self.norm(x)


class OwnStatistics(Stateful):
    """Normalises by running statistics in training, too, so that the loss depends on them (batch renormalisation)."""

    def build(self):
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("steps", torch.tensor(0))

    def hidden(self, x):
        self.steps += 1
        self.mean += (x.detach().mean(0) - self.mean) / self.steps
        return x - self.mean


KINDS = [
    TeacherInPlace, TeacherCopied, TeacherThroughData, TeacherDataReplaced, TeacherForeach, TeacherReloaded,
    TeacherParameterReplaced, TeacherModuleReplaced, TeacherMovedAfterUse,
    Center, CenterReplaced, CenterThroughData, CenterNotSaved, CenterFilledLater, Queue, QueueThatGrows, Codebook,
    CodebookThatRestartsDeadCodes,
    TeacherInAList, TeacherInAnObject, HiddenStatesInPlace, Cache, ObjectWithSlots, ObjectWithData, DataObject, StatisticsOfAHook,
    HiddenState, HiddenStateInPlace, HiddenStates, Number, History, Lists, Array, PlainObject, InASubmodule,
    CountedByTrain,
    TorchGenerator, NumpyGenerator, PythonGenerator, GeneratorInAContainer,
    Spectral, Cumulative, Instance, ReleasedByCount, OwnStatistics,
]  # fmt: skip
of_every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def make(kind: type[Stateful], dtype: torch.dtype = torch.float32) -> Stateful:
    tiny.set_seed(0)
    return kind().to(dtype)


def state_of(trainer) -> dict:
    return {name: module.state() for name, module in trainer.model.named_modules() if isinstance(module, Stateful)}


@of_every_kind
@pytest.mark.parametrize(("scope", "accumulation"), SETTINGS)
def test_state_moves_as_in_the_stock_trainer(kind, scope, accumulation, tmp_path):
    runs = both(tmp_path, scope, accumulation, model=lambda: make(kind))
    assert_like_stock(*runs, state_of)


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        *(
            (kind, method)
            for kind in (TeacherDataReplaced, CenterReplaced, Number, TorchGenerator)
            for method in FEWER_PASSES
        ),
        *((kind, FEWER_PASSES[-2]) for kind in KINDS),
    ],
    ids=lambda value: value["method"] if isinstance(value, dict) else value.__name__,
)
def test_state_moves_once_where_there_are_fewer_passes(kind, method, tmp_path):
    runs = both(tmp_path, accumulation=2, sam=method, model=lambda: make(kind), max_steps=4)
    assert_like_stock(*runs, state_of, perturbs=False)


@of_every_kind
def test_steps_by_hand_with_rho_zero_are_those_of_the_stock_trainer(kind, tmp_path):
    """What the next test compares with moves state as the stock Trainer does."""
    if kind is CodebookThatRestartsDeadCodes:
        kind = Codebook
    data, reference = tiny.vectors(dtype=torch.float64), make(kind, torch.float64)
    steps = equivalence.windows(equivalence.batches(data, 4), 2, 3)
    expected = equivalence.sgd_steps_by_hand(reference, steps, rho=0.0, lr=0.1)
    options = {"model": lambda: make(kind, torch.float64), "data": data, "gradient_accumulation_steps": 2}
    equivalence.assert_steps_as_by_hand(tmp_path, expected, None, **options)


@of_every_kind
@pytest.mark.parametrize(("scope", "accumulation"), [("micro", 2), ("device", 2)])
def test_the_second_pass_starts_with_the_state_of_the_first(kind, scope, accumulation, tmp_path):
    if kind is CodebookThatRestartsDeadCodes:
        kind = Codebook  # random numbers of the whole process cannot be had by hand
    data, reference = tiny.vectors(dtype=torch.float64), make(kind, torch.float64)
    steps = equivalence.windows(equivalence.batches(data, 4), accumulation, 3)
    expected = equivalence.sgd_steps_by_hand(reference, steps, rho=0.5, lr=0.1, scope=scope)
    trainer = equivalence.assert_steps_as_by_hand(
        tmp_path,
        expected,
        SAMConfig(rho=0.5, scope=scope),
        model=lambda: make(kind, torch.float64),
        data=data,
        gradient_accumulation_steps=accumulation,
    )
    buffers, by_hand = dict(trainer.model.named_buffers()), dict(reference.named_buffers())
    assert buffers.keys() == by_hand.keys()
    for name, buffer in buffers.items():
        torch.testing.assert_close(buffer, by_hand[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("steps", [1, 2])
def test_every_inner_ascent_step_starts_with_the_state_of_the_first(steps, tmp_path):
    """The loss depends on the number of passes, so one that starts later shows in the perturbed loss."""
    runs = both(tmp_path, sam={"ascent_steps": steps, "scope": "device"}, model=lambda: make(Number), accumulation=2)
    assert_like_stock(*runs, state_of)


@pytest.mark.parametrize("method", ["gsam", "wsam", "friendly", "asam", "functional", "late", "norm-only"])
@pytest.mark.parametrize("kind", [TeacherDataReplaced, CenterReplaced, HiddenState], ids=lambda kind: kind.__name__)
def test_other_methods_leave_the_state_of_the_clean_pass(kind, method, tmp_path):
    class Normalised(kind):
        def build(self):
            super().build()
            self.norm = nn.LayerNorm(8)

        def hidden(self, x):
            return super().hidden(self.norm(x))

    sam = {"method": method, **({"start": 0} if method == "late" else {})}
    if method == "gsam":
        sam["rho_min"] = 0.0
    ours, stock = both(tmp_path, accumulation=2, sam=sam, model=lambda: make(Normalised), optim="sgd")
    assert state_of(ours).keys() == state_of(stock).keys()
    for name, buffer in ours.model.named_buffers():
        torch.testing.assert_close(buffer, stock.model.get_buffer(name), rtol=1e-4, atol=1e-6)
    for name, p in ours.model.named_parameters():
        torch.testing.assert_close(p, stock.model.get_parameter(name), rtol=1e-4, atol=1e-6)
    for key, value in state_of(stock)[""].items():
        torch.testing.assert_close(state_of(ours)[""][key], value, rtol=1e-4, atol=1e-6)
    assert max(map(abs, tiny.logged(ours, "sam_sharpness"))) < 1e-5


@pytest.mark.parametrize("scope", ["micro", "device"])
def test_state_survives_a_second_pass_that_raises(scope, tmp_path):
    """Out of memory in the second pass: weights and state are those after the clean pass."""

    class Failing(Number):
        passes = 0

        def hidden(self, x):
            type(self).passes += 1
            if type(self).passes == 2:
                raise KeyboardInterrupt
            return super().hidden(x)

    trainer = equivalence.trainer_for(SAMConfig(rho=0.5, scope=scope), tmp_path, model=lambda: make(Failing))
    before = tiny.flat(trainer.model)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert torch.equal(tiny.flat(trainer.model), before)
    assert trainer.model.calls == 1


# --- released in the middle of the run ----------------------------------------------------------------------------


class Releasable(Stateful):
    """BatchNorm that a flag keeps in evaluation mode through every call of `train`."""

    kept = ("is_released",)
    is_released = False

    def build(self):
        self.norm = nn.BatchNorm1d(8)

    def train(self, mode=True):
        super().train(mode)
        if not self.is_released:
            self.norm.eval()
        return self

    def hidden(self, x):
        return self.norm(x)


class ReleasableMomentum(Stateful):
    """Statistics stand still under a momentum of 0, and move from the step in which a callback raises it."""

    def build(self):
        self.norm = nn.BatchNorm1d(8, momentum=0.0)

    def hidden(self, x):
        return self.norm(x)


class ReleasableParametrization(Releasable):
    def build(self):
        self.norm = parametrizations.spectral_norm(nn.Linear(8, 8))


class Release(TrainerCallback):
    def __init__(self, at: int):
        self.at = at

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.at:
            model.is_released = True
            if hasattr(model.norm, "momentum"):
                model.norm.momentum = 0.3


@pytest.mark.parametrize("kind", [Releasable, ReleasableMomentum, ReleasableParametrization], ids=lambda k: k.__name__)
@pytest.mark.parametrize(("scope", "accumulation"), SETTINGS)
@pytest.mark.parametrize("at", [1, 3])
def test_running_statistics_released_later_move_once(kind, scope, accumulation, at, tmp_path):
    runs = both(tmp_path, scope, accumulation, model=lambda: make(kind), callbacks=lambda: [Release(at)], max_steps=5)
    assert_like_stock(*runs, state_of)
    assert any(not torch.equal(b, make(kind).get_buffer(n)) for n, b in runs[0].model.named_buffers())


def test_statistics_added_later_move_once(tmp_path):
    """A callback puts a BatchNorm where there was none."""

    class Insert(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                model.norm = nn.BatchNorm1d(8, affine=False)

    class Insertable(Stateful):
        def build(self):
            self.norm = nn.Identity()

        def hidden(self, x):
            return self.norm(x)

    runs = both(tmp_path, model=lambda: make(Insertable), callbacks=lambda: [Insert()], max_steps=5)
    assert_like_stock(*runs)
    assert runs[0].model.norm.num_batches_tracked == 3


# --- a criterion that hangs on the trainer ------------------------------------------------------------------------


class RunningCriterion(nn.Module):
    """Class-balanced by counts of the labels so far, with a margin that grows and noise of its own."""

    def __init__(self):
        super().__init__()
        self.register_buffer("counts", torch.ones(tiny.CLASSES))
        self.margin = 0.0
        self.recent = deque(maxlen=3)
        self.generator = torch.Generator().manual_seed(7)

    def forward(self, outputs, labels, num_items_in_batch=None):
        logits = outputs["logits"] + 0.1 * torch.rand(1, generator=self.generator)
        loss = F.cross_entropy(logits - self.margin * F.one_hot(labels, tiny.CLASSES), labels, 1 / self.counts)
        loss = loss + 0.1 * sum(self.recent)
        self.counts.add_(F.one_hot(labels, tiny.CLASSES).sum(0))
        self.margin += 0.1
        self.recent.append(loss.item())
        return loss


class WithCriterion:
    """A subclass whose criterion is an attribute."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.criterion = RunningCriterion()

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = self.criterion(outputs, labels)
        return (loss, outputs) if return_outputs else loss


class WithCriteria(WithCriterion):
    """Criteria in a plain dict."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        criterion = self.criterion
        del self.criterion
        self.criteria = {"main": criterion}

    @property
    def criterion(self):
        return self.criteria["main"]

    @criterion.setter
    def criterion(self, value):
        self.__dict__.setdefault("criteria", {})["main"] = value

    @criterion.deleter
    def criterion(self):
        del self.criteria


class WithTeacherOfTheTrainer:
    """A frozen teacher beside the model, moved in `compute_loss`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.criterion = copy.deepcopy(self.model).requires_grad_(False)

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(**inputs)
        with torch.no_grad():
            for teacher, student in zip(self.criterion.parameters(), self.model.parameters(), strict=True):
                teacher.lerp_(student, 0.5)
            target = self.criterion(**inputs)["logits"]
        loss = outputs["loss"] + F.mse_loss(outputs["logits"], target)
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("body", [WithCriterion, WithCriteria, WithTeacherOfTheTrainer], ids=lambda b: b.__name__)
@pytest.mark.parametrize(("scope", "accumulation"), SETTINGS)
def test_a_criterion_of_the_trainer_moves_as_in_the_stock_trainer(body, scope, accumulation, tmp_path):
    runs = both(tmp_path, scope, accumulation, body=body)

    def criterion(trainer):
        tensors = {**dict(trainer.criterion.named_parameters()), **dict(trainer.criterion.named_buffers())}
        plain = {k: v for k, v in vars(trainer.criterion).items() if k in ("margin", "recent", "generator")}
        return tensors, plain

    assert_like_stock(*runs, criterion)


@pytest.mark.parametrize("method", FEWER_PASSES, ids=lambda method: method["method"])
def test_a_criterion_of_the_trainer_moves_once_where_there_are_fewer_passes(method, tmp_path):
    runs = both(tmp_path, accumulation=2, sam=method, body=WithCriterion, max_steps=4)
    assert_like_stock(*runs, lambda trainer: (trainer.criterion.counts, trainer.criterion.recent), perturbs=False)


@pytest.mark.parametrize(("scope", "accumulation"), SETTINGS)
def test_a_criterion_given_as_compute_loss_func_moves_as_in_the_stock_trainer(scope, accumulation, tmp_path):
    runs = both(tmp_path, scope, accumulation, extra=lambda model: {"compute_loss_func": RunningCriterion()})
    assert_like_stock(*runs, lambda t: (t.compute_loss_func.counts, t.compute_loss_func.margin))


class OnAGraph(tiny.Mlp):
    """Its adjacency matrix is sparse, and a nested tensor lies beside it."""

    def __init__(self, layout):
        super().__init__()
        self.register_buffer("adjacency", torch.eye(6).to_sparse(layout=layout))
        self.lengths = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)

    def forward(self, x, labels=None):
        return super().forward((self.adjacency @ x.T).T, labels)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_and_nested_tensors_of_a_model_are_no_obstacle(layout, tmp_path):
    def model():
        tiny.set_seed(0)
        return OnAGraph(layout)

    ours, stock = both(tmp_path, accumulation=2, model=model)
    assert torch.equal(tiny.flat(ours.model), tiny.flat(stock.model))


class KeepsViews(tiny.Mlp):
    """Views of its weights, as by `detach` without a copy."""

    def __init__(self):
        super().__init__()
        self.register_buffer("anchor", self.first.weight.data)
        self.anchors = {name: p.detach() for name, p in self.named_parameters()}


@pytest.mark.parametrize("scope", ["device", "micro"])
def test_views_of_weights_do_not_undo_the_perturbation(scope, tmp_path):
    def sharpness(kind):
        tiny.set_seed(0)
        sam = SAMConfig(rho=0.5, scope=scope)
        return tiny.logged(tiny.trained(kind(), tiny.vectors(), tmp_path, sam), "sam_sharpness")

    with weights_changed_in_place():
        assert sharpness(KeepsViews) == sharpness(tiny.Mlp)


def counting_by_nonlocal():
    calls = None

    def loss(outputs, labels, num_items_in_batch=None):
        nonlocal calls
        calls = 1 if calls is None else calls + 1
        return F.cross_entropy(outputs["logits"], labels) * calls

    return loss


def counting_by_attribute():
    def loss(outputs, labels, num_items_in_batch=None):
        loss.calls = getattr(loss, "calls", 0) + 1
        return F.cross_entropy(outputs["logits"], labels) * loss.calls

    return loss


@pytest.mark.parametrize("make_loss", [counting_by_nonlocal, counting_by_attribute])
@pytest.mark.parametrize(("scope", "accumulation"), SETTINGS)
def test_a_compute_loss_func_that_counts_its_calls_counts_as_in_the_stock_trainer(
    make_loss, scope, accumulation, tmp_path
):
    assert_like_stock(*both(tmp_path, scope, accumulation, extra=lambda model: {"compute_loss_func": make_loss()}))


class WithTeacherInAnObject(WithTeacherOfTheTrainer):
    @property
    def criterion(self):
        return self.helper.teacher

    @criterion.setter
    def criterion(self, value):
        self.helper = SimpleNamespace(teacher=value)


@pytest.mark.parametrize(("scope", "accumulation"), SETTINGS)
def test_a_teacher_in_an_object_of_the_trainer_moves_as_in_the_stock_trainer(scope, accumulation, tmp_path):
    runs = both(tmp_path, scope, accumulation, body=WithTeacherInAnObject)
    assert_like_stock(*runs, lambda trainer: dict(trainer.criterion.named_parameters()))


class LossMeter(TrainerCallback):
    def __init__(self, trainer):
        self.trainer, self.losses = trainer, []


class WithMeter:
    """Its meter refers to the trainer, and with that to the data."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.meter = LossMeter(self)
        self.add_callback(self.meter)

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.meter.losses.append(loss.item())
        return loss


@pytest.mark.parametrize(("scope", "accumulation"), SETTINGS)
def test_a_meter_that_refers_to_the_trainer_sees_each_batch_once(scope, accumulation, tmp_path):
    runs = both(tmp_path, scope, accumulation, body=WithMeter, data=tiny.vectors(15_000))
    assert_like_stock(*runs, lambda trainer: trainer.meter.losses)


class WithWriter:
    """A queue that a thread empties, as those of trackers and prefetchers."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.queue = queue.Queue()
        self.thread = threading.Thread(target=self.write)
        self.thread.start()

    def write(self):
        while self.queue.get() is not None:
            self.queue.task_done()
        self.queue.task_done()

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.queue.put(loss.item())
        return loss


def test_a_queue_that_another_thread_empties_is_left_alone(tmp_path):
    trainer = trained(SAMConfig(rho=0.1), tmp_path, body=WithWriter, max_steps=4)
    trainer.queue.put(None)
    trainer.thread.join(timeout=10)
    assert not trainer.thread.is_alive()
    assert trainer.queue.unfinished_tasks == 0


def test_a_criterion_of_the_mixins_base_moves_as_in_the_stock_trainer(tmp_path):
    """`class SAMTheirs(SAMTrainerMixin, Theirs)`, the other order."""
    from hf_sam import SAMTrainerMixin

    class Theirs(WithCriterion, tiny.Trainer):
        pass

    class SAMTheirs(SAMTrainerMixin, Theirs):
        pass

    def run(cls, **kwargs):
        tiny.set_seed(2)
        args = tiny.arguments(tmp_path, gradient_accumulation_steps=2)
        trainer = cls(model=tiny.mlp(), args=args, train_dataset=tiny.vectors(), **kwargs)
        trainer.train()
        return trainer

    ours, stock = run(SAMTheirs, sam_config=SAMConfig(rho=1e-30)), run(Theirs)
    assert issubclass(SAMTrainer, SAMTrainerMixin)
    assert tiny.same_bits(tiny.state(ours.model), tiny.state(stock.model))
    assert torch.equal(ours.criterion.counts, stock.criterion.counts)
    assert equivalence.entries(ours) == equivalence.entries(stock)
