"""Methods: ascents (where to perturb), descents (what the optimizer gets), and the table of published methods."""

from .ascents import AuxiliaryPair, Carried, Friendly, Geometry, Momentum, Noise, Previous, RandomTensors, Steepest
from .base import Ascent, Descent, Method, Needs, Step
from .descents import Functional, HardestHit, Reused, SurrogateGap, ThroughPerturbation, Weighted
from .fields import flag, number, whole
from .geometry import steepest
from .lora_noise import LoraNoise
from .table import METHODS
from .variants import AboveAverage, Centred, LossBudget, Preconditioned, SparseByScore, TailClasses

__all__ = [
    "METHODS",
    "AboveAverage",
    "Ascent",
    "AuxiliaryPair",
    "Carried",
    "Centred",
    "Descent",
    "Friendly",
    "Functional",
    "Geometry",
    "HardestHit",
    "LoraNoise",
    "LossBudget",
    "Method",
    "Momentum",
    "Needs",
    "Noise",
    "Preconditioned",
    "Previous",
    "RandomTensors",
    "Reused",
    "SparseByScore",
    "Steepest",
    "Step",
    "SurrogateGap",
    "TailClasses",
    "ThroughPerturbation",
    "Weighted",
    "flag",
    "number",
    "steepest",
    "whole",
]
