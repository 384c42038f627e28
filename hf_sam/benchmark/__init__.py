"""What a step costs beside the stock Trainer's: counted passes, bytes and memory, and times taken in turns."""

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
