"""The documentation says what the code does. `python tests/test_docs.py write` renews what is generated."""

import re
import sys
from pathlib import Path

import pytest
from integration import tiny
from transformers import Trainer

from hf_sam import METHODS, SAMConfig, SAMTrainer, SAMTrainerMixin
from hf_sam.config import SELECTORS, hyperparameters
from hf_sam.engines.compatibility import LACKS
from hf_sam.methods import Geometry, Needs, Steepest
from hf_sam.update.schedule import Schedule
from hf_sam.update.telemetry import Telemetry

ROOT = Path(__file__).parents[1]
METHODS_PAGE = ROOT / "docs/methods.md"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
MARKED = re.compile(r"(?<=<!-- methods -->\n).*?(?=\n<!-- /methods -->)", flags=re.DOTALL)
# Fields of the geometry, which most methods share; the text below the table has them.
SHARED = hyperparameters(Geometry).keys() | hyperparameters(Steepest).keys()


def methods_table() -> str:
    """The table of methods, in Markdown."""
    lines = [
        "| `method` | paper | what it does | passes | copies | defaults | refused under |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in METHODS.items():
        config = SAMConfig(method=name)
        summary = row.summary.replace("|", "\\|")
        cells = [f"`{name}`", row.paper, summary, passes(config), str(config.parts.copies), defaults(config)]
        lines.append("| " + " | ".join([*cells, refused_under(config)]) + " |")
    return "\n".join(lines)


def passes(config: SAMConfig) -> str:
    """Passes per step, on average over a long run."""
    steps = 1000
    schedule = Schedule.resolve(config, steps)
    mean = sum(schedule.passes(step) for step in range(steps)) / steps
    return f"up to {mean:.3g}" if config.parts.ascent.may_skip else f"{mean:.3g}"


def defaults(config: SAMConfig) -> str:
    """Values of rho and of the fields that are the method's own."""
    own = (config._own.keys() - SHARED) | config.row.defaults.keys() - {"adaptive"} | {"rho"}
    if config.adaptive:
        own.add("eta")
    flat = [name for name in SAMConfig.fields() if name in own]
    values = [(name, getattr(config, name)) for name in flat]
    words = [" ".join(f"{name}={shown(value)}" for name, value in values)]
    if config.options:
        options = " ".join(f"{name}={shown(value)}" for name, value in config.options.items() if value is not None)
        words.append(f"options: {options}")
    return "`" + "`; `".join(words) + "`"


def shown(value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def refused_under(config: SAMConfig) -> str:
    needs = config.parts.needs
    kinds = [kind for kind, lacks in LACKS.items() if any(isinstance(n, Needs) and n & needs for n in lacks)]
    if {"ZeRO-0, 1, 2", "ZeRO-3"} <= set(kinds):
        kinds = [kind for kind in kinds if not kind.startswith("ZeRO")] + ["ZeRO"]
    return ", ".join(kinds) or "none"


def write() -> None:
    """Put the generated table into the page."""
    table = methods_table()
    METHODS_PAGE.write_text(MARKED.sub(lambda _: table, METHODS_PAGE.read_text()))


def test_methods_page_has_the_table_that_the_code_gives():
    (table,) = MARKED.findall(METHODS_PAGE.read_text())
    assert table == methods_table(), "python tests/test_docs.py write"


def test_every_method_has_its_formula_beside_the_generated_row():
    text = METHODS_PAGE.read_text()
    for name in METHODS:
        assert len(re.findall(rf"^\| `{name}` \|", text, flags=re.MULTILINE)) == 2, name


def test_methods_page_names_every_selector():
    text = METHODS_PAGE.read_text()
    assert [name for name in SELECTORS if f"`{name}`" not in text] == []


def test_readme_names_every_logged_key():
    text = (ROOT / "README.md").read_text()
    for name in (*Telemetry.NAMES, "sam_passes", "sam_cost"):
        shown_as = name.partition("/")[0] + "/" if "/" in name else f"{name}`"
        assert name.startswith("_") or f"`{shown_as}" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_pages_that_are_named_exist(page):
    text = page.read_text()
    linked = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    assert [target for target in linked if not (page.parent / target).exists()] == []
    named = re.findall(r"`((?:hf_sam|recipes|configs|docs|tests)/[\w/.-]+\.\w+)`", text)
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_configurations_written_in_pages_are_valid(page):
    for call in re.findall(r"SAMConfig\([^()]*(?:\([^()]*\))?[^()]*\)", page.read_text()):
        names = re.findall(r"(?<![\w(])(\w+)=", call)
        assert set(names) <= set(SAMConfig.fields()) | {"sigma"}, call
        method = re.search(r'method="([^"]+)"', call)
        assert method is None or method.group(1) in METHODS, call


def test_search_for_hyperparameters_runs_as_written(tmp_path, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/troubleshooting.md").read_text(), flags=re.DOTALL)
    names = {
        "SAMConfig": SAMConfig,
        "SAMTrainer": SAMTrainer,
        "model_init": tiny.mlp,
        "args": tiny.arguments(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=2),
        "train_dataset": tiny.vectors(16),
        "eval_dataset": tiny.vectors(8),
    }
    exec(code, names)
    assert {"learning_rate", "sam_rho", "sam_method"} == names["best"].hyperparameters.keys()


def test_mixin_in_the_wrong_place_gives_the_error_of_the_troubleshooting_page():
    class Reversed(Trainer, SAMTrainerMixin): ...

    message = "unexpected keyword argument 'sam_config'"
    assert message in (ROOT / "docs/troubleshooting.md").read_text()
    with pytest.raises(TypeError, match=message):
        Reversed(model=tiny.mlp(), sam_config=SAMConfig())


if __name__ == "__main__" and sys.argv[1:] == ["write"]:
    write()
