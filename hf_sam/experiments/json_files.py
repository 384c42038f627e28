"""JSON files that are whole whenever they can be read, and hold no secrets."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_SECRET_KEY = re.compile(r"(_token|^token|api_?key|password|passwd|secret|credential)s?$", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,})")


def plain(value: Any, key: str = "") -> Any:
    """Convert `value` to strict JSON: secrets are masked, NaN and infinity become null, unknown objects strings."""
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # NumPy and torch scalars
        return plain(value.item(), key)
    if (
        _SECRET_KEY.search(key) and value and not isinstance(value, (int, float))
    ):  # numbers, such as a loss per token, are not secrets
        return f"<{key.upper()}>"
    if isinstance(value, Mapping):
        return {str(name): plain(entry, str(name)) for name, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(entry) for entry in value]
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return _SECRET_VALUE.sub("<TOKEN>", str(value))


def write_json(path: Path, content: Any) -> None:
    """Replace `path` atomically: readers see the old file or the new one, never a partial one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1, ensure_ascii=False, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; `None` if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
