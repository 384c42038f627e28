"""Sharpness-aware minimization (SAM, Foret et al. 2021) for fine-tuning with the Hugging Face Trainer."""

from .config import SAMConfig
from .methods import METHODS, Ascent, Descent, Method, Needs, Step
from .trainer import SAMTrainer, SAMTrainerMixin
from .update.vector import Vector

__version__ = "0.1.0"

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
