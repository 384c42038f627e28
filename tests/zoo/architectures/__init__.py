"""Architectures of transformers in a size of a few thousand parameters, with data for the losses that they compute."""

from __future__ import annotations

from .decoders import DECODERS
from .encoders import ENCODERS, REFORMER
from .pictures import PICTURES
from .sequences import SEQUENCES
from .series import SERIES
from .sounds import SOUNDS
from .together import TOGETHER

__all__ = ["REFORMER", "ZOO"]

# By name.
ZOO = {**ENCODERS, **DECODERS, **SEQUENCES, **PICTURES, **SOUNDS, **TOGETHER, **SERIES}
