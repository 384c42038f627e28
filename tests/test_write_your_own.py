"""The guide to methods of one's own: every Python block runs, in order."""

import re
import sys
from pathlib import Path

import pytest
from models import arguments, examples, tiny_classifier

from hf_sam import Ascent, Descent, Needs, SAMConfig, Vector
from hf_sam.methods.users import load_part, make_part

PAGE = (Path(__file__).parents[1] / "docs/write_your_own.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
FILE = "# my_methods.py\n"


@pytest.fixture
def my_methods(tmp_path, monkeypatch):
    """The reader's file, on the path of this process and of those that it starts."""
    (tmp_path / "my_methods.py").write_text("\n\n".join(block for block in BLOCKS if block.startswith(FILE)))
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_methods", None)


def test_the_page_has_its_blocks():
    assert sum(block.startswith(FILE) for block in BLOCKS) == 3
    assert sum(not block.startswith(FILE) for block in BLOCKS) == 3


@pytest.mark.slow
def test_every_block_runs(my_methods, tmp_path, capsys):
    names = {"model": tiny_classifier(), "args": arguments(tmp_path / "out"), "data": examples(8)}
    for block in BLOCKS:
        if not block.startswith(FILE):
            exec(compile(block, "docs/write_your_own.md", "exec"), names)
    assert names["trainer"].state.global_step == 3
    report = capsys.readouterr().out
    assert "LossBudget: 2 passes" in report
    assert "holds     two processes" in report
    assert "left out" not in report


def test_the_command_line_of_the_page_leads_to_the_class(my_methods):
    path, options = re.search(r"--sam_ascent (\S+) --sam_options '(.*?)'", PAGE).groups()
    ascent = make_part(load_part(path, Ascent), {"sigma": 0.02})
    assert options == '{"sigma": 0.02}'
    assert SAMConfig(ascent=ascent).name == "LossBudget"


def test_the_table_of_needs_has_every_flag_that_can_be_declared():
    named = set(re.findall(r"^\| `([A-Z_]+)` \|", PAGE, flags=re.MULTILINE))
    assert named == {flag.name for flag in Needs} - {
        "STEP_GRADIENT",
        "ATTACHMENT",
        "UNEVEN_PASSES",
        "OWN_GRADIENT",
    }  # which follow from overrides


def test_the_table_of_vectors_names_what_there_is():
    for method in re.findall(r"v\.(\w+)\(", PAGE):
        assert callable(getattr(Vector, method))


def test_what_the_page_says_of_fields_is_so(my_methods):
    kind = load_part("my_methods:LossBudget", Ascent)
    with pytest.raises(ValueError, match=r"sigma=0 must be a number in \(0, inf\)"):
        kind(sigma=0)
    assert load_part("my_methods:Half", Descent).needs == Needs.CLEAN_GRADIENT
