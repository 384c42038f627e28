"""Measures on quadratics, whose answers are known in closed form, and the relations that hold on any model."""

import math

import pytest
import scipy.optimize
import torch

from hf_sam.sharpness import (
    Subset,
    SubsetLoss,
    average_sharpness,
    m_sharpness,
    objective,
    sam_sharpness,
    worst_case_sharpness,
)

from . import toys

DIAGONAL = torch.tensor([5.0, 2.0, 1.0, 0.5], dtype=torch.float64)
GRADIENT = torch.tensor([0.3, -0.2, 0.1, 0.4], dtype=torch.float64)


def rotated(spectrum: torch.Tensor, seed: int = 1) -> torch.Tensor:
    torch.manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), dtype=torch.float64))
    return basis @ torch.diag(spectrum) @ basis.T


def loss_with(matrix: torch.Tensor, gradient: torch.Tensor) -> SubsetLoss:
    model, subset = toys.quadratic(matrix, gradient)
    return SubsetLoss(model, subset, dtype=torch.float64)


def rise(matrix: torch.Tensor, gradient: torch.Tensor, eps: torch.Tensor) -> float:
    return (gradient @ eps + 0.5 * eps @ matrix @ eps).item()


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("p", [2.0, math.inf])
def test_sam_sharpness_of_a_quadratic(p, adaptive):
    matrix = rotated(DIAGONAL)
    loss = loss_with(matrix, GRADIENT)
    scale = loss.weights.abs() + 0.01 if adaptive else torch.ones(4, dtype=torch.float64)
    found = sam_sharpness(loss, [0.01, 0.3], p=p, adaptive=adaptive, eta=0.01 if adaptive else 0.0)
    for rho, value in found.items():
        scaled = scale * GRADIENT
        eps = rho * scale * (scaled.sign() if p == math.inf else scaled / scaled.norm())
        assert value == pytest.approx(rise(matrix, GRADIENT, eps), rel=1e-9)


def test_the_objective_adds_up():
    matrix = rotated(DIAGONAL)
    loss = loss_with(matrix, GRADIENT)
    parts = objective(loss, rho=0.3, weight_decay=0.1)
    assert parts.loss == pytest.approx(loss())
    assert parts.sharpness == pytest.approx(sam_sharpness(loss, [0.3])[0.3])
    assert parts.l2 == pytest.approx(0.05 * loss.weights.square().sum().item())
    assert parts.total == parts.loss + parts.sharpness + parts.l2


def test_m_sharpness_is_the_mean_of_each_chunk_s_own_maximum():
    matrix = rotated(DIAGONAL)
    loss = loss_with(matrix, GRADIENT)  # seven examples, batches of three
    x = torch.stack([torch.as_tensor(example["x"]) for example in loss.subset.examples])
    for m in (1, 2, 4, 7, 100):
        expected = 0.0
        for chunk in x.split(m):
            gradient = matrix @ (loss.weights - chunk.mean(0))
            expected += rise(matrix, gradient, 0.3 * gradient / gradient.norm()) * len(chunk) / len(x)
        assert m_sharpness(loss, m, rho=0.3) == pytest.approx(expected, rel=1e-9)
    assert m_sharpness(loss, 7, rho=0.3) == pytest.approx(sam_sharpness(loss, [0.3])[0.3], rel=1e-12)
    assert m_sharpness(loss, 1, rho=0.3) > m_sharpness(loss, 7, rho=0.3)


def ball_maximum(matrix: torch.Tensor, gradient: torch.Tensor, rho: float) -> float:
    """`max g^T e + e^T A e / 2` over `||e||_2 <= rho` for positive A, from the secular equation of its multiplier."""
    values, basis = torch.linalg.eigh(matrix)
    b = basis.T @ gradient

    def excess(multiplier: float) -> float:
        return (b / (multiplier - values)).norm().item() - rho

    top = values[-1].item()
    multiplier = scipy.optimize.brentq(excess, top + 1e-12, top + 10 * b.norm().item() / rho)
    e = b / (multiplier - values)
    return (b @ e + 0.5 * e @ (values * e)).item()


@pytest.mark.parametrize("rho", [0.05, 0.5, 3.0])
def test_worst_case_in_a_ball_is_the_trust_region_maximum(rho):
    matrix = rotated(DIAGONAL)
    loss = loss_with(matrix, GRADIENT)
    assert worst_case_sharpness(loss, rho, steps=60) == pytest.approx(ball_maximum(matrix, GRADIENT, rho), rel=1e-4)


def test_adaptive_worst_case_is_that_of_the_scaled_problem():
    matrix = rotated(DIAGONAL)
    loss = loss_with(matrix, GRADIENT)
    scale = loss.weights.abs()
    expected = ball_maximum(scale[:, None] * matrix * scale, scale * GRADIENT, 0.5)
    assert worst_case_sharpness(loss, 0.5, adaptive=True, steps=60) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("adaptive", [False, True])
def test_worst_case_in_a_box_is_at_a_corner(adaptive):
    loss = loss_with(torch.diag(DIAGONAL), GRADIENT)
    side = 0.2 * (loss.weights.abs() if adaptive else torch.ones(4, dtype=torch.float64))
    expected = (GRADIENT.abs() * side + 0.5 * DIAGONAL * side**2).sum().item()
    assert worst_case_sharpness(loss, 0.2, p=math.inf, adaptive=adaptive) == pytest.approx(expected, rel=1e-9)


def test_worst_case_at_a_minimum_is_along_the_top_eigenvector():
    loss = loss_with(rotated(DIAGONAL), torch.zeros(4, dtype=torch.float64))
    assert worst_case_sharpness(loss, 0.3, steps=200) == pytest.approx(0.5 * 0.3**2 * 5.0, rel=1e-3)


def test_worst_case_where_the_loss_only_falls_is_zero_not_negative():
    loss = loss_with(-torch.eye(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64))
    assert worst_case_sharpness(loss, 0.3) == 0.0


@pytest.mark.parametrize("adaptive", [False, True])
def test_average_case_is_half_the_scaled_trace(adaptive):
    matrix = rotated(DIAGONAL)
    loss = loss_with(matrix, GRADIENT)
    scale = loss.weights.abs() if adaptive else torch.ones(4, dtype=torch.float64)
    expected = 0.5 * 0.2**2 * (scale * matrix.diagonal() * scale).sum().item()
    estimates = [average_sharpness(loss, 0.2, adaptive=adaptive, draws=40, seed=seed) for seed in range(4)]
    assert max(abs(e.mean - expected) / e.standard_error for e in estimates) < 4
    assert estimates[0].standard_error < 0.3 * expected  # the gradient's part is gone
    assert estimates[0] == average_sharpness(loss, 0.2, adaptive=adaptive, draws=40, seed=0)


@pytest.mark.parametrize("make", [toys.bert, toys.tied_gpt2, toys.normed_net])
def test_order_of_the_measures_on_real_architectures(make):
    model, examples = make()
    loss = SubsetLoss(model, Subset(examples, toys.collate, batch_size=4))
    for p in (2.0, math.inf):
        rho = 0.1 if p == 2 else 0.01
        first_order = sam_sharpness(loss, [rho], p=p)[rho]
        assert worst_case_sharpness(loss, rho, p=p, steps=5) >= first_order > 0
    assert m_sharpness(loss, 1, 0.1) > m_sharpness(loss, 100, 0.1)
