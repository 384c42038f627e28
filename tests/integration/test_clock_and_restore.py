"""The cost clock away from the CPU, weights that share memory, and parameters that no norm is defined for."""

from __future__ import annotations

import weakref

import pytest
import torch
from in_place import Perturbation, found_in, weights_changed_in_place
from integration import tiny
from torch import nn

from hf_sam import SAMConfig, Vector

Stopwatch = found_in("Stopwatch", "hf_sam.update.telemetry", "hf_sam.telemetry")

FEW = 2 * 64 + 8  # events: two for each of the blocks that may wait to be read

# --- the clock -----------------------------------------------------------------------------------------------------


class Device:
    """Stands for an accelerator: work advances its clock, and it may be far behind the host."""

    def __init__(self, behind: bool):
        self.behind, self.time = behind, 0.0
        self.recorded = self.finished = 0
        self.alive: weakref.WeakSet = weakref.WeakSet()
        self.most = 0


def fake_event(device: Device):
    class Event:
        def __init__(self, kind=None, *, enable_timing=False, blocking=False, interprocess=False):
            assert enable_timing
            device.alive.add(self)
            device.most = max(device.most, len(device.alive))

        def record(self, stream=None):
            device.recorded += 1
            self.at, self.order = device.time, device.recorded

        def query(self):
            return self.order <= device.finished or not device.behind

        def synchronize(self):  # and with it all that was recorded before
            device.finished = max(device.finished, self.order)

        def elapsed_time(self, end):  # in milliseconds; torch refuses where an event has not happened
            if not (self.query() and end.query()):
                raise RuntimeError("the event has not happened yet")
            return end.at - self.at

    return Event


@pytest.fixture(params=[False, True], ids=["device up to date", "device far behind"])
def device(request, monkeypatch):
    made = Device(request.param)
    monkeypatch.setattr(torch, "Event", fake_event(made))
    return made


@pytest.mark.parametrize("clocks", [1, 2])
def test_a_long_run_holds_few_events_and_measures_all_of_it(device, clocks):
    """10,000 micro-batches between two looks at the clock; a pass's clock runs inside a step's."""
    watches = [Stopwatch(torch.device("cuda")) for _ in range(clocks)]
    for i in range(10_000):
        for watch in watches:
            watch.__enter__()
        device.time += 1 + i % 3
        for watch in reversed(watches):
            watch.__exit__(None, None, None)
        device.time += 5  # between blocks nothing is counted
    assert device.most <= FEW * clocks
    expected = sum(1 + i % 3 for i in range(10_000)) / 1e3
    for watch in watches:
        assert watch.seconds() == pytest.approx(expected)
        assert watch.seconds() == pytest.approx(expected)  # looking changes nothing


def test_the_clock_goes_on_after_a_look(device):
    watch = Stopwatch(torch.device("cuda"))
    for count in (3, 200, 7):
        for _ in range(count):
            with watch:
                device.time += 2
        watch.seconds()
    assert watch.seconds() == pytest.approx(210 * 2 / 1e3)


def test_a_reset_forgets_what_is_pending(device):
    watch = Stopwatch(torch.device("cuda"))
    for _ in range(1000):
        with watch:
            device.time += 2
    watch.reset()
    with watch:
        device.time += 3
    assert watch.seconds() == pytest.approx(3e-3)


def test_a_block_that_raises_is_counted_or_left_out_but_pending_events_stay_few(device):
    watch = Stopwatch(torch.device("cuda"))
    for _ in range(1000):
        with pytest.raises(ValueError, match="inside"), watch:
            device.time += 1
            raise ValueError("inside")
    assert device.most <= FEW


# --- weights that share memory -------------------------------------------------------------------------------------


def transposed():
    first = nn.Parameter(torch.randn(3, 4))
    return first, nn.Parameter(first.data.t())


def rows():
    first = nn.Parameter(torch.randn(4, 4))
    return first, nn.Parameter(first.data[1:3])


def flattened():
    first = nn.Parameter(torch.randn(4, 4))
    return first, nn.Parameter(first.data.view(-1))


def overlapping():
    memory = torch.randn(10)
    return nn.Parameter(memory[:7]), nn.Parameter(memory[3:])


def three():
    first = nn.Parameter(torch.randn(4, 4))
    return first, nn.Parameter(first.data.t()), nn.Parameter(first.data[:2])


SHARING = [transposed, rows, flattened, overlapping, three]


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("make", SHARING)
def test_shared_weights_are_restored_exactly(make, backwards, times, in_place):
    torch.manual_seed(0)
    parameters = list(make())[:: -1 if backwards else 1]
    before = [p.detach().clone() for p in parameters]
    addresses = [p.data_ptr() for p in parameters]
    with Perturbation(swaps_memory=not in_place) as eps:
        for _ in range(times):
            eps.add(Vector(parameters, [torch.randn(p.shape) for p in parameters]) * torch.tensor(0.37))
        assert not torch.equal(parameters[0], before[0])
    assert all(torch.equal(p, original) for p, original in zip(parameters, before, strict=True))
    assert [p.data_ptr() for p in parameters] == addresses


@pytest.mark.parametrize("make", SHARING)
def test_shared_weights_are_restored_exactly_when_an_error_ends_the_pass(make):
    torch.manual_seed(0)
    parameters = list(make())
    before = [p.detach().clone() for p in parameters]
    with pytest.raises(RuntimeError, match="memory"), Perturbation(swaps_memory=False) as eps:
        eps.add(Vector(parameters, [torch.randn(p.shape) for p in parameters]) * torch.tensor(0.37))
        raise RuntimeError("out of memory")
    assert all(torch.equal(p, original) for p, original in zip(parameters, before, strict=True))


class Shared(nn.Module):
    """An encoder and a decoder in one memory, the one the transpose of the other, as two parameters."""

    def __init__(self, share=True, reverse=False):
        super().__init__()
        torch.manual_seed(0)
        first = nn.Parameter(torch.randn(6, 4) / 2)
        second = nn.Parameter(first.data.t() if share else first.data.t().clone())
        self.names = ("decoder", "encoder") if reverse else ("encoder", "decoder")
        self.register_parameter(self.names[0], first if not reverse else second)
        self.register_parameter(self.names[1], second if not reverse else first)
        self.last = nn.Linear(6, tiny.CLASSES)

    def forward(self, x, labels):
        hidden = torch.tanh(x @ self.encoder) @ self.decoder
        logits = self.last(hidden)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.fixture
def in_place():
    with weights_changed_in_place():
        yield


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "sam",
    [
        {},
        {"scope": "micro"},
        {"scope": "micro", "m": 2},
        {"ascent_steps": 2},
        {"method": "gsam"},
        {"method": "random"},
        {"method": "previous"},
        {"perturb": ["encoder", "decoder"]},
    ],
    ids=str,
)
@pytest.mark.usefixtures("in_place")
def test_shared_weights_stay_put_at_a_learning_rate_of_zero(sam, reverse, tmp_path):
    model = Shared(reverse=reverse)
    before = tiny.flat(model)
    config = SAMConfig(**{"rho": 0.3, **sam})
    trainer = tiny.trained(
        model, tiny.vectors(), tmp_path, config, learning_rate=0.0, optim="sgd", gradient_accumulation_steps=2
    )
    assert any(not torch.equal(weights, before) for _, weights in trainer.passes)
    for weights in trainer.trajectory:
        assert torch.equal(weights, before)
    assert model.encoder.data_ptr() == model.decoder.data_ptr()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.usefixtures("in_place")
def test_a_vanishing_rho_is_the_stock_trainer_on_shared_weights(reverse, tmp_path):
    options = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 4}
    ours = tiny.trained(Shared(reverse=reverse), tiny.vectors(), tmp_path, SAMConfig(rho=1e-30), **options)
    stock = tiny.trained(Shared(reverse=reverse), tiny.vectors(), tmp_path, None, **options)
    tiny.assert_same_run(ours, stock)


# --- complex parameters --------------------------------------------------------------------------------------------


class Spectral(nn.Module):
    """A Fourier layer: its weight is complex."""

    def __init__(self, trainable=True):
        super().__init__()
        self.mixing = nn.Module()
        self.mixing.weight = nn.Parameter(torch.randn(4, dtype=torch.cfloat), requires_grad=trainable)
        self.last = nn.Linear(6, tiny.CLASSES)

    def forward(self, x, labels):
        x = torch.fft.irfft(torch.fft.rfft(x) * self.mixing.weight, n=6)
        logits = self.last(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Phase(nn.Module):
    """One complex number of double precision, at the top of the model, and all else real."""

    def __init__(self):
        super().__init__()
        self.phase = nn.Parameter(torch.tensor([1.0 + 0.5j], dtype=torch.cdouble))
        self.last = nn.Linear(6, tiny.CLASSES)

    def forward(self, x, labels):
        logits = self.last(x) * self.phase.abs().float()
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize(
    "sam", [{}, {"method": "asam"}, {"p": "inf"}, {"method": "random"}, {"method": "gsam"}], ids=str
)
@pytest.mark.parametrize(("make", "name"), [(Spectral, "mixing.weight"), (Phase, "phase")])
def test_a_complex_parameter_is_refused_by_name(make, name, sam, tmp_path):
    with pytest.raises(ValueError, match=rf"{name}.*complex|complex.*{name}") as error:
        tiny.trained(make(), tiny.vectors(), tmp_path, SAMConfig(**sam), optim="sgd")
    assert "\n" not in str(error.value)


def test_a_frozen_complex_parameter_is_no_obstacle(tmp_path):
    trainer = tiny.trained(Spectral(trainable=False), tiny.vectors(), tmp_path, SAMConfig(rho=0.1), optim="sgd")
    assert len(trainer.trajectory) == 3


def test_without_sam_a_complex_parameter_is_the_trainers_own_business(tmp_path):
    trainer = tiny.trained(
        Spectral(), tiny.vectors(), tmp_path, SAMConfig(rho=0), optim="sgd", max_grad_norm=0.0, logging_steps=50
    )
    assert trainer.state.global_step == 3
