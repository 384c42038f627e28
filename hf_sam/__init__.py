"""Sharpness-aware minimization (SAM, Foret et al. 2021) for fine-tuning with the Hugging Face Trainer."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import SAMConfig
    from .methods import METHODS, Ascent, Descent, Method, Needs, Step
    from .trainer import SAMTrainer, SAMTrainerMixin
    from .update.vector import Vector

__version__ = "0.1.0"

# Imported on first use: the command line checks its words before torch and transformers are loaded, which takes seconds.
_HOMES = {
    "SAMConfig": "config",
    **dict.fromkeys(("METHODS", "Ascent", "Descent", "Method", "Needs", "Step"), "methods"),
    **dict.fromkeys(("SAMTrainer", "SAMTrainerMixin"), "trainer"),
    "Vector": "update.vector",
}

__all__ = [
    "METHODS",
    "Ascent",
    "Descent",
    "Method",
    "Needs",
    "SAMConfig",
    "SAMTrainer",
    "SAMTrainerMixin",
    "Step",
    "Vector",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
