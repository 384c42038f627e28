"""Encoding and delimiter of text files with values, as given or as detected."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

from charset_normalizer import from_bytes

from ..command_line.errors import UserError

DELIMITERS = (",", ";", "\t", "|")
SAMPLE_BYTES, SAMPLE_ROWS = 2**20, 50
csv.field_size_limit(2**31 - 1)  # by default 131,072 characters, fewer than some texts have


@dataclass(frozen=True)
class Dialect:
    """
    Args:
        encoding (`str`): An encoding known to Python.
        delimiter (`str`): The character between two values.
    """

    encoding: str
    delimiter: str

    def describe(self, path: Path) -> str | None:
        """Describe what is unusual in one line; `None` for UTF-8 with commas, or tabs in a tsv."""
        usual = "\t" if path.suffix.lower() == ".tsv" else ","
        parts = [f"in {self.encoding} (--csv_encoding)"] if self.encoding != "utf-8" else []
        parts += [f"with {self.delimiter!r} between columns (--csv_delimiter)"] if self.delimiter != usual else []
        return f"{path.name} is read {' and '.join(parts)}" if parts else None


def find_dialect(path: Path, encoding: str | None = None, delimiter: str | None = None) -> Dialect:
    """
    Detect encoding and delimiter of a csv or tsv file, unless they are given.

    Raises:
        UserError: If the file is not in the given encoding, or no encoding can be detected.
    """
    with path.open("rb") as file:
        sample = file.read(SAMPLE_BYTES)
        is_whole = not file.read(1)
    if not is_whole:
        sample = sample[: sample.rfind(b"\n") + 1] or sample  # so that no character is split
    encoding = encoding or _find_encoding(sample, path)
    try:
        text = sample.decode(encoding)
    except LookupError:
        raise UserError(f"csv_encoding={encoding} is unknown; try utf-8, latin-1 or cp1252.") from None
    except UnicodeDecodeError as error:
        line = sample[: error.start].count(b"\n") + 1
        raise UserError(
            f"dataset={path} is not in csv_encoding={encoding} (see line {line}); leave csv_encoding out to detect it."
        ) from None
    return Dialect(encoding, delimiter or _find_delimiter(text, "\t" if path.suffix.lower() == ".tsv" else ","))


def header(path: Path, dialect: Dialect) -> list[str]:
    """Read the names of the columns."""
    with path.open(encoding=dialect.encoding, newline="") as file:
        return next(csv.reader(file, delimiter=dialect.delimiter), [])


def _find_encoding(sample: bytes, path: Path) -> str:
    for name, mark in (("utf-8-sig", b"\xef\xbb\xbf"), ("utf-16", b"\xff\xfe"), ("utf-16", b"\xfe\xff")):
        if sample.startswith(mark):
            return name
    try:
        sample.decode("utf-8")
        return "utf-8"
    except UnicodeDecodeError:
        found = list(from_bytes(sample))
    if not found:
        raise UserError(f"dataset={path} has an encoding that could not be detected; give it with --csv_encoding.")
    # A few accents fit several single-byte encodings; most such files use that of Western Windows.
    western = any("cp1252" in candidate.could_be_from_charset for candidate in found)
    return "cp1252" if western else found[0].encoding


def _find_delimiter(text: str, usual: str) -> str:
    """Find the delimiter that gives all rows as many columns as the first; the usual one if several or none do."""
    columns = {}
    for delimiter in (usual, *(other for other in DELIMITERS if other != usual)):
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        counts = {len(row) for row, _ in zip(reader, range(SAMPLE_ROWS), strict=False) if row}
        if len(counts) == 1:
            columns[delimiter] = counts.pop()
    return (
        max(columns, key=columns.get) if max(columns.values(), default=1) > 1 and columns.get(usual, 1) < 2 else usual
    )
