"""A report as data - sections of text, tables and figures - and its two forms: one HTML file, and Markdown with files.

Both forms come from the same sections, so they cannot say different things. Whatever is shown is escaped here, once.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import pandas as pd
from matplotlib.figure import Figure as Canvas

from ..experiments.records import plain, write_json

MAX_EMBEDDED_BYTES = 200_000  # larger numbers are only in the file beside the report


@dataclass(frozen=True)
class Text:
    """A paragraph; `kind` is `"plain"`, `"answer"` (large) or `"warning"`."""

    text: str
    kind: str = "plain"


@dataclass(frozen=True)
class Listing:
    """A list of sentences."""

    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    """
    A table of cells that are text already.

    Args:
        columns (`Sequence[str]`): The head.
        rows (`Sequence[Sequence[str]]`): The body.
        caption (`str`, *optional*, defaults to `""`): Above it.
        numeric_from (`int`, *optional*, defaults to 1): The first column that is set flush right.
        folded (`bool`, *optional*, defaults to `False`): Whether HTML shows it only on a click.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    numeric_from: int = 1
    folded: bool = False


@dataclass(frozen=True)
class Figure:
    """
    A drawing and its numbers.

    Args:
        name (`str`): Names the files, `figures/<name>.svg` and `data/<name>.csv`.
        canvas (`matplotlib.figure.Figure`): The drawing.
        caption (`str`): What it shows; also the text read to those who cannot see it.
        data (`pd.DataFrame`): What was drawn.
    """

    name: str
    canvas: Canvas
    caption: str
    data: pd.DataFrame


Block = Text | Listing | Table | Figure


@dataclass(frozen=True)
class Section:
    """A heading and what is under it."""

    title: str
    blocks: Sequence[Block]

    @property
    def anchor(self) -> str:
        return re.sub(r"\W+", "-", self.title.lower()).strip("-")


@dataclass(frozen=True)
class Document:
    """
    A whole report.

    Args:
        title (`str`): Its heading.
        lead (`str`): One paragraph under it.
        sections (`Sequence[Section]`): The rest.
        tables (`dict[str, pd.DataFrame]`, *optional*): More numbers, each written as `data/<name>.csv`.
        numbers (`Any`, *optional*): What `numbers.json` holds.
    """

    title: str
    lead: str
    sections: Sequence[Section]
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    numbers: Any = None


def write_document(document: Document, folder: Path) -> Path:
    """
    Writes `report.html` (self-contained), `report.md` with `figures/`, and the numbers under `data/`.

    Returns:
        `Path`: Of `report.html`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("figures", "data"):
        (folder / name).mkdir(exist_ok=True)
    for name, table in document.tables.items():
        table.to_csv(folder / "data" / f"{name}.csv", index=False)
    drawings = {}
    for section in document.sections:
        for block in section.blocks:
            if isinstance(block, Figure):
                block.data.to_csv(folder / "data" / f"{block.name}.csv", index=False)
                drawings[block.name] = to_svg(block.canvas)
                (folder / "figures" / f"{block.name}.svg").write_bytes(drawings[block.name])
    write_json(folder / "data" / "numbers.json", plain(document.numbers))
    for template in ("report.html", "report.md"):
        text = _environment().get_template(f"{template}.j2").render(document=document, drawings=drawings)
        (folder / template).write_text(text, encoding="utf-8")
    return folder / "report.html"


def to_svg(canvas: Canvas) -> bytes:
    """The drawing as SVG, the same bytes for the same drawing."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "hf_sam"}):
        canvas.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hf_sam.reporting"),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(markdown=escape_markdown, base64=lambda data: base64.b64encode(data).decode())
    environment.filters["csv_bytes"] = lambda table: table.to_csv(index=False).encode()
    environment.globals["max_embedded_bytes"] = MAX_EMBEDDED_BYTES
    environment.tests["block"] = lambda block, name: type(block).__name__ == name
    return environment


def escape_markdown(text: str) -> str:
    """`text` on one line, with what Markdown or HTML inside it would take for markup made harmless."""
    line = html.escape(" ".join(str(text).split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", line)
