"""Layers of settings (a file, an arm, the command line), and which settings survive a change of method.

The scale of rho depends on the method: 0.01 is usual for `sam`, 0.5 for `asam`, 3 for `msam`. So a layer that sets a
method starts from that method's defaults; only settings of the same or a later layer change them.
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
    """A setting of an earlier layer that belonged to another method."""

    key: str
    value: Any
    source: str
    method: str  # the method it belonged to, or `OFF`

    def __str__(self) -> str:
        meant = "switched SAM off" if self.method == OFF else f"was for {self.method}"
        return f"{self.key}={self.value} of {self.source}, which {meant}"


@dataclass
class Merged:
    """
    The result of merging layers of settings.

    Args:
        values (`dict[str, Any]`): The settings in force; `None` resets a key to its default.
        sources (`dict[str, str]`): Name of the layer that each key comes from.
        dropped (`list[Dropped]`): Settings dropped because a later layer sets another method.
    """

    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    dropped: list[Dropped] = field(default_factory=list)


def merge(layers: Iterable[tuple[str, Mapping[str, Any]]]) -> Merged:
    """
    Merge layers of settings. A layer that sets a method drops the settings of earlier layers for another method.

    Args:
        layers (`Iterable[tuple[str, Mapping]]`): Name and settings of each layer, in increasing precedence.
    """
    merged = Merged()
    for name, settings in layers:
        method = settings.get(f"{PREFIX}method")
        if method is not None:
            for key in _keys_to_drop(merged.values, str(method)):
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
    """The configuration in force in one line: each value with its source, and the settings that were dropped."""
    if config.rho == 0:
        line = f"no SAM: rho 0 ({merged.sources.get(f'{PREFIX}rho', 'default')})"
    else:
        told = []
        options = merged.values.get(f"{PREFIX}options") or {}
        options = json.loads(options) if isinstance(options, str) else options
        for name, value in config.to_dict().items():
            key = f"{PREFIX}options" if name in options else f"{PREFIX}{name}"
            given = merged.values.get(key) is not None
            if name in ("method", "rho", "sigma") or given or name in config.row.defaults:
                default = f"default of {config.method}" if name in config.row.defaults else "default"
                told.append(f"{name} {value} ({merged.sources[key] if given else default})")
        line = ", ".join(told)
    if merged.dropped:
        line += f"; left out: {'; '.join(map(str, merged.dropped))}"
    return line


def _keys_to_drop(values: Mapping[str, Any], method: str) -> list[str]:
    """The keys of `values` that have no meaning, or a different one, under `method`."""
    before = _method(values)
    if method == before:
        return [f"{PREFIX}rho"] if _is_zero(values.get(f"{PREFIX}rho")) else []  # setting a method switches SAM on
    if method not in METHODS or before not in METHODS:
        return []  # an unknown method is refused later
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
