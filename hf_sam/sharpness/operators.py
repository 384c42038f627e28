"""The Hessian and the generalised Gauss-Newton matrix of a [`SubsetLoss`] as linear operators, never stored densely.

Both use reverse-mode differentiation twice. Forward-mode differentiation of a vectorised gradient, on which curvlinops is
built, gives wrong products through `layer_norm` and none through `silu` (torch 2.13), which affects most transformers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse.linalg
import torch
from torch import Tensor

from .loss import SubsetLoss
from .subset import Batch
from .undisturbed import undisturbed

# How torch's messages start when a kernel has no second derivative.
ONCE_DIFFERENTIABLE = ("derivative for", "trying to differentiate twice")


class CurvatureOperator:
    """A symmetric matrix of shape `(P, P)`, given by its products with vectors.

    Args:
        loss ([`SubsetLoss`]): The function.
        weights (`Tensor`, *optional*): The point `w`, shape `(P,)`; the model's own weights by default.

    Raises:
        ValueError: A kernel of the model cannot be differentiated twice.
    """

    def __init__(self, loss: SubsetLoss, weights: Tensor | None = None):
        self.loss, self.weights = loss, weights
        self.shape = (loss.weights.numel(), loss.weights.numel())
        check_twice_differentiable(loss)

    def __matmul__(self, vector: Tensor) -> Tensor:
        """The product with one vector, shape `(P,)`."""
        return self.products([vector])[0]

    def products(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """The products with several vectors, which share one forward and one backward pass."""
        self.loss.count("curvature", len(vectors))
        leaf = self.loss.leaf(self.weights)
        return self.loss.mean_over_batches(lambda batch: self._batch_products(leaf, batch, vectors))

    def to_scipy(self) -> scipy.sparse.linalg.LinearOperator:
        """The same operator on NumPy vectors, for the solvers of scipy."""
        dtype = np.dtype(str(self.loss.dtype).removeprefix("torch."))

        def matvec(vector: np.ndarray) -> np.ndarray:
            product = self @ torch.as_tensor(vector.ravel(), dtype=self.loss.dtype, device=self.loss.device)
            return product.cpu().numpy()

        return scipy.sparse.linalg.LinearOperator(self.shape, matvec=matvec, dtype=dtype)

    def _batch_products(self, leaf: Tensor, batch: Batch, vectors: Sequence[Tensor]) -> list[Tensor]:
        raise NotImplementedError


class Hessian(CurvatureOperator):
    """`H = d^2 L / dw^2`; indefinite away from a minimum."""

    def _batch_products(self, leaf: Tensor, batch: Batch, vectors: Sequence[Tensor]) -> list[Tensor]:
        loss, _ = self.loss.batch_loss(leaf, batch)
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        return [_vector_jacobian(gradient, leaf, vector) for vector in vectors]


class GaussNewton(CurvatureOperator):
    """`G = sum_n J_n^T (d^2 l / dz^2) J_n / N` with `J_n = dz_n / dw` for logits `z`.

    The Hessian without the curvature of the network itself: positive semi-definite for cross-entropy and squared error,
    and equal to the Fisher information for cross-entropy.
    """

    def _batch_products(self, leaf: Tensor, batch: Batch, vectors: Sequence[Tensor]) -> list[Tensor]:
        loss, outputs = self.loss.batch_loss(leaf, batch)
        logits = outputs.get("logits") if isinstance(outputs, dict) else None
        slope = None
        if isinstance(logits, Tensor):
            (slope,) = torch.autograd.grad(loss, logits, create_graph=True, allow_unused=True)  # dl/dz
        if slope is None:
            raise ValueError(
                "The Gauss-Newton matrix needs a model whose loss is computed from the 'logits' that it returns. Remove "
                "the measure 'gauss_newton' for this model."
            )
        # J^T u is linear in u, so its derivative with respect to u, applied to v, is J v.
        u = torch.zeros_like(logits, requires_grad=True)
        (pulled_back,) = torch.autograd.grad(logits, leaf, grad_outputs=u, create_graph=True)
        products = []
        for vector in vectors:
            pushed = _vector_jacobian(pulled_back, u, vector)  # J v
            products.append(_vector_jacobian(logits, leaf, _vector_jacobian(slope, logits, pushed)))
        return products


def check_twice_differentiable(loss: SubsetLoss) -> None:
    """Differentiate one batch twice, through every node of the graph.

    A kernel that is differentiable only once raises only if its node is visited. For derivatives with respect to given
    inputs, torch visits only the nodes that lead there, and would silently omit that kernel's contribution.

    Raises:
        ValueError: A kernel of the model cannot be differentiated twice.
    """
    leaf = loss.leaf()
    with undisturbed(loss.model):
        value, _ = loss.batch_loss(leaf, loss.first_batch)
        (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
        if not gradient.requires_grad:
            return
        try:
            torch.autograd.backward(gradient, torch.ones_like(gradient))
        except RuntimeError as error:
            if not str(error).startswith(ONCE_DIFFERENTIABLE):
                raise
            raise ValueError(
                "A kernel of this model cannot be differentiated twice, which the Hessian and Gauss-Newton measures need "
                f"({str(error).splitlines()[0]}). Load the model with attn_implementation='eager', or leave those "
                "measures out."
            ) from error


def _vector_jacobian(outputs: Tensor, inputs: Tensor, vector: Tensor) -> Tensor:
    """`vector^T d outputs / d inputs`, zero if the outputs do not depend on the inputs; the graph is kept."""
    if not outputs.requires_grad:
        return torch.zeros_like(inputs)
    (product,) = torch.autograd.grad(
        outputs, inputs, grad_outputs=vector, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return product.detach()
