"""List the configuration files shipped with the package, or print one to read or copy."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

from .config_files import find_config, read_layers, shipped_configs
from .help import terminal_width
from .parsers import Parser

RELATIVE = re.compile(r"^(\s*(?:base|config): *)(\S+\.yaml)", re.MULTILINE)


def main(argv: Sequence[str]) -> None:
    parser = Parser("configs", description=__doc__)
    parser.add_argument(
        "name", nargs="?", help="The configuration to print, such as image_classification/digits; by default, list all."
    )
    parser.add_argument("--path", action="store_true", help="Print the path of the file instead of its content.")
    args = parser.parse_args(argv)
    if args.name is None:
        print(listing())
    elif args.path:
        print(find_config(args.name))
    else:
        print(content(find_config(args.name)), end="")


def content(path: Path) -> str:
    """Return the content of a file with the relative paths in it made absolute, so that a copy still works."""

    def absolute(match: re.Match) -> str:
        return f"{match[1]}{(path.parent / match[2]).resolve()}"

    return RELATIVE.sub(absolute, path.read_text(encoding="utf-8"))


def _changes(path: Path) -> str:
    """Say what a file without a comment changes in its base."""
    values = dict(read_layers(path)[-1][1])
    base = re.search(r"^base: *(\S+?)(?:\.yaml)?$", path.read_text(encoding="utf-8"), re.MULTILINE)
    changes = ", ".join(f"{key} {value}" for key, value in values.items() if key != "output_dir")
    return f"as {base[1]}, with {changes}" if base else changes


def listing() -> str:
    """List the name and first line of every file, by folder."""
    width = terminal_width()
    shipped = shipped_configs()
    lead = max(map(len, shipped)) + 2
    lines, folder = [], ""
    for name, path in shipped.items():
        if path.parent.name != folder:
            folder = path.parent.name
            lines += [""] if lines else []
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        summary = first.removeprefix("# ") if first.startswith("#") else _changes(path)
        lines.append(f"{name:<{lead}}{textwrap.shorten(summary, max(width - lead, 40), placeholder=' ...')}")
    return "\n".join(lines)
