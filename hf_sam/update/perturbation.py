"""Perturb weights, and restore them exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from operator import eq

import torch
from torch import Tensor
from torch.nn import Parameter

from . import buckets
from .parameters import local
from .vector import Scalar, Vector


class Perturbation:
    """Perturb weights and restore them bitwise: `with Perturbation() as weights: weights.add(eps)`.

    The original weights are saved in the memory of eps (for plain SAM, that of the ascent gradient), so that only one
    copy of the perturbed parameters is held in addition to stock training. They are restored from this copy, also after
    an exception, and never recomputed by subtraction.

    Args:
        generator (`torch.Generator`, *optional*):
            Round `w + eps` stochastically to the parameters' 16-bit type with this generator.
        renew_copies (`Callable[[], None]`, *optional*, defaults to `torch.clear_autocast_cache`):
            Called after every change of the weights to invalidate values derived from them.
        swaps_memory (`bool`, *optional*, defaults to `False`):
            Point `p.data` to the perturbed weights and back instead of copying. This halves the memory traffic, which
            dominates on a CPU, but is wrong if anything else holds the addresses of the weights (CUDA graphs, flat
            buffers).
        in_buckets (`bool`, *optional*, defaults to `False`): Work on whole lists if memory is not swapped.
    """

    def __init__(
        self,
        generator: torch.Generator | None = None,
        renew_copies: Callable[[], None] = torch.clear_autocast_cache,
        swaps_memory: bool = False,
        in_buckets: bool = False,
    ):
        # Parameters, their weights, and copies of the original weights, in the order in which they were perturbed.
        self._saved: list[tuple[Sequence[Parameter], list[Tensor], list[Tensor]]] = []
        self._moved: set[int] = set()  # ids of parameters
        self._generator = generator
        self._renew_copies = renew_copies
        self._swaps_memory = swaps_memory
        self._in_buckets = in_buckets
        self._piece = 0  # elements to copy at a time

    def __enter__(self) -> Perturbation:
        return self

    def __exit__(self, *_) -> None:
        try:
            self._restore()
        except BaseException:  # a second Ctrl-C during the restore
            self._restore()
            raise
        finally:
            self._saved.clear()
            self._moved.clear()
            self._renew_copies()  # autocast's cache may hold 16-bit copies of the perturbed weights

    @torch.no_grad()
    def _restore(self) -> None:
        # In reverse: of weights that share memory, the copy saved first is unperturbed.
        for parameters, weights, originals in reversed(self._saved):
            if self._swaps_memory:
                parameters[0].data = originals[0]
                continue
            weights = _in_current_memory(parameters, weights)
            if len(weights) == 1:
                weights[0].copy_(originals[0])
            else:
                torch._foreach_copy_(weights, originals)

    @property
    def is_applied(self) -> bool:
        """Whether any weight is perturbed."""
        return bool(self._saved)

    @torch.no_grad()
    def add(self, eps: Vector) -> None:
        """Set `w <- w + eps`, reusing the memory of `eps` unless it is shared.

        If the factor of `eps` is 0, as from `Vector.where`, no weight changes, even if its tensors are not finite. A
        tensor factor is not read on the host.
        """
        factor = 1.0 if eps.factor is None else eps.factor
        if not isinstance(factor, Tensor) and factor == 0:
            return
        self._piece = buckets.piece_size(eps.tensors, buckets.PIECE_SHARE * (1 if self._generator is None else 4))
        if self._in_buckets and not self._swaps_memory:
            self._add_in_buckets(eps, factor)
        else:
            # Tensor by tensor, so that each stays in the CPU's cache during its few operations.
            for p, direction in zip(eps.parameters, eps.tensors, strict=True):
                self._add_one(p, direction, factor, eps.is_shared)
        self._renew_copies()

    def _add_one(self, p: Parameter, direction: Tensor, factor: Scalar, is_shared: bool) -> None:
        weight = local(p)
        if id(p) in self._moved:
            weight.copy_(self._sum(weight, direction, factor))
        elif self._swaps_memory:
            self._save([p], [weight], [p.data])  # from here on, an interruption restores the weight
            fits = not is_shared and direction.dtype == weight.dtype
            out = direction if fits else torch.empty_like(weight)
            p.data = self._sum(weight, direction, factor, out=out)
        else:
            moved = self._sum(weight, direction, factor)
            keeps_all = not is_shared and direction.dtype == weight.dtype
            self._save([p], [weight], [direction.copy_(weight) if keeps_all else weight.clone()])
            weight.copy_(moved)

    def _save(self, parameters: Sequence[Parameter], weights: list[Tensor], originals: list[Tensor]) -> None:
        self._saved.append((parameters, weights, originals))
        self._moved.update(map(id, parameters))

    def _add_in_buckets(self, eps: Vector, factor: Scalar) -> None:
        """Perturb with one operation per bucket, whatever the number of tensors."""
        if not isinstance(factor, Tensor):
            factor = torch.full((), factor, dtype=torch.float32, device=eps.tensors[0].device)
        parameters, directions, weights_of_all = eps.parameters, eps.tensors, eps.layout.weights
        is_zero = (factor == 0).float()  # in that case, directions may be NaN
        rounded = None if self._generator is None else partial(round_stochastically, generator=self._generator)
        groups = eps.layout.groups(directions)  # no two weights of a group share memory
        if self._moved:  # split groups by whether weights have been saved
            are_saved = [id(p) in self._moved for p in parameters]
            groups = [[i for i in group if are_saved[i] is saved] for group in groups for saved in (False, True)]
        for group in filter(None, groups):
            owners, weights, along = (
                buckets.pick(entries, group) for entries in (parameters, weights_of_all, directions)
            )
            if id(owners[0]) in self._moved:
                buckets.add_multiple_(weights, along, factor, is_zero, rounded)
                continue
            self._save(
                owners, weights, torch._foreach_mul(weights, 1)
            )  # from here on, an interruption restores the weights
            buckets.add_multiple_(weights, along, factor, is_zero, rounded)
            if not eps.is_shared and along[0].dtype == weights[0].dtype:
                torch._foreach_copy_(along, self._saved[-1][2])  # so that at most one bucket is held twice
                self._saved[-1] = (owners, weights, along)

    def displacement(self) -> Iterator[tuple[Parameter, Tensor]]:
        """Yield the realised displacement `(w + eps) - w` of each parameter, or of some rows of a large one."""
        for parameters, moved, _ in self.displacements():
            yield from zip(parameters, moved, strict=True)

    def displacements(self) -> Iterator[tuple[Sequence[Parameter], list[Tensor], slice]]:
        """Yield the displacements of several parameters at a time, or of some rows of a large one."""
        size = buckets.piece_size((t for _, _, originals in self._saved for t in originals), 4 * buckets.PIECE_SHARE)
        for parameters, weights, originals in self._saved:
            weights = _in_current_memory(parameters, weights)
            for group in buckets.grouped(weights, originals, max_bytes=4 * size):
                owners, moved, saved = (buckets.pick(entries, group) for entries in (parameters, weights, originals))
                if len(owners) > 1:
                    yield owners, list(torch._foreach_sub(*map(buckets.in_float32, (moved, saved)))), slice(None)
                    continue
                exact, row = torch.promote_types(moved[0].dtype, torch.float32), 0
                for now, before in buckets.pieces(size, moved[0], saved[0]):
                    rows = slice(row, row + len(now)) if now.dim() and now.shape != moved[0].shape else slice(None)
                    row = rows.stop or 0
                    yield owners, [now.to(exact) - before], rows

    def _sum(self, weight: Tensor, direction: Tensor, factor: Scalar, out: Tensor | None = None) -> Tensor:
        """`weight + factor * direction`, in float32 or better before it is rounded."""
        exact = torch.promote_types(weight.dtype, torch.float32)
        if isinstance(factor, Tensor) and factor.device != weight.device:
            factor = factor.to(weight.device)
        if weight.dtype == direction.dtype == exact and weight.device.type == "cpu":
            if not isinstance(factor, Tensor):
                return torch.add(weight, direction, alpha=factor, out=out)
            return torch.addcmul(weight, direction, factor if factor.dtype == exact else factor.to(exact), out=out)
        if weight.dtype == exact and out is None:
            return self._exact_sum(weight, direction, factor)
        out = torch.empty_like(weight) if out is None else out
        # In pieces, because float32 takes twice the memory.
        for part, along, target in buckets.pieces(self._piece, weight, direction, out):
            moved = self._exact_sum(part, along, factor)
            if self._generator is not None and weight.dtype != exact:
                moved = round_stochastically(moved, weight.dtype, self._generator)
            target.copy_(moved)
        return out

    @staticmethod
    def _exact_sum(weight: Tensor, direction: Tensor, factor: Scalar) -> Tensor:
        exact = torch.promote_types(weight.dtype, torch.float32)
        return torch.nan_to_num_(direction.to(exact) * factor, nan=0.0, posinf=0.0, neginf=0.0).add_(weight)


def _in_current_memory(parameters: Sequence[Parameter], weights: list[Tensor]) -> list[Tensor]:
    """The weights where the parameters have them now: adversarial training, for example, replaces `p.data` in a pass."""
    if all(map(eq, map(Tensor.data_ptr, parameters), map(Tensor.data_ptr, weights))):
        return weights
    return [local(p) for p in parameters]


def round_stochastically(values: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Round float32 `values` to one of the two neighbours in `dtype`, with probabilities such that E[out] = in.

    Args:
        values (`Tensor`): float32, any shape.
        dtype (`torch.dtype`): `torch.bfloat16` or `torch.float16`.
        generator (`torch.Generator`): Source of the random numbers, on the device of `values`.
    """
    nearest = values.to(dtype)
    other = torch.nextafter(nearest, torch.where(values > nearest, torch.inf, -torch.inf).to(dtype))
    gap = (other.float() - nearest.float()).abs()
    share = (values - nearest.float()).abs() / gap  # fraction of the way from the nearest to the other neighbour
    draw = torch.rand(values.shape, generator=generator, device=values.device)
    return torch.where(draw < share, other, nearest)
