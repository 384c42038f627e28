"""Perturb weights, and restore them exactly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.nn import Parameter

from .buckets import PIECE_SHARE, buckets, piece_size, pieces
from .parameters import local
from .vector import Scalar, Vector


class Perturbation:
    """Moves weights away and puts them back bitwise: `with Perturbation() as weights: weights.add(eps)`.

    What is saved and what is perturbed share two memories, the weights' own and the perturbation's (the ascent
    gradient's, for the plain method), so that one copy of the perturbed parameters is all that is held beyond stock
    training. Weights are put back, never recomputed by subtraction, whatever the block raises.

    Args:
        generator (`torch.Generator`, *optional*):
            Round `w + eps` stochastically to the parameters' 16-bit type with this generator.
        renew_copies (`Callable[[], None]`, *optional*, defaults to `torch.clear_autocast_cache`):
            Called whenever weights have moved: what was derived from them is stale.
        swaps_memory (`bool`, *optional*, defaults to `False`):
            Let parameters point to the perturbed weights and back instead of copying both ways. Halves the memory
            traffic, which is what a step on a CPU spends here; wrong where something else holds on to their addresses
            (CUDA graphs, flat buffers).
        in_buckets (`bool`, *optional*, defaults to `False`): Where memory is not swapped, work on whole lists.
    """

    def __init__(
        self,
        generator: torch.Generator | None = None,
        renew_copies: Callable[[], None] = torch.clear_autocast_cache,
        swaps_memory: bool = False,
        in_buckets: bool = False,
    ):
        self._saved: list[tuple[Parameter, Tensor]] = []  # in the order in which they were moved
        self._moved: set[Parameter] = set()
        self._generator = generator
        self._renew_copies = renew_copies
        self._swaps_memory = swaps_memory
        self._in_buckets = in_buckets
        self._piece = 0  # how many numbers may be copied at a time

    def __enter__(self) -> Perturbation:
        return self

    def __exit__(self, *_) -> None:
        try:
            self._restore()
        except BaseException:  # a second Ctrl-C, while restoring
            self._restore()
            raise
        finally:
            self._saved.clear()
            self._moved.clear()
            self._renew_copies()  # autocast's cache may hold 16-bit copies of the perturbed weights

    @torch.no_grad()
    def _restore(self) -> None:
        if self._swaps_memory:
            for p, original in self._saved:
                p.data = original
        elif self._in_buckets and self._saved:
            for weights, originals in list(buckets(*self._lists()))[::-1]:
                torch._foreach_copy_(weights, originals)
            shared = Counter(local(p).data_ptr() for p, _ in self._saved)
            for p, original in reversed(self._saved):  # as below
                if shared[local(p).data_ptr()] > 1:
                    local(p).copy_(original)
        else:
            for p, original in reversed(self._saved):  # of two that share memory the first one was saved whole
                local(p).copy_(original)

    def _lists(self) -> tuple[list[Tensor], list[Tensor]]:
        return [local(p) for p, _ in self._saved], [original for _, original in self._saved]

    @property
    def is_applied(self) -> bool:
        """Whether any weight has been moved."""
        return bool(self._saved)

    @torch.no_grad()
    def add(self, eps: Vector) -> None:
        """`w <- w + eps`; the memory of `eps` is taken over unless it belongs to somebody else, too.

        Where the factor of `eps` is the number 0, as `Vector.where` makes it, nothing moves, not even where a direction is
        NaN or infinite; a tensor is not read.
        """
        factor = 1.0 if eps.factor is None else eps.factor
        if not isinstance(factor, Tensor) and factor == 0:
            return
        self._piece = piece_size(eps.tensors, PIECE_SHARE if self._generator is None else 4 * PIECE_SHARE)
        if self._in_buckets and not self._swaps_memory:
            self._add_in_buckets(eps, factor)
        else:
            # Tensor by tensor: each one stays in the CPU's cache through its few operations.
            for p, direction in zip(eps.parameters, eps.tensors, strict=True):
                self._add_one(p, direction, factor, eps.is_shared)
        self._renew_copies()

    def _add_one(self, p: Parameter, direction: Tensor, factor: Scalar, is_shared: bool) -> None:
        weight = local(p)
        if p in self._moved:
            weight.copy_(self._sum(weight, direction, factor))
        elif self._swaps_memory:
            self._save(p, p.data)  # from here on an interruption is undone
            fits = not is_shared and direction.dtype == weight.dtype
            out = direction if fits else torch.empty_like(weight)
            p.data = self._sum(weight, direction, factor, out=out)
        else:
            moved = self._sum(weight, direction, factor)
            keeps_all = not is_shared and direction.dtype == weight.dtype
            self._save(p, direction.copy_(weight) if keeps_all else weight.clone())
            weight.copy_(moved)  # an interruption from here on is undone

    def _save(self, p: Parameter, original: Tensor) -> None:
        self._saved.append((p, original))
        self._moved.add(p)

    def _add_in_buckets(self, eps: Vector, factor: Scalar) -> None:
        """As many operations as there are buckets, whatever the number of tensors."""
        owner = {id(t): p for p, t in zip(eps.parameters, eps.tensors, strict=True)}
        for directions, weights in buckets(eps.tensors, [local(p) for p in eps.parameters]):
            moved = self._sum(_flatten_dense_tensors(weights), _flatten_dense_tensors(directions), factor)
            parameters = [owner[id(t)] for t in directions]
            if not self._moved.issuperset(parameters):
                keeps_all = not eps.is_shared and directions[0].dtype == weights[0].dtype
                originals = directions if keeps_all else torch._foreach_mul(weights, 1)
                if keeps_all:
                    torch._foreach_copy_(originals, weights)
                for p, original in zip(parameters, originals, strict=True):
                    if p not in self._moved:
                        self._save(p, original)
            torch._foreach_copy_(weights, _unflatten_dense_tensors(moved, weights))
            del moved  # before the next one is computed

    def displacement(self, *others: Mapping[Parameter, Tensor]) -> Iterator[tuple[Parameter, Tensor, ...]]:
        """What was really added to parameters after rounding, `(w + eps) - w`, with what `others` hold of the same weights.

        One part of one parameter at a time: all else that a step holds is held beside it. None where one of `others` has
        nothing of a parameter.
        """
        size = piece_size((original for _, original in self._saved), 4 * PIECE_SHARE)  # nothing else has been given up
        for p, original in self._saved:
            held = [other.get(p) for other in others]
            for weight, saved, *parts in pieces(size, local(p), original, *(t for t in held if t is not None)):
                rest = iter(parts)
                displacement = weight.to(torch.promote_types(p.dtype, torch.float32)) - saved
                yield p, displacement, *(None if t is None else next(rest) for t in held)

    def _sum(self, weight: Tensor, direction: Tensor, factor: Scalar, out: Tensor | None = None) -> Tensor:
        """`weight + factor * direction`, in float32 or better before it is rounded."""
        exact = torch.promote_types(weight.dtype, torch.float32)
        if isinstance(factor, Tensor):
            factor = factor.to(weight.device)
        if weight.dtype == direction.dtype == exact and weight.device.type == "cpu":
            if not isinstance(factor, Tensor):
                return torch.add(weight, direction, alpha=factor, out=out)
            return torch.addcmul(weight, direction, factor.to(exact), out=out)
        if weight.dtype == exact and out is None:
            return self._exact_sum(weight, direction, factor)
        out = torch.empty_like(weight) if out is None else out
        for part, along, target in pieces(self._piece, weight, direction, out):  # float32 copies take twice the memory
            moved = self._exact_sum(part, along, factor)
            if self._generator is not None and weight.dtype != exact:
                moved = round_stochastically(moved, weight.dtype, self._generator)
            target.copy_(moved)
        return out

    @staticmethod
    def _exact_sum(weight: Tensor, direction: Tensor, factor: Scalar) -> Tensor:
        exact = torch.promote_types(weight.dtype, torch.float32)
        return torch.nan_to_num_(direction.to(exact) * factor, nan=0.0, posinf=0.0, neginf=0.0).add_(weight)


def round_stochastically(values: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Round float32 `values` to one of the two neighbours in `dtype`, the nearer one more often, so that E[out] = in.

    Args:
        values (`Tensor`): float32, any shape.
        dtype (`torch.dtype`): `torch.bfloat16` or `torch.float16`.
        generator (`torch.Generator`): Source of the random numbers, on the device of `values`.
    """
    nearest = values.to(dtype)
    other = torch.nextafter(nearest, torch.where(values > nearest, torch.inf, -torch.inf).to(dtype))
    gap = (other.float() - nearest.float()).abs()
    share = (values - nearest.float()).abs() / gap  # of the way from the nearest to the other neighbour
    draw = torch.rand(values.shape, generator=generator, device=values.device)
    return torch.where(draw < share, other, nearest)
