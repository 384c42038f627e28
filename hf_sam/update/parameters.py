"""Select the trained and the perturbed parameters; move gradients out of `p.grad` and back."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from operator import attrgetter, gt
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from transformers.utils import logging

from ..config import SELECTORS
from .namespaces import are_identical
from .roles import embedding_parameters, has_tied_head, head_parameters, norm_parameters

Gradients = dict[Parameter, Tensor]

logger = logging.get_logger(__name__)

# For `map`, which loops over parameters in C.
_grad, _trains, _nbytes = attrgetter("grad"), attrgetter("requires_grad"), attrgetter("nbytes")


# --- selection -------------------------------------------------------------------------------------------------------


class TrainedParameters:
    """The trained and perturbed parameters, updated in every step because callbacks may freeze and unfreeze layers.

    Args:
        model (`nn.Module`): The model, not wrapped for distributed training, so that parameters have their usual names.
        perturb (`str` or `list[str]`): `SAMConfig.perturb`.
        optimizer (`torch.optim.Optimizer`, *optional*): Its groups define the trained parameters. None if they do not
            hold the model's parameters (DeepSpeed): then `requires_grad` alone decides.
        others (`Mapping[str, nn.Module]`, *optional*): Modules outside the model whose parameters the optimizer may
            hold, such as a loss with weights, by name prefix.
        parameters_move (`bool`, *optional*, defaults to `False`): The engine replaces parameters, so that new ones do
            not mean new weights.

    Attributes:
        names (`dict[Parameter, str]`): The names of all parameters, trained or not.
        trainable (`list[Parameter]`): Parameters of the model and the optimizer that require a gradient.
        in_model (`list[Parameter]`): The trainable parameters of the model.
        selected (`list[Parameter]`): The perturbed parameters of the model: selected, and stepped by the optimizer.

    Raises:
        ValueError: Nothing is selected, or a pattern matches no trainable parameter.
    """

    def __init__(
        self,
        model: nn.Module,
        perturb: str | Sequence[str] = "all",
        optimizer: torch.optim.Optimizer | None = None,
        others: Mapping[str, nn.Module] | None = None,
        parameters_move: bool = False,
    ):
        self._parameters_move = parameters_move
        self._members: list[dict[str, Any]] = []
        self._model, self._perturb, self._optimizer, self._others = model, perturb, optimizer, dict(others or {})
        self._seen: tuple[list[bool], list[Any]] | None = None
        self.refresh()
        if not self.selected and (perturb in SELECTORS or not self._waits_for_thawing()):
            raise ValueError(
                f"perturb={perturb!r} selects none of the {len(self.trainable)} trainable parameters of this model. Choose another selector."
            )

    def refresh(self) -> bool:
        """Update the lists; return whether they have changed."""
        if self._seen is not None and self._is_unchanged(self._state()):
            return False
        is_first = self._seen is None
        model_names = {p: name for name, p in self._model.named_parameters()}
        self.names = dict(model_names)
        for prefix, module in self._others.items():
            self.names.update((p, f"{prefix}.{n}") for n, p in module.named_parameters() if p not in self.names)
        stepped = self._stepped()
        self.names.update((p, f"optimizer.{i}") for i, p in enumerate(stepped or ()) if p not in self.names)
        held = None if stepped is None or model_names.keys().isdisjoint(stepped) else set(stepped)
        self.trainable = [
            p for p in self.names if p.requires_grad and (p in model_names or (held is not None and p in held))
        ]
        self.in_model = [p for p in self.trainable if p in model_names]
        candidates = {self.names[p]: p for p in self.trainable if held is None or p in held}
        if is_first:
            refuse_unmatched(self._perturb, self.names.values(), candidates)
        chosen = select(self._model, self._perturb, candidates)
        self.selected = list(chosen.values())
        if len(self.selected) == len(self.trainable):
            self.selected = self.trainable
        self._all = list(self.names)
        if not self._parameters_move:
            self._members = [names for m in self._model.modules() for names in (m._parameters, m._modules) if names]
        self._seen = self._state()
        return True

    def _state(self) -> tuple[list[bool], list[Any]]:
        """Which parameters train; and the modules and parameters of the model, and those of the optimizer."""
        members = chain.from_iterable(map(dict.values, self._members))
        return list(map(_trains, self._all)), [*members, *(self._stepped() or ())]

    def _is_unchanged(self, state: tuple[list[bool], list[Any]]) -> bool:
        (trains, members), (trained, previous) = state, self._seen
        return trains == trained and len(members) == len(previous) and are_identical(members, previous)

    def _waits_for_thawing(self) -> bool:
        """Whether the patterns select frozen parameters, which a callback may unfreeze; warn in that case."""
        named = select(self._model, self._perturb, {name: p for p, name in self.names.items()})
        logger.warning(
            f"perturb={self._perturb!r} selects frozen parameters only ({', '.join(list(named)[:3])}): nothing is perturbed "
            "until they are unfrozen."
        )
        return bool(named)

    def _stepped(self) -> list[Parameter] | None:
        if self._optimizer is None:
            return None
        return list(chain.from_iterable(group["params"] for group in self._optimizer.param_groups))


def refuse_unmatched(perturb: str | Sequence[str], names: Iterable[str], trainable: Mapping[str, Parameter]) -> None:
    """Raise an error for a shell pattern that matches no parameter.

    Raises:
        ValueError: A pattern matches no parameter; the message names it.
    """
    if isinstance(perturb, str) and perturb in SELECTORS:
        return
    names = list(names)
    for pattern in [perturb] if isinstance(perturb, str) else perturb:
        if not fnmatch.filter(names, pattern):
            raise ValueError(
                f"perturb: the pattern {pattern!r} matches none of the {len(trainable)} trainable parameters, "
                f"whose names are like {', '.join(list(trainable)[:3])}. A shell pattern must match the whole name."
            )


def select(model: nn.Module, perturb: str | Sequence[str], trainable: Mapping[str, Parameter]) -> dict[str, Parameter]:
    """The parameters that `perturb` selects among `trainable`, by name."""
    if perturb == "all":
        return dict(trainable)
    if perturb in ("norm", "no-norm-no-bias"):
        norms = norm_parameters(model)
        if perturb == "norm":
            return {name: p for name, p in trainable.items() if p in norms}
        return {n: p for n, p in trainable.items() if p not in norms and n.rpartition(".")[2] != "bias"}
    if perturb in ("no-embeddings", "no-embeddings-no-head"):
        left_out = embedding_parameters(model)
        if perturb == "no-embeddings-no-head":
            left_out |= _head_of(model)
        return {name: p for name, p in trainable.items() if name not in left_out}
    patterns = [perturb] if isinstance(perturb, str) else perturb
    return {n: p for n, p in trainable.items() if any(fnmatch.fnmatchcase(n, pattern) for pattern in patterns)}


def _head_of(model: nn.Module) -> set[str]:
    head = head_parameters(model)
    if not head and not has_tied_head(model):  # a tied head is left out with the embeddings
        raise ValueError(
            f"perturb='no-embeddings-no-head': {type(model).__name__} has no recognisable head: it is a bare base model, or not a "
            "transformers model. Use 'no-embeddings', or shell patterns over parameter names."
        )
    return head


# --- gradients -------------------------------------------------------------------------------------------------------


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a parameter or gradient, sharing its memory; the whole tensor if it is not sharded."""
    kind = type(tensor)
    if kind is Tensor or (kind is Parameter and "ds_tensor" not in vars(tensor)):
        return tensor.detach()
    if isinstance(tensor, DTensor):
        with torch.no_grad():
            return tensor.to_local()
    return getattr(tensor, "ds_tensor", tensor).detach()  # the flat shard of DeepSpeed's ZeRO-3


def parts_of_gradients(gradients: Gradients, parameters: Sequence[Parameter]) -> list[Tensor]:
    """This process's shard of each gradient, sharing its memory; `parameters` are in the order of `gradients`."""
    found = gradients.values() if len(parameters) == len(gradients) else [gradients[p] for p in parameters]
    return [g if type(g) is Tensor and not g.requires_grad else local(g) for g in found]


def is_whole(tensor: Tensor) -> bool:
    """Whether the tensor is not sharded."""
    return not isinstance(tensor, DTensor) and not hasattr(tensor, "ds_tensor")


def sharded_like(p: Parameter, gradient: Tensor) -> Tensor:
    """The gradient, with the placements of its parameter."""
    if type(gradient) is not Tensor and isinstance(gradient, DTensor) and gradient.placements != p.placements:
        return gradient.redistribute(placements=p.placements)
    return gradient


def take_gradients(parameters: Sequence[Parameter], *, are_views: bool = False) -> Gradients:
    """Move the gradients out of `p.grad`, which becomes None as after `zero_grad`.

    The caller owns the result: gradients that are views of a larger buffer are copied.
    """
    taken = existing_gradients(parameters)
    for p in taken:
        p.grad = None
    gradients = taken.values()
    if are_plain_tensors(gradients) and not are_views:
        storages = map(UntypedStorage.nbytes, map(Tensor.untyped_storage, gradients))
        if not any(map(gt, storages, map(_nbytes, gradients))):
            return taken
    for p, gradient in taken.items():
        is_plain = type(gradient) is Tensor or not isinstance(gradient, DTensor)
        is_view = is_plain and (are_views or gradient.untyped_storage().nbytes() > gradient.nbytes)
        taken[p] = gradient.clone() if is_view else sharded_like(p, gradient)
    return taken


def existing_gradients(parameters: Sequence[Parameter]) -> Gradients:
    """The gradients that are not None, left in `p.grad`."""
    return {p: g for p, g in zip(parameters, map(_grad, parameters), strict=True) if g is not None}


def are_plain_tensors(tensors: Iterable[Tensor]) -> bool:
    """Whether all are of class `Tensor`, not of a subclass such as `DTensor`."""
    return {*map(type, tensors)} <= {Tensor}


def put_gradients(gradients: Gradients) -> None:
    """The inverse of `take_gradients`."""
    for p, gradient in gradients.items():
        p.grad = gradient


@contextlib.contextmanager
def gradients_only_for(chosen: Sequence[Parameter], trainable: Sequence[Parameter]) -> Iterator[None]:
    """A context in which backward passes compute gradients of the `chosen` among the `trainable` parameters only."""
    if chosen is trainable:
        yield
        return
    wanted = set(chosen)
    others = [p for p in trainable if p not in wanted]
    for p in others:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in others:
            p.requires_grad_(True)
