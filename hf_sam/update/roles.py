"""Classify parameters as embeddings, head and other groups by the type and role of their modules."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

# Class names of modules that turn raw input into hidden states: BertEmbeddings, ViTPatchEmbeddings, Qwen2VLPatchEmbed,
# MobileNetV2Stem, Wav2Vec2FeatureEncoder. Not SwinPatchMerging, which divides hidden states; rotary embeddings have no parameters.
_INPUT_KIND = re.compile(r"(Embeddings?|Embed|Embedder|Stem|FeatureEncoder)$")
_TASK = re.compile(r"For[A-Z]|Head")  # BertForMaskedLM, GPT2LMHeadModel; not BertModel, MaskFormerModel
GROUPS = ("embeddings", "attention", "mlp", "norm", "head", "other")
_WORDS = {
    "attention": re.compile(r"attn|attention|[qkv]_proj|qkv"),
    "mlp": re.compile(r"mlp|ffn|feed_forward|intermediate|output\.dense|fc[12]|(gate|up|down)_proj|densereludense"),
}
_POSITION = re.compile(r"^(?!.*bias).*(embed|(^|_)pos)")


def embedding_parameters(model: nn.Module) -> set[str]:
    """Token tables, patch and stem projections, learned positions, and class, mask, register and query tokens."""
    inputs = {_asked(module, "get_input_embeddings") for module in model.modules()}
    stacks = [layer for m in model.modules() if isinstance(m, nn.ModuleList) for layer in m.children()]
    in_layers = {m for layer in stacks if not isinstance(layer, PreTrainedModel) for m in layer.modules()}
    found, norms = set(), set()
    for module in model.modules():
        bare = {name: p for name, p in module._parameters.items() if p is not None}
        is_input, is_in_layer = bool(_INPUT_KIND.search(type(module).__name__)), module in in_layers
        if "norm" in type(module).__name__.lower():
            norms.update(bare.values())
        elif module in inputs or (is_input and not is_in_layer) or _is_embedding_or_image_stem(module):
            found.update(_own(module))
        elif not type(module).__module__.startswith("torch."):
            found.update(p for name, p in bare.items() if is_input or _is_token(name, p, is_in_layer))
    return {name for name, p in model.named_parameters() if p in found and p not in norms}


def norm_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The parameters of normalisation layers, recognised by the name of their class."""
    norms = (module for module in model.modules() if "norm" in type(module).__name__.lower())
    return {p for module in norms for p in module._parameters.values() if p is not None}


def head_parameters(model: nn.Module) -> set[str]:
    """Parameters after the body: task heads, and output embeddings not tied to the input embeddings."""
    body = {p for outer in _outermost(model) for part in _body(outer) for p in part.parameters()}
    for outer in _outermost(model):
        output = _asked(outer, "get_output_embeddings")
        body.difference_update(output.parameters() if output is not None else ())
    embeddings = embedding_parameters(model)
    return {name for name, p in model.named_parameters() if body and p not in body and name not in embeddings}


def has_tied_head(model: nn.Module) -> bool:
    """Whether the output embeddings are the input embeddings, as in most small language models."""
    outputs = (_asked(outer, "get_output_embeddings") for outer in _outermost(model))
    tables = embedding_parameters(model)
    names = {p: name for name, p in model.named_parameters()}
    return any(names.get(getattr(output, "weight", None)) in tables for output in outputs)


def groups_of(model: nn.Module) -> dict[str, str]:
    """The module group of each parameter name, one of `GROUPS`."""
    embeddings, head = embedding_parameters(model), head_parameters(model)
    norms = norm_parameters(model)

    def group(name: str, p: Tensor) -> str:
        if name in embeddings:
            return "embeddings"
        if p in norms:
            return "norm"
        if name in head:
            return "head"
        return next((found for found, word in _WORDS.items() if word.search(name.lower())), "other")

    return {name: group(name, p) for name, p in model.named_parameters()}


def _is_embedding_or_image_stem(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d | nn.Conv3d):  # 1 x 1: not a stem but squeeze-and-excitation
        return module.in_channels <= 4 and module.groups == 1 and max(module.kernel_size) > 1
    return isinstance(module, nn.Embedding | nn.EmbeddingBag)


def _is_token(name: str, p: Tensor, is_in_layer: bool) -> bool:
    """Whether a bare parameter is a token or position: by name or, outside the layers, if broadcast over the batch."""
    shape = getattr(p, "ds_shape", p.shape)
    if "token" in name or is_in_layer or not shape:
        return "token" in name
    return bool(_POSITION.search(name)) or (len(shape) > 2 and shape[0] == 1)


def _own(module: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters of a module, but not those of a whole model inside it (a backbone as patch embedding)."""
    yield from (p for p in module._parameters.values() if p is not None)
    for child in module.children():
        if not isinstance(child, PreTrainedModel):
            yield from _own(child)


def _outermost(model: nn.Module) -> list[nn.Module]:
    """The outermost transformers models in `model`, without PEFT's wrappers."""
    if hasattr(model, "get_base_model"):
        return _outermost(model.get_base_model())
    return [model] if isinstance(model, PreTrainedModel) else [m for c in model.children() for m in _outermost(c)]


def _body(model: nn.Module) -> list[nn.Module]:
    """The parts of a transformers model below its head: its base model, or the models that it combines."""
    if not _TASK.search(type(model).__name__):
        return [model]
    if model.base_model is not model and isinstance(model.base_model, PreTrainedModel):
        return [model.base_model]
    parts = [child for child in model.children() if isinstance(child, PreTrainedModel)]
    return parts if parts and _asked(model, "get_output_embeddings") is None else [model]


def _asked(module: nn.Module, question: str) -> Any:
    try:
        return getattr(module, question)()
    except Exception:  # custom code may raise anything; the classification falls back to other rules
        return None
