"""Which parameters; gradients put aside and back; perturb and restore exactly."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

Gradients = dict[Parameter, Tensor]


# --- which ---------------------------------------------------------------------------------------------------------


def select(model: nn.Module, perturb: str | Sequence[str]) -> dict[str, Parameter]:
    """The trainable parameters that are perturbed, by name; a tied parameter appears once.

    Args:
        model (`nn.Module`): The model, not wrapped for distributed training, so that names are the user's own.
        perturb (`str` or `list[str]`): `SAMConfig.perturb`.

    Raises:
        ValueError: Nothing is selected, or a pattern matches no trainable parameter.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    norms = {
        id(p)
        for module in model.modules()
        if "norm" in type(module).__name__.lower()
        for p in module._parameters.values()
    }
    if perturb == "all":
        selected = trainable
    elif perturb == "norm":
        selected = {name: p for name, p in trainable.items() if id(p) in norms}
    elif perturb == "no-norm-no-bias":
        selected = {
            name: p for name, p in trainable.items() if id(p) not in norms and name.rpartition(".")[2] != "bias"
        }
    else:
        patterns = [perturb] if isinstance(perturb, str) else perturb
        for pattern in patterns:
            if not fnmatch.filter(trainable, pattern):
                raise ValueError(
                    f"perturb: the pattern {pattern!r} matches none of the {len(trainable)} trainable parameters; they "
                    f"have names such as {', '.join(list(trainable)[:3])}. Shell patterns match the whole name."
                )
        selected = {n: p for n, p in trainable.items() if any(fnmatch.fnmatchcase(n, pattern) for pattern in patterns)}
    if not selected:
        raise ValueError(
            f"perturb={perturb!r} selects none of the {len(trainable)} trainable parameters of this model."
        )
    return selected


# --- gradients -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """This process's part of a parameter or gradient, sharing its memory: the whole of it unless it is sharded."""
    if isinstance(tensor, DTensor):
        return tensor.to_local()
    return getattr(tensor, "ds_tensor", tensor).detach()  # under DeepSpeed's ZeRO-3 one flat part


def laid_out_as(p: Parameter, gradient: Tensor) -> Tensor:
    """The gradient, divided among processes as its parameter is."""
    if isinstance(gradient, DTensor) and gradient.placements != p.placements:
        return gradient.redistribute(placements=p.placements)
    return gradient


def take_gradients(parameters: Iterable[Parameter]) -> Gradients:
    """Move the gradients out of `p.grad`, which is left at None, as after `zero_grad`.

    What is taken belongs to the caller alone: a gradient that lies in a buffer of DDP's is copied out of it.
    """
    taken = {}
    for p in parameters:
        if p.grad is not None:
            in_bucket = not isinstance(p.grad, DTensor) and p.grad.untyped_storage().nbytes() > p.grad.nbytes
            taken[p] = p.grad.clone() if in_bucket else laid_out_as(p, p.grad)
            p.grad = None
    return taken


def put_gradients(gradients: Gradients) -> None:
    """The inverse of `take_gradients`."""
    for p, gradient in gradients.items():
        p.grad = gradient


@contextlib.contextmanager
def gradients_only_for(chosen: Sequence[Parameter], trainable: Sequence[Parameter]) -> Iterator[None]:
    """Backward passes inside compute no gradients of the other trainable parameters."""
    wanted = {id(p) for p in chosen}
    others = [p for p in trainable if id(p) not in wanted]
    for p in others:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in others:
            p.requires_grad_(True)


# --- weights -------------------------------------------------------------------------------------------------------


class Perturbation:
    """Moves weights away and puts them back bitwise: `with Perturbation() as eps: eps.add(...)`.

    What is saved and what is perturbed share two memories, the weights' own and the directions' (the ascent gradient's,
    for the plain method), so that one copy of the perturbed parameters is all that is held beyond stock training.
    Weights are put back, never recomputed by subtraction, whatever the block raises.

    Args:
        generator (`torch.Generator`, *optional*):
            Round `w + eps` stochastically to the parameters' 16-bit type with this generator.
        renew_copies (`Callable[[], None]`, *optional*, defaults to `torch.clear_autocast_cache`):
            Called whenever weights have moved: what was derived from them is stale.
        swaps_memory (`bool`, *optional*, defaults to `False`):
            Let parameters point to the perturbed weights and back instead of copying both ways. Halves the memory
            traffic, which is what a step on a CPU spends here; wrong where something else holds on to their addresses
            (CUDA graphs, flat buffers).
    """

    def __init__(
        self,
        generator: torch.Generator | None = None,
        renew_copies: Callable[[], None] = torch.clear_autocast_cache,
        swaps_memory: bool = False,
    ):
        self._saved: dict[Parameter, Tensor] = {}
        self._generator = generator
        self._renew_copies = renew_copies
        self._swaps_memory = swaps_memory

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
            self._renew_copies()  # autocast's cache may hold 16-bit copies of the perturbed weights

    @torch.no_grad()
    def _restore(self) -> None:
        for p, original in self._saved.items():
            if self._swaps_memory:
                p.data = original
            else:
                local(p).copy_(original)

    @property
    def is_applied(self) -> bool:
        """Whether any weight has been moved."""
        return bool(self._saved)

    @torch.no_grad()
    def add(
        self, parameters: list[Parameter], directions: list[Tensor], scale: Tensor, *, borrowed: bool = False
    ) -> None:
        """`w <- w + scale * directions`, which are local parts; their memory is taken over unless it is `borrowed`.

        Where `scale` is 0 nothing moves, not even where a direction is NaN or infinite.
        """
        if scale.device.type == "cpu" and scale == 0:  # reading it waits for nothing here
            return
        # Parameter by parameter rather than foreach: each one stays in cache through its few operations.
        for p, direction in zip(parameters, directions, strict=True):
            weight = local(p)
            if p in self._saved:
                weight.copy_(self._moved(weight, direction, scale))
            elif self._swaps_memory:
                self._saved[p] = p.data  # from here on an interruption is undone
                out = torch.empty_like(weight) if borrowed else direction
                p.data = self._moved(weight, direction, scale, out=out)
            else:
                moved = self._moved(weight, direction, scale)
                self._saved[p] = weight.clone() if borrowed else direction.copy_(weight)
                weight.copy_(moved)  # an interruption from here on is undone
        self._renew_copies()

    def displacement(self) -> Iterator[tuple[Parameter, Tensor]]:
        """What was really added to each parameter after rounding, `(w + eps) - w`, one at a time."""
        for p, original in self._saved.items():
            weight = local(p).detach()
            yield p, weight.to(torch.promote_types(p.dtype, torch.float32)) - original

    def _moved(self, weight: Tensor, direction: Tensor, scale: Tensor, out: Tensor | None = None) -> Tensor:
        exact = torch.promote_types(weight.dtype, torch.float32)
        if weight.dtype == exact and weight.device.type == "cpu":
            return torch.addcmul(weight, direction, scale.to(exact), out=out)
        moved = torch.nan_to_num_(direction.to(exact) * scale, nan=0.0, posinf=0.0, neginf=0.0).add_(weight)
        if self._generator is not None and weight.dtype != exact:
            moved = round_stochastically(moved, weight.dtype, self._generator)
        return moved if out is None else out.copy_(moved)


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
