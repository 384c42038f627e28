"""Quantization by libraries, through transformers' configurations: int8 and int4 of torchao, nf4 of bitsandbytes."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from .weights import WeightMatrix

GROUP_SIZE = 64


def _torchao_int8(kept: list[str]) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return transformers.TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=kept)


def _torchao_int4(kept: list[str]) -> Any:
    # torchao's Int4WeightOnlyConfig needs kernels for certain GPUs; this one rounds the same way on any machine.
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP_SIZE))
    return transformers.TorchAoConfig(config, modules_to_not_convert=kept)


def _bitsandbytes_nf4(kept: list[str]) -> Any:
    import bitsandbytes  # noqa: F401 - fails with a shorter message than transformers' own

    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=kept or None
    )


LIBRARIES = {"torchao-int8": _torchao_int8, "torchao-int4": _torchao_int4, "bitsandbytes-nf4": _bitsandbytes_nf4}


@contextmanager
def loaded_by_library(model: nn.Module, name: str, matrices: Mapping[str, WeightMatrix]) -> Iterator[nn.Module]:
    """
    Save the model, load it quantized as a user would, and yield the loaded copy; `model` itself does not change.

    Args:
        model (`PreTrainedModel`): A model without adapters.
        name (`str`): One of `LIBRARIES`.
        matrices (`Mapping`): The weights to quantize; other linear layers stay in full precision.

    Raises:
        ImportError: The library is not installed.
        ValueError: `model` is not a transformers model.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"{name} needs a transformers model, not {type(model).__name__}.")
    kept = [
        module_name
        for module_name, module in model.named_modules()
        if isinstance(module, nn.Linear) and f"{module_name}.weight" not in matrices
    ]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the libraries do not concern the user
        config = LIBRARIES[name](kept)
        model.save_pretrained(folder)
        loaded = type(model).from_pretrained(
            folder, quantization_config=config, dtype="float32", device_map={"": str(model.device)}
        )
        yield loaded.eval()
