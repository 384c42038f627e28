"""Provenance of a run: fingerprints of model and data, packages, commit, hardware."""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

PACKAGES = ("hf-sam", "torch", "transformers", "accelerate", "datasets", "peft", "trl", "numpy", "scipy")
MAX_HASHED_VALUES = 2**16  # per tensor: all values of a classifier head, a strided sample of large matrices


def describe_model(model: torch.nn.Module) -> dict[str, Any]:
    """Name, class, size, norm and fingerprint of a model with its present weights."""
    return {
        "name": getattr(getattr(model, "config", None), "_name_or_path", "") or None,
        "class": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "trainable_norm": _trainable_norm(model),
        "fingerprint": fingerprint_model(model),
    }


@torch.no_grad()
def _trainable_norm(model: torch.nn.Module) -> float | None:
    """Euclidean norm of all trained weights, the scale of rho; None where this process does not hold them in full."""
    weights = [p.detach() for p in model.parameters() if p.requires_grad]
    if any(type(p) is not torch.Tensor or p.device.type == "meta" or not p.is_floating_point() for p in weights):
        return None
    return math.sqrt(sum(float(torch.linalg.vector_norm(p, dtype=torch.float32)) ** 2 for p in weights))


@torch.no_grad()
def fingerprint_model(model: torch.nn.Module) -> str:
    """
    A hash of the names, shapes, dtypes and values of parameters and buffers.

    For tensors above `MAX_HASHED_VALUES` elements, an evenly spaced sample is hashed, so that large models take less
    than a second; for sharded tensors, the local shard.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        digest.update(f"{name} {tuple(local.shape)} {local.dtype}\n".encode())
        if local.device.type == "meta" or not local.numel():
            continue
        values = local.detach().reshape(-1)
        values = values[:: -(-len(values) // MAX_HASHED_VALUES)].contiguous().cpu()
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def describe_data(dataset: Any) -> dict[str, Any]:
    """Number of examples, columns and fingerprint; each is `None` if the data set does not have it (such as streams)."""
    return {
        "examples": len(dataset) if hasattr(dataset, "__len__") else None,
        "columns": list(getattr(dataset, "column_names", None) or []) or None,
        "fingerprint": fingerprint_data(dataset),
    }


def fingerprint_data(dataset: Any) -> str | None:
    """
    A hash of the content of a `datasets.Dataset`, in order; `None` for anything else.

    The library's own `_fingerprint` hashes the transforms and is random if they cannot be hashed, so equal data may
    have different fingerprints.
    """
    from datasets import Dataset

    if not isinstance(dataset, Dataset):
        return None
    arrow = dataset.with_format("arrow")
    digest = hashlib.sha256(str(arrow.features).encode())
    for table in arrow.iter(batch_size=1000):
        copy = table.take(np.arange(len(table))).combine_chunks()  # a slice would serialize its neighbours, too
        for batch in copy.to_batches():
            digest.update(batch.serialize())
    return digest.hexdigest()[:16]


def describe_environment() -> dict[str, Any]:
    """Package versions, the commit of the code and the hardware."""
    return {"packages": _packages(), "git": _git(), "hardware": _hardware()}


def _packages() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _git() -> dict[str, Any] | None:
    """Commit and dirty flag of the checkout that hf_sam runs from; `None` outside a checkout or without git."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", __file__)  # fails if installed inside another project's checkout
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _hardware() -> dict[str, Any]:
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "machine": platform.machine(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerators": devices,
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
    }


def peak_memory() -> int:
    """Peak memory in bytes: allocated on the accelerator if there is one, else resident in this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
