"""Print what a bug report needs: versions, devices, and how hf_sam is installed."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ... import __version__
from .config_files import CONFIGS
from .parsers import Parser

PACKAGES = (
    *("torch", "transformers", "accelerate", "datasets", "peft", "trl", "deepspeed", "safetensors", "numpy", "scipy"),
    *("scikit-learn", "torchvision", "evaluate", "matplotlib"),
)


def main(argv: Sequence[str]) -> None:
    Parser("env", description=__doc__).parse_args(argv)
    facts = {
        "hf-sam": f"{__version__} in {Path(__file__).parents[2]}",
        "configurations": str(CONFIGS) if CONFIGS.is_dir() else "none",
        "Python": platform.python_version(),
        "platform": platform.platform(),
        **{name: _version(name) for name in PACKAGES},
        "devices": devices(),
        "Accelerate's own configuration": accelerate_config(),
    }
    print("\n".join(f"- {name}: {value}" for name, value in facts.items()))


def devices() -> str:
    """Return the names of the accelerators, otherwise the CPU."""
    import torch

    if torch.cuda.is_available():
        return ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return f"{torch.accelerator.device_count()} x {kind.type}" if kind else f"CPU, {torch.get_num_threads()} threads"


def accelerate_config() -> str:
    """Return path and content of the file written by `accelerate config`, in one line."""
    from accelerate.commands.config.config_args import default_config_file

    path = Path(default_config_file)
    if not path.is_file():
        return "none"
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    return f"{path}: {'; '.join(lines)}"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
