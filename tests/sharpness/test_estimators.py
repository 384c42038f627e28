"""Estimators against dense matrices: exact where they claim to be, else within their own standard error."""

import math

import numpy as np
import pytest
import torch

from hf_sam.sharpness import (
    Estimate,
    GaussNewton,
    Hessian,
    Subset,
    SubsetLoss,
    hutchinson_trace,
    most_negative_eigenvalue,
    spectral_density,
    top_eigenvalues,
)

from . import toys
from .test_operators import dense

SPECTRUM = torch.tensor([30.0, 12.0, 7.0, 3.0, 2.0, *([0.01] * 60), -0.5, -2.5], dtype=torch.float64)


@pytest.fixture(scope="module")
def known():
    """An indefinite Hessian of known spectrum in a random basis."""
    torch.manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(len(SPECTRUM), len(SPECTRUM), dtype=torch.float64))
    matrix = basis @ torch.diag(SPECTRUM) @ basis.T
    model, subset = toys.quadratic(matrix, torch.ones(len(SPECTRUM), dtype=torch.float64))
    return Hessian(SubsetLoss(model, subset, dtype=torch.float64))


@pytest.fixture(scope="module")
def transformer():
    """The operators of a tiny transformer in float32, and its dense Hessian and Gauss-Newton matrix in float64."""
    model, examples = toys.bert()
    single = SubsetLoss(model, Subset(examples, toys.collate, batch_size=4))
    double = SubsetLoss(model, Subset(examples, toys.collate, batch_size=len(examples)), dtype=torch.float64)
    return {kind: (kind(single), dense(kind(double))) for kind in (Hessian, GaussNewton)}


def test_top_and_most_negative_eigenvalues_of_a_known_spectrum(known):
    found = top_eigenvalues(known, 5)
    assert found.converged
    np.testing.assert_allclose(found.values, SPECTRUM[:5], rtol=1e-3)
    lowest = most_negative_eigenvalue(known)
    assert lowest.converged
    assert lowest.values[0] == pytest.approx(-2.5, abs=1e-3 * 30)


@pytest.mark.parametrize("kind", [Hessian, GaussNewton])
def test_eigenvalues_of_a_transformer_in_float32(transformer, kind):
    operator, matrix = transformer[kind]
    expected = torch.linalg.eigvalsh(matrix).flip(0)
    found = top_eigenvalues(operator, 5, tolerance=1e-4)
    assert found.converged
    np.testing.assert_allclose(found.values, expected[:5], rtol=2e-4)
    lowest = most_negative_eigenvalue(operator, largest=found.values[0], tolerance=1e-4)
    assert lowest.values[0] == pytest.approx(expected[-1].item(), abs=2e-4 * expected[0].item())


def test_a_budget_of_products_is_kept_and_said():
    crowded = torch.diag(torch.linspace(1, 2, 200, dtype=torch.float64))  # no gaps: slow to converge
    model, subset = toys.quadratic(crowded, torch.ones(200, dtype=torch.float64))
    loss = SubsetLoss(model, subset, dtype=torch.float64)
    found = top_eigenvalues(Hessian(loss), 3, tolerance=1e-14, max_products=30)
    assert not found.converged
    assert len(found.values) < 3
    assert loss.passes["curvature"] < 60


def test_hutchinson_is_within_its_standard_error(known):
    trace = SPECTRUM.sum().item()
    estimates = [hutchinson_trace(known, probes=30, seed=seed) for seed in range(10)]
    deviations = [(estimate.mean - trace) / estimate.standard_error for estimate in estimates]
    assert np.abs(deviations).max() < 4
    assert 0.5 < np.std(deviations) < 2  # neither timid nor bold
    matrix = dense(known)
    exact = math.sqrt(2 * (matrix.square().sum() - matrix.diagonal().square().sum()).item() / 30)  # of sign vectors
    assert np.mean([estimate.standard_error for estimate in estimates]) == pytest.approx(exact, rel=0.25)


def test_hutchinson_is_exact_for_a_diagonal_matrix():
    matrix = torch.diag(torch.arange(1.0, 8.0, dtype=torch.float64))
    model, subset = toys.quadratic(matrix, torch.ones(7, dtype=torch.float64))
    estimate = hutchinson_trace(Hessian(SubsetLoss(model, subset, dtype=torch.float64)), probes=3)
    assert estimate.mean == pytest.approx(28)
    assert estimate.standard_error == pytest.approx(0, abs=1e-12)


def test_hutchinson_does_not_depend_on_the_block(known):
    assert hutchinson_trace(known, 5, block=1).mean == pytest.approx(hutchinson_trace(known, 5, block=3).mean)


@pytest.mark.parametrize("kind", [Hessian, GaussNewton])
def test_trace_of_a_transformer(transformer, kind):
    operator, matrix = transformer[kind]
    estimate = hutchinson_trace(operator, probes=40)
    assert abs(estimate.mean - matrix.trace().item()) < 3.5 * estimate.standard_error


def test_density_has_the_moments_and_shares_of_a_known_spectrum(known):
    density = spectral_density(known, steps=12, draws=20)
    np.testing.assert_allclose(density.weights.sum(1), 1)
    size = len(SPECTRUM)
    assert abs(density.mean().mean - SPECTRUM.mean().item()) < 3.5 * density.mean().standard_error
    shares = (density.weights * (density.nodes < -0.1)).sum(axis=1)
    assert abs(shares.mean() - 2 / size) < 3.5 * shares.std() / math.sqrt(len(shares))
    # A third and independent handle on the same numbers: the density integrates to 1 and has the right mean.
    grid = np.linspace(-10, 40, 20001)
    values = density.on_grid(grid, width=0.1)
    step = grid[1] - grid[0]
    assert values.sum() * step == pytest.approx(1, abs=1e-6)
    assert (grid * values).sum() * step == pytest.approx(density.mean().mean, abs=1e-6)
    bulk = values[np.abs(grid - 0.01) < 0.5].sum() * step
    assert bulk == pytest.approx(60 / size, abs=0.05)


def test_density_reaches_the_ends_of_a_transformer_s_spectrum(transformer):
    operator, matrix = transformer[Hessian]
    expected = torch.linalg.eigvalsh(matrix)
    density = spectral_density(operator, steps=30, draws=2)
    assert density.nodes.max() == pytest.approx(expected[-1].item(), rel=1e-3)
    assert density.nodes.min() == pytest.approx(expected[0].item(), rel=2e-2)


def test_density_of_a_multiple_of_the_identity():
    model, subset = toys.quadratic(torch.eye(6, dtype=torch.float64) * 3, torch.ones(6, dtype=torch.float64))
    density = spectral_density(Hessian(SubsetLoss(model, subset, dtype=torch.float64)), steps=5, draws=2)
    np.testing.assert_allclose((density.weights * np.isclose(density.nodes, 3)).sum(axis=1), 1)


def test_one_draw_has_no_standard_error():
    assert math.isnan(Estimate.of([1.0]).standard_error)
    assert Estimate.of([1.0, 3.0]) == Estimate(2.0, 1.0, 2)
