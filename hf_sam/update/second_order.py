"""The Hessian-vector product behind `second_order=True`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextlib.contextmanager
def twice_differentiable_attention(model: nn.Module) -> Iterator[None]:
    """A context that uses the attention kernel based on matrix products, which can be differentiated twice.

    Raises:
        ValueError: The model uses an attention implementation other than eager and sdpa.
    """
    implementation = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if implementation not in (None, "eager", "sdpa"):
        raise ValueError(
            f"second_order=True differentiates twice, which attn_implementation={implementation!r} does not support. Load the model "
            "with attn_implementation='eager' or 'sdpa'."
        )
    with sdpa_kernel(SDPBackend.MATH):
        yield


def add_hessian_vector_product(loss: Tensor, vector: dict[Parameter, Tensor], product: dict[Parameter, Tensor]) -> None:
    """Add `H v` to `product`, in place: the gradient of `<grad loss, v>` (Pearlmutter 1994).

    Args:
        loss (`Tensor`): Scalar, with its graph.
        vector (`dict[Parameter, Tensor]`): `v`; zero for missing parameters.
        product (`dict[Parameter, Tensor]`): Accumulator of `H v`, one tensor per parameter.
    """
    directions = list(vector)
    gradients = torch.autograd.grad(loss, directions, create_graph=True, allow_unused=True)
    terms = [(g * vector[p]).sum() for p, g in zip(directions, gradients, strict=True) if g is not None]
    parameters = list(product)
    curvatures = torch.autograd.grad(sum(terms), parameters, allow_unused=True)
    for p, curvature in zip(parameters, curvatures, strict=True):
        if curvature is not None:
            product[p].add_(curvature)
