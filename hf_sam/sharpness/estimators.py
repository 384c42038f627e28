"""Eigenvalues, trace and spectral density of a large symmetric matrix, estimated from a few products with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

from .operators import CurvatureOperator


@dataclass(frozen=True)
class Estimate:
    """A mean over independent draws with its standard error (`nan` for a single draw)."""

    mean: float
    standard_error: float
    draws: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return cls(float(np.mean(values)), float(error), len(values))


@dataclass(frozen=True)
class Eigenvalues:
    """Eigenvalues from one end of the spectrum, the outermost first.

    Args:
        values (`list[float]`): The converged eigenvalues.
        converged (`bool`): Whether all requested eigenvalues converged.
    """

    values: list[float]
    converged: bool


@dataclass(frozen=True)
class SpectralDensity:
    """The density of eigenvalues as weighted points, one row per random start.

    Args:
        nodes (`np.ndarray`): Ritz values, shape `(draws, steps)`.
        weights (`np.ndarray`): Their weights, where each row sums to 1, shape `(draws, steps)`.
    """

    nodes: np.ndarray
    weights: np.ndarray

    def on_grid(self, grid: np.ndarray, width: float) -> np.ndarray:
        """The density on `grid`, with each point smoothed by a Gaussian of standard deviation `width`; shape of `grid`."""
        z = (grid[:, None] - self.nodes.ravel()) / width
        bumps = np.exp(-0.5 * z**2) / (width * math.sqrt(2 * math.pi))
        return bumps @ self.weights.ravel() / len(self.nodes)

    def mean(self) -> Estimate:
        """The mean eigenvalue, trace / P."""
        return Estimate.of(list((self.weights * self.nodes).sum(axis=1)))


def top_eigenvalues(
    operator: CurvatureOperator, k: int = 5, *, tolerance: float = 1e-3, max_products: int = 300, seed: int = 0
) -> Eigenvalues:
    """The `k` algebraically largest eigenvalues, by implicitly restarted Lanczos iteration (ARPACK).

    Args:
        operator ([`CurvatureOperator`]): The matrix. About `4 k` (at least 20) vectors of length P are held.
        k (`int`, *optional*, defaults to 5): Number of eigenvalues, at most P - 1.
        tolerance (`float`, *optional*, defaults to 1e-3): Accuracy relative to each eigenvalue.
        max_products (`int`, *optional*, defaults to 300): Approximate limit on products; what has converged by then is returned.
        seed (`int`, *optional*, defaults to 0): Seed of the start vector.
    """
    return _eigenvalues(operator.to_scipy(), k, "LA", tolerance, max_products, seed)


def most_negative_eigenvalue(
    operator: CurvatureOperator,
    *,
    largest: float | None = None,
    tolerance: float = 1e-3,
    max_products: int = 300,
    seed: int = 0,
) -> Eigenvalues:
    """The algebraically smallest eigenvalue.

    Args:
        largest (`float`, *optional*):
            The largest eigenvalue, to which `tolerance` is relative because the smallest may be 0. Computed if omitted.
        operator, tolerance, max_products, seed:
            As in `top_eigenvalues`.
    """
    if largest is None:
        top = top_eigenvalues(operator, 1, tolerance=1e-1, max_products=max_products, seed=seed)
        largest = max(top.values, default=0.0)
    # Shift so that all eigenvalues are at most 0 and the wanted one is near -(largest + |smallest|).
    matrix = operator.to_scipy()
    shifted = LinearOperator(matrix.shape, matvec=lambda v: matrix.matvec(v) - largest * v, dtype=matrix.dtype)
    found = _eigenvalues(shifted, 1, "SA", tolerance, max_products, seed)
    return Eigenvalues([value + largest for value in found.values], found.converged)


def hutchinson_trace(operator: CurvatureOperator, probes: int = 16, *, block: int = 4, seed: int = 0) -> Estimate:
    """The trace as the mean of `z^T A z` over random sign vectors `z` (Hutchinson 1990), with its standard error.

    Args:
        operator ([`CurvatureOperator`]): The matrix.
        probes (`int`, *optional*, defaults to 16): Number of sign vectors.
        block (`int`, *optional*, defaults to 4): Probes that share a forward and backward pass; each needs memory P.
        seed (`int`, *optional*, defaults to 0): Seed of the sign vectors.
    """
    generator = torch.Generator().manual_seed(seed)
    values: list[float] = []
    while len(values) < probes:
        signs = [
            torch.randint(0, 2, operator.shape[:1], generator=generator).mul_(2).sub_(1).to(operator.loss.weights)
            for _ in range(min(block, probes - len(values)))
        ]
        values += [torch.dot(z, product).item() for z, product in zip(signs, operator.products(signs), strict=True)]
    return Estimate.of(values)


def spectral_density(operator: CurvatureOperator, steps: int = 40, draws: int = 2, *, seed: int = 0) -> SpectralDensity:
    """Stochastic Lanczos quadrature (Golub and Meurant 2009; for networks Papyan 2018, Ghorbani et al. 2019).

    Each vector is orthogonalised only against its two predecessors: memory is 3 P, and the spurious copies of converged
    eigenvalues share the weight of the true one.

    Args:
        operator ([`CurvatureOperator`]): The matrix.
        steps (`int`, *optional*, defaults to 40): Products per random start, which is also the number of points per draw.
        draws (`int`, *optional*, defaults to 2): Number of random starts.
        seed (`int`, *optional*, defaults to 0): Seed of the starts.
    """
    generator = torch.Generator().manual_seed(seed)
    pairs = [_lanczos_quadrature(operator, steps, generator) for _ in range(draws)]
    length = max(len(nodes) for nodes, _ in pairs)  # a start that exhausted its Krylov space has fewer points
    nodes = np.stack([np.pad(nodes, (0, length - len(nodes)), mode="edge") for nodes, _ in pairs])
    weights = np.stack([np.pad(weights, (0, length - len(weights))) for _, weights in pairs])
    return SpectralDensity(nodes, weights)


def _lanczos_quadrature(
    operator: CurvatureOperator, steps: int, generator: torch.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The eigenvalues of the tridiagonal matrix of one Lanczos run, and the squared first entries of its eigenvectors."""
    current = torch.randn(operator.shape[0], generator=generator, dtype=torch.float64).to(operator.loss.weights)
    current /= torch.linalg.vector_norm(current)
    previous = torch.zeros_like(current)
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    for _ in range(min(steps, operator.shape[0])):
        following = operator @ current
        diagonal.append(torch.dot(following, current).item())
        following -= diagonal[-1] * current
        if off_diagonal:
            following -= off_diagonal[-1] * previous
        off_diagonal.append(torch.linalg.vector_norm(following).item())
        if off_diagonal[-1] <= torch.finfo(following.dtype).eps * max(map(abs, diagonal)):
            break  # the Krylov space is exhausted
        previous, current = current, following / off_diagonal[-1]
    nodes, vectors = scipy.linalg.eigh_tridiagonal(diagonal, off_diagonal[: len(diagonal) - 1])
    return nodes, vectors[0] ** 2


def _eigenvalues(
    matrix: LinearOperator, k: int, end: str, tolerance: float, max_products: int, seed: int
) -> Eigenvalues:
    size = matrix.shape[0]
    k = min(k, size - 1)  # ARPACK's limit
    basis = min(size, max(4 * k, 20))
    start = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).numpy()
    try:
        found = eigsh(
            matrix,
            k,
            which=end,
            v0=start.astype(matrix.dtype),
            ncv=basis,
            tol=tolerance,
            maxiter=max(1, max_products // max(1, basis - k)),
            return_eigenvectors=False,
        )
        converged = True
    except ArpackNoConvergence as error:
        found, converged = error.eigenvalues, False
    return Eigenvalues(sorted((float(value) for value in found), reverse=end == "LA"), converged)
