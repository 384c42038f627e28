"""
The content of a report as sections of text, tables and figures, and its output: one HTML file, and Markdown with files.

Both outputs come from the same sections, so they always agree. Text is escaped and absolute paths are shortened only
here; commands are left complete, because readers copy them.
"""

from __future__ import annotations

import base64
import html
import io
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure as Canvas

from ..experiments.json_files import plain, write_json

MAX_EMBEDDED_BYTES = 200_000  # larger tables are only in the file next to the report
# Replacements for a drawing's colours on a dark page: its ink, and the series that are too dark there.
DARK = {
    "#1c1e21": "#e6e8eb",
    "#000000": "#f4f5f6",
    "#0072b2": "#4fa3dd",
    "#7a5c00": "#c9a227",
    "#b22222": "#ef6a6a",
    "#b0b8c0": "#5b6670",
    "#fefefe": "#14181c",
}
# An absolute path that is not part of a longer word or an address, and its last two parts.
_PATH = re.compile(r"(?<![\w/.:~…\\-])(?:/[\w.+@=,-]+)+?((?:/[\w.+@=,-]+){1,2})(?![\w/])")


@dataclass(frozen=True)
class Text:
    """A paragraph; `kind` is `"plain"`, `"verdict"` (large), `"answer"`, `"warning"` or `"command"` (for a shell)."""

    text: str
    kind: str = "plain"


@dataclass(frozen=True)
class Listing:
    """A list of sentences."""

    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    """
    A table of cells that are already text; every table can be downloaded as CSV.

    Args:
        columns (`Sequence[str]`): The header.
        rows (`Sequence[Sequence[str]]`): The body.
        caption (`str`, *optional*, defaults to `""`): The caption above it.
        numeric_from (`int`, *optional*, defaults to 1): The first right-aligned column.
        folded (`bool`, *optional*, defaults to `False`): Whether HTML shows it only after a click.
        stacked (`bool`, *optional*, defaults to `False`):
            Whether a phone shows each row as a block, headed by the columns before `numeric_from`; otherwise it scrolls.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    numeric_from: int = 1
    folded: bool = False
    stacked: bool = False

    @property
    def csv(self) -> bytes:
        return _csv(pd.DataFrame(self.rows, columns=list(self.columns)))


@dataclass(frozen=True)
class Figure:
    """
    A drawing and its numbers.

    Args:
        name (`str`): The name of the files, `figures/<name>.svg` and `data/<name>.csv`.
        canvas (`matplotlib.figure.Figure`): The drawing.
        caption (`str`): What it shows; also the alternative text for screen readers.
        data (`pd.DataFrame`): The numbers drawn.
        narrow (`matplotlib.figure.Figure`, *optional*): The drawing for a phone.
    """

    name: str
    canvas: Canvas
    caption: str
    data: pd.DataFrame
    narrow: Canvas | None = None

    @property
    def csv(self) -> bytes:
        return _csv(self.data)


@dataclass(frozen=True)
class Columns:
    """Blocks side by side if there is room, otherwise `second` below `first`."""

    first: list[Block]
    second: list[Block]


Block = Text | Listing | Table | Figure | Columns


@dataclass(frozen=True)
class Section:
    """A heading and its blocks; HTML shows a folded section only after a click."""

    title: str
    blocks: Sequence[Block]
    folded: bool = False

    @property
    def anchor(self) -> str:
        return re.sub(r"\W+", "-", self.title.lower()).strip("-")


@dataclass(frozen=True)
class Document:
    """
    A whole report.

    Args:
        title (`str`): The heading.
        lead (`str`): One paragraph under the heading.
        sections (`Sequence[Section]`): The content; sections without blocks are left out.
        tables (`dict[str, pd.DataFrame]`, *optional*): More tables, each written as `data/<name>.csv`.
        numbers (`Any`, *optional*): The content of `numbers.json`.
        warnings (`Sequence[str]`, *optional*): Warnings to show above all sections.
    """

    title: str
    lead: str
    sections: Sequence[Section]
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    numbers: Any = None
    warnings: Sequence[str] = ()


def write_document(document: Document, folder: Path) -> Path:
    """
    Write `report.html` (self-contained), `report.md` with `figures/`, and the numbers under `data/`.

    Returns:
        `Path`: Path of `report.html`.
    """
    sections = [section for section in document.sections if section.blocks]
    for name in ("figures", "data"):
        (folder / name).mkdir(exist_ok=True, parents=True)
    files = {name: _csv(table) for name, table in document.tables.items()}
    names, drawings = {}, {}
    for section in sections:
        for number, block in enumerate(_leaves(section.blocks), start=1):
            if isinstance(block, (Figure, Table)):
                names[id(block)] = block.name if isinstance(block, Figure) else f"{section.anchor}-{number}"
                files[names[id(block)]] = block.csv
            if isinstance(block, Figure):
                drawings[block.name] = [to_svg(canvas) for canvas in (block.canvas, block.narrow) if canvas is not None]
                (folder / "figures" / f"{block.name}.svg").write_bytes(drawings[block.name][0])
    for name, content in files.items():
        (folder / "data" / f"{name}.csv").write_bytes(content)
    write_json(folder / "data" / "numbers.json", plain(document.numbers))
    shown = {"document": document, "sections": sections, "drawings": drawings, "files": files}
    for template in ("report.html", "report.md"):
        text = _environment().get_template(f"{template}.j2").render(**shown, name_of=lambda block: names[id(block)])
        (folder / template).write_text(text, encoding="utf-8")
    return folder / "report.html"


def to_svg(canvas: Canvas) -> bytes:
    """Render a drawing as SVG with a transparent background, reproducible byte for byte and legible on a dark page."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "hf_sam"}):
        canvas.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    drawing = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|(?<=\n) +", "", buffer.getvalue().decode(), flags=re.DOTALL)
    drawing = re.sub(r' (?:d|x|y)="[^"]*"', lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found[0]), drawing)
    rules = "".join(
        f'[style*="{kind}: {light}"]{{{kind}:{dark}!important}}'
        for light, dark in DARK.items()
        for kind in ("fill", "stroke")
    )
    style = f"<style>@media screen and (prefers-color-scheme: dark){{{rules}}}</style>"
    return re.sub(r"(<svg [^>]*>)", lambda found: found[1] + style, drawing, count=1).encode()


def shorten_paths(text: str) -> str:
    """Make paths in `text` relative to the working directory; of paths elsewhere, keep only the last two parts."""
    text = str(text)
    here = os.getcwd().rstrip("/")  # empty at the root, where no path is shorter
    return _PATH.sub(r"…\1", text.replace(f"{here}/", "") if here else text) if "/" in text else text


def escape_markdown(text: str) -> str:
    """Put `text` on one line and escape Markdown and HTML markup."""
    line = html.escape(" ".join(shorten_paths(text).split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", line)


def copyable(command: str) -> Markup:
    """Escape `command` for HTML without shortening its paths; access tokens are masked."""
    return Markup(html.escape(plain(command), quote=False))


def _leaves(blocks: Sequence[Block]) -> Iterator[Block]:
    for block in blocks:
        if isinstance(block, Columns):
            yield from _leaves([*block.first, *block.second])
        else:
            yield block


def _csv(table: pd.DataFrame) -> bytes:
    def short(column: pd.Series) -> pd.Series:
        return column if pd.api.types.is_numeric_dtype(column) else column.map(shorten_paths, na_action="ignore")

    return table.apply(short).to_csv(index=False).encode()


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hf_sam.reporting"),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else shorten_paths(value),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        markdown=escape_markdown,
        copyable=copyable,
        as_is=lambda command: Markup(plain(command)),
        base64=lambda data: Markup(base64.b64encode(data).decode()),
    )
    environment.globals["max_embedded_bytes"] = MAX_EMBEDDED_BYTES
    environment.tests["block"] = lambda block, name: type(block).__name__ == name
    return environment
