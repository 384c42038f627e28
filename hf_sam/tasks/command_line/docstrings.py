"""Read the descriptions of arguments from docstrings, for `--help`."""

from __future__ import annotations

import inspect
import re

_ENTRY = re.compile(
    r"^    (?P<names>\w+(?:, \w+)*) \(.*?\):(?P<text>.*(?:\n        .*|\n(?=\n*        ))*)", re.MULTILINE
)


def described(kind: type) -> dict[str, str]:
    """Map each argument to its one-line description in the `Args:` section of the class, if it has one."""
    section = re.search(r"^Args:\n((?:    .*\n|\n)*)", inspect.getdoc(kind) + "\n", re.MULTILINE)
    found = {}
    for entry in _ENTRY.finditer(section[1] if section else ""):
        text = " ".join(entry["text"].split())
        found |= dict.fromkeys(entry["names"].split(", "), re.sub(r"\[`~?([\w.]+)`\]|`", r"\1", text))
    return found
