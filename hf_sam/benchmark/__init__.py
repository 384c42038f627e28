"""The cost of a step compared with the stock Trainer: interleaved timings, and counts of passes, bytes and memory."""

from .measure import Counted, Measurement, measure
from .stepping import ReferenceLoopTrainer, SteppedSAMTrainer, SteppedTrainer, stepped_trainer
from .variants import STOCK, VARIANTS, Variant

__all__ = [
    "STOCK",
    "VARIANTS",
    "Counted",
    "Measurement",
    "ReferenceLoopTrainer",
    "SteppedSAMTrainer",
    "SteppedTrainer",
    "Variant",
    "measure",
    "stepped_trainer",
]
