"""The engines on which a step runs (one process, DDP, sharded engines), and what each of them supports."""

from .base import Engine
from .compatibility import refuse_unsupported
from .kinds import engine_for, kind_of
from .sharded import FullyShardedEngine, ShardedEngine
from .zero import Zero3Engine, ZeroEngine

__all__ = [
    "Engine",
    "FullyShardedEngine",
    "ShardedEngine",
    "Zero3Engine",
    "ZeroEngine",
    "engine_for",
    "kind_of",
    "refuse_unsupported",
]
