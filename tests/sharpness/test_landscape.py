"""Slices and lines: directions normalised by filter, exact parabolas on a quadratic, barriers."""

import copy

import numpy as np
import pytest
import torch

from hf_sam.sharpness import (
    Line,
    Subset,
    SubsetLoss,
    filter_normalised_direction,
    line_between,
    slice_1d,
    slice_2d,
)

from . import toys

ALPHAS = [-1.0, -0.25, 0.0, 0.5]


def test_each_filter_of_a_direction_has_the_norm_of_the_weights_that_it_moves():
    model, examples = toys.bert()
    loss = SubsetLoss(model, Subset(examples, toys.collate))
    direction = loss.views(filter_normalised_direction(loss, seed=3))
    weights = loss.views(loss.weights)
    for name, part in direction.items():
        if part.ndim < 2:
            assert not part.any(), "biases and normalisation layers stay put"
        else:
            torch.testing.assert_close(part.flatten(1).norm(dim=1), weights[name].flatten(1).norm(dim=1))
    assert torch.equal(filter_normalised_direction(loss, seed=3), filter_normalised_direction(loss, seed=3))
    assert not torch.equal(filter_normalised_direction(loss, seed=3), filter_normalised_direction(loss, seed=4))


def test_slices_through_a_quadratic_are_parabolas():
    matrix = torch.diag(torch.tensor([3.0, 1.0, 0.5], dtype=torch.float64))
    gradient = torch.tensor([0.2, 0.1, -0.4], dtype=torch.float64)
    model, subset = toys.quadratic(matrix, gradient)
    loss = SubsetLoss(model, subset, dtype=torch.float64)
    d, e = torch.randn(2, 3, dtype=torch.float64)
    clean = loss()

    def parabola(step):
        return clean + (gradient @ step + 0.5 * step @ matrix @ step).item()

    np.testing.assert_allclose(slice_1d(loss, d, ALPHAS), [parabola(a * d) for a in ALPHAS], rtol=1e-10)
    expected = [[parabola(a * d + b * e) for a in ALPHAS] for b in ALPHAS]
    np.testing.assert_allclose(slice_2d(loss, d, e, ALPHAS), expected, rtol=1e-10)


def test_the_ends_of_a_line_are_the_checkpoints_themselves():
    first, examples = toys.normed_net()
    second = copy.deepcopy(first)
    with torch.no_grad():
        for p in second.parameters():
            p.add_(torch.randn_like(p))
        second.layers[1].running_mean.add_(1.0)
    subset = Subset(examples, toys.collate, batch_size=4)
    losses = [SubsetLoss(model, subset) for model in (first, second)]
    line = line_between(*losses, points=5)
    assert line.t == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert line.losses[0] == losses[0]()
    assert line.losses[-1] == losses[1]()
    middle = copy.deepcopy(first)  # weights and running statistics half way
    state = {
        name: torch.lerp(value, second.state_dict()[name], 0.5) if value.is_floating_point() else value
        for name, value in first.state_dict().items()
    }
    middle.load_state_dict(state)
    assert line.losses[2] == pytest.approx(SubsetLoss(middle, subset)(), rel=1e-6)


def test_the_barrier_is_the_rise_above_the_chord():
    assert Line([0.0, 0.5, 1.0], [1.0, 4.0, 3.0]).barrier == 2.0
    assert Line([0.0, 0.5, 1.0], [1.0, 0.5, 3.0]).barrier == 0.0  # a valley is no barrier


def test_a_line_between_two_architectures_is_refused():
    first, examples = toys.bert()
    second, _ = toys.bert(type_vocab_size=3)
    subset = Subset(examples, toys.collate)
    with pytest.raises(ValueError, match=r"one architecture.*token_type_embeddings"):
        line_between(SubsetLoss(first, subset), SubsetLoss(second, subset))
