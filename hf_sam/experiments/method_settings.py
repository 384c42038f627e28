"""What stays of a method's settings when a later layer - a file, an arm, the command line - names another method.

A rho is a size in the method's own units: 0.01 is usual for `sam`, 0.5 for `asam`, 3 for `msam`. So a layer that names a
method begins with that method's defaults, and only what is said beside it, or later, changes them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..config import SAMConfig, depends_on_method
from ..methods import METHODS

PREFIX, OFF = "sam_", "no SAM"


@dataclass(frozen=True)
class Dropped:
    """A setting of an earlier layer that was meant for another method."""

    key: str
    value: Any
    source: str
    method: str  # the one it was meant for, or `OFF`

    def __str__(self) -> str:
        meant = "switched SAM off" if self.method == OFF else f"was for {self.method}"
        return f"{self.key}={self.value} of {self.source}, which {meant}"


@dataclass
class Merged:
    """
    Layers of settings, later ones over earlier ones.

    Args:
        values (`dict[str, Any]`): The settings in force; `None` gives a key back to its default.
        sources (`dict[str, str]`): Key to the name of the layer that it came from.
        dropped (`list[Dropped]`): What was left out because a later layer names another method.
    """

    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    dropped: list[Dropped] = field(default_factory=list)


def merge(layers: Iterable[tuple[str, Mapping[str, Any]]]) -> Merged:
    """
    Put layers on top of each other; one that names a method drops what earlier ones said for another.

    Args:
        layers (`Iterable[tuple[str, Mapping]]`): Name and settings of each, the first one lowest.
    """
    merged = Merged()
    for name, settings in layers:
        method = settings.get(f"{PREFIX}method")
        if method is not None:
            for key in _foreign_keys(merged.values, str(method)):
                before = OFF if _is_zero(merged.values.get(f"{PREFIX}rho")) else _method(merged.values)
                merged.dropped.append(Dropped(key, merged.values[key], merged.sources[key], before))
            for entry in merged.dropped:
                merged.values.pop(entry.key, None)
                merged.sources.pop(entry.key, None)
        merged.values |= settings
        merged.sources |= dict.fromkeys(settings, name)
    merged.dropped = [entry for entry in merged.dropped if entry.key not in merged.values]
    return merged


def explain(config: SAMConfig, merged: Merged) -> str:
    """The configuration in force in one line: each value with where it came from, and what was left out."""
    if config.rho == 0:
        line = f"no SAM: rho 0 ({merged.sources.get(f'{PREFIX}rho', 'default')})"
    else:
        told = []
        options = merged.values.get(f"{PREFIX}options") or {}
        options = json.loads(options) if isinstance(options, str) else options
        for name, value in config.to_dict().items():
            key = f"{PREFIX}options" if name in options else f"{PREFIX}{name}"
            given = merged.values.get(key) is not None
            if name in ("method", "rho") or given or name in config.row.defaults:
                default = f"default of {config.method}" if name in config.row.defaults else "default"
                told.append(f"{name} {value} ({merged.sources[key] if given else default})")
        line = ", ".join(told)
    if merged.dropped:
        line += f"; left out: {'; '.join(map(str, merged.dropped))}"
    return line


def _foreign_keys(values: Mapping[str, Any], method: str) -> list[str]:
    """The keys of `values` that mean nothing, or something else, under `method`."""
    before = _method(values)
    if method == before:
        return [f"{PREFIX}rho"] if _is_zero(values.get(f"{PREFIX}rho")) else []  # naming a method asks for it
    if method not in METHODS or before not in METHODS:
        return []  # is refused later, by its name
    old, new = METHODS[before], METHODS[method]
    return [
        key
        for key, value in values.items()
        if value is not None
        and key.startswith(PREFIX)
        and (name := key.removeprefix(PREFIX)) in SAMConfig.fields()
        and name != "method"
        and depends_on_method(name, old, new)
    ]


def _method(values: Mapping[str, Any]) -> str:
    return str(values.get(f"{PREFIX}method") or "sam")


def _is_zero(value: Any) -> bool:
    try:
        return value is not None and float(value) == 0
    except (TypeError, ValueError):
        return False
