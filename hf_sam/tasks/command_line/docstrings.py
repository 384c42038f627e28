"""What a docstring says of each argument, for `--help`: written once, beside the class."""

from __future__ import annotations

import inspect
import re

_ENTRY = re.compile(
    r"^    (?P<names>\w+(?:, \w+)*) \(.*?\):(?P<text>.*(?:\n        .*|\n(?=\n*        ))*)", re.MULTILINE
)


def described(kind: type) -> dict[str, str]:
    """Argument to its description in the `Args:` section of the class, in one line; empty where there is no section."""
    section = re.search(r"^Args:\n((?:    .*\n|\n)*)", inspect.getdoc(kind) + "\n", re.MULTILINE)
    found = {}
    for entry in _ENTRY.finditer(section[1] if section else ""):
        text = " ".join(entry["text"].split())
        found |= dict.fromkeys(entry["names"].split(", "), re.sub(r"\[`~?([\w.]+)`\]|`", r"\1", text))
    return found
