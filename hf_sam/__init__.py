"""Sharpness-aware minimization (SAM, Foret et al. 2021) for fine-tuning with the Hugging Face Trainer."""

from .config import SAMConfig
from .methods.table import METHODS, Method
from .trainer import SAMTrainer, SAMTrainerMixin

__version__ = "0.1.0"

__all__ = ["METHODS", "Method", "SAMConfig", "SAMTrainer", "SAMTrainerMixin", "__version__"]
