"""Did you mean ...? Imports nothing that takes time."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


def did_you_mean(name: Any, known: Iterable[str], otherwise: str = "") -> str:
    """A sentence that suggests the known name nearest to `name`, or `otherwise` where none is near."""
    found = difflib.get_close_matches(str(name), list(known), n=1)
    return f" Did you mean {found[0]!r}?" if found else otherwise
