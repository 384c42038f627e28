"""What a method is: where to perturb, what the optimizer gets, and the table of the published ones."""

from .ascents import AuxiliaryPair, Carried, Friendly, Geometry, Momentum, Noise, Previous, RandomTensors, Steepest
from .base import Ascent, Descent, Method, Needs, Step
from .descents import Functional, HardestHit, Reused, SurrogateGap, ThroughPerturbation, Weighted
from .fields import flag, number, whole
from .geometry import steepest
from .table import METHODS

__all__ = [
    "METHODS",
    "Ascent",
    "AuxiliaryPair",
    "Carried",
    "Descent",
    "Friendly",
    "Functional",
    "Geometry",
    "HardestHit",
    "Method",
    "Momentum",
    "Needs",
    "Noise",
    "Previous",
    "RandomTensors",
    "Reused",
    "Steepest",
    "Step",
    "SurrogateGap",
    "ThroughPerturbation",
    "Weighted",
    "flag",
    "number",
    "steepest",
    "whole",
]
