"""Suggestions for misspelt names. Imports nothing slow."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


def did_you_mean(name: Any, known: Iterable[str], otherwise: str = "") -> str:
    """A sentence that suggests the known name closest to `name`, or `otherwise` if none is close."""
    found = difflib.get_close_matches(str(name), list(known), n=1)
    return f" Did you mean {found[0]!r}?" if found else otherwise
