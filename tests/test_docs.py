"""The documentation says what the code does."""

import re
from pathlib import Path

import pytest

from hf_sam import METHODS, SAMConfig
from hf_sam.update.telemetry import Telemetry

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("method", METHODS)
def test_methods_page_has_every_row_with_its_paper_and_defaults(method):
    row = METHODS[method]
    (line,) = re.findall(rf"^\| `{method}` \|.*$", (ROOT / "docs/methods.md").read_text(), flags=re.MULTILINE)
    paper = row.paper.partition(" (")[0]
    assert all(part in line for part in re.findall(r"arXiv [\d.]+\d", paper))
    defaults = dict(
        field.split("=") for field in re.findall(r"(\w+=[\w.-]+)", line.rpartition("|")[0].rpartition("|")[2])
    )
    for name, value in row.defaults.items():
        if name != "adaptive":
            assert defaults[name] == (f"{value:g}" if isinstance(value, int | float) else value)
    config = SAMConfig(method=method)
    for name, value in defaults.items():
        assert str(getattr(config, name)).removesuffix(".0") == value


def test_readme_names_every_logged_key():
    text = (ROOT / "README.md").read_text()
    for name in (*Telemetry.NAMES, "sam_passes", "sam_cost"):
        assert name.startswith("_") or f"`{name}`" in text
