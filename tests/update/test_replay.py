import random

import numpy as np
import pytest
import torch
from torch import nn

from hf_sam.update.replay import RandomStates, RunningStatistics, bookkeeping_kept


def test_every_generator_is_replayed():
    states = RandomStates(torch.device("cpu"))
    first = (torch.rand(3), np.random.rand(3), random.random())
    states.restore()
    again = (torch.rand(3), np.random.rand(3), random.random())
    assert torch.equal(first[0], again[0])
    assert (first[1] == again[1]).all()
    assert first[2] == again[2]


class Statistics(nn.Module):
    """BatchNorm, a constant buffer, and an average kept by hand and replaced rather than changed in place."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("constant", torch.ones(2))
        self.register_buffer("average", torch.zeros(3))

    def forward(self, x):
        self.average = 0.9 * self.average + 0.1 * x.mean(0)
        return self.norm(x) * self.constant[0]


def test_statistics_move_with_the_clean_pass_only():
    torch.manual_seed(0)
    model, statistics, x = Statistics(), None, torch.randn(8, 3)
    statistics = RunningStatistics(model)
    with statistics.watch():
        model(x)
    after_clean = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with statistics.kept():
        model(x + 1)
        assert model.norm.num_batches_tracked == 2
        assert not torch.equal(model.average, after_clean["average"])
    assert all(torch.equal(buffer, after_clean[name]) for name, buffer in model.named_buffers())
    assert model.norm.num_batches_tracked == 1


def test_statistics_are_kept_when_the_pass_raises():
    model = Statistics()
    statistics = RunningStatistics(model)
    with statistics.watch():
        model(torch.randn(8, 3))
    before = model.norm.running_mean.clone()
    with pytest.raises(RuntimeError), statistics.kept():
        model(torch.randn(8, 3))
        raise RuntimeError
    assert torch.equal(model.norm.running_mean, before)


def test_constants_are_not_copied():
    model = Statistics()
    statistics = RunningStatistics(model)
    with statistics.watch():
        model(torch.randn(8, 3))
    assert "constant" not in statistics._moving


def test_bookkeeping_goes_back_even_when_changed_in_place():
    class Host:
        _metrics = None

    host = Host()
    host._metrics = {"train": {"accuracy": [1.0]}}
    with bookkeeping_kept(host, ("_metrics", "_missing")):
        host._metrics["train"]["accuracy"].append(2.0)
    assert host._metrics == {"train": {"accuracy": [1.0]}}
    assert not hasattr(host, "_missing")
