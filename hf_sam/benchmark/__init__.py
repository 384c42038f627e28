"""The cost of a step compared with the stock Trainer: counted passes, bytes and memory, and interleaved timings."""

from .measure import Counted, Measurement, measure
from .stepping import HandLoopTrainer, SteppedSAMTrainer, SteppedTrainer, stepped_trainer
from .variants import CONTENDERS, STOCK, Contender

__all__ = [
    "CONTENDERS",
    "STOCK",
    "Contender",
    "Counted",
    "HandLoopTrainer",
    "Measurement",
    "SteppedSAMTrainer",
    "SteppedTrainer",
    "measure",
    "stepped_trainer",
]
