"""The documentation says what the code does. `python tests/test_docs.py write` renews what is generated."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pandas as pd
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
METHODS_PAGE, README = ROOT / "docs/methods.md", ROOT / "README.md"
PAGES = [README, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Fields of the geometry, which most methods share; the text below the table has them.
SHARED = hyperparameters(Geometry).keys() | hyperparameters(Steepest).keys()


def methods_table() -> str:
    """The table of methods in docs/methods.md."""
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


def costs_table() -> str:
    """The table of methods in the README: by passes, with the copies of each."""
    by_passes: dict[str, list[str]] = {}
    for name in METHODS:
        config = SAMConfig(method=name)
        by_passes.setdefault(passes(config), []).append(f"`{name}` ({config.parts.copies})")
    lines = ["| passes | methods, with their copies |", "|---|---|"]
    order = sorted(by_passes, key=lambda text: (-float(text.removeprefix("up to ")), text))
    return "\n".join([*lines, *(f"| {count} | {', '.join(by_passes[count])} |" for count in order)])


def engines_table() -> str:
    """The table of engines in the README."""
    engines = ("FSDP2", "tensor parallel", "ZeRO-1, 2", "ZeRO-3")
    groups: dict[str, list[str]] = {}
    for name in METHODS:
        groups.setdefault(refused_under(SAMConfig(method=name)), []).append(f"`{name}`")
    lines = [f"| | one process, DDP | {' | '.join(engines)} |", "|---|" + "---|" * (len(engines) + 1)]
    for refused, names in groups.items():
        parts = refused.split(", ")
        cells = ["refused" if e in parts or ("ZeRO" in parts and e.startswith("ZeRO")) else "yes" for e in engines]
        lines.append(f"| {', '.join(names)} | yes | {' | '.join(cells)} |")
    return "\n".join(lines)


def passes(config: SAMConfig) -> str:
    """Passes per step, on average over a long run."""
    steps = 1000
    schedule = Schedule.resolve(config, steps)
    mean = sum(schedule.passes(step) for step in range(steps)) / steps
    return f"up to {mean:.3g}" if config.parts.ascent.may_skip else f"{mean:.3g}"


def defaults(config: SAMConfig) -> str:
    """Values of rho and of the fields that are the method's own."""
    own = (config._own_hyperparameters.keys() - SHARED) | config.row.defaults.keys() - {"adaptive"} | {"rho"}
    if config.sigma is not None:
        own.add("sigma")
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


GENERATED = {
    "methods": (METHODS_PAGE, methods_table),
    "costs": (README, costs_table),
    "engines": (README, engines_table),
}


def marked(name: str) -> re.Pattern:
    return re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)", flags=re.DOTALL)


def write() -> None:
    """Put the generated tables into their pages."""
    for name, (page, table) in GENERATED.items():
        page.write_text(marked(name).sub(lambda _, table=table: f"{table()}\n", page.read_text()))


@pytest.mark.parametrize("name", GENERATED)
def test_pages_have_the_tables_that_the_code_gives(name):
    page, table = GENERATED[name]
    (written,) = marked(name).findall(page.read_text())
    assert written == f"{table()}\n", "python tests/test_docs.py write"


def test_the_site_builds_without_a_warning(tmp_path):
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    offline = {
        **os.environ,
        "NO_MKDOCS_2_WARNING": "1",
        "http_proxy": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
    }
    done = subprocess.run(words, cwd=ROOT, env=offline, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    api = (tmp_path / "api/index.html").read_text()
    assert "check_method" in api
    assert "rho_schedule" in api


def test_readme_can_be_read_in_a_minute():
    lines = README.read_text().splitlines()
    assert "sharpness-aware minimization" in lines[0]
    assert len(lines) <= 120


def test_every_method_has_its_formula_beside_the_generated_row():
    text = METHODS_PAGE.read_text()
    for name in METHODS:
        assert len(re.findall(rf"^\| `{name}` \|", text, flags=re.MULTILINE)) == 2, name


def test_methods_page_names_every_selector():
    text = METHODS_PAGE.read_text()
    assert [name for name in SELECTORS if f"`{name}`" not in text] == []


def test_every_logged_key_is_explained():
    text = (ROOT / "docs/logging.md").read_text()
    for name in (*Telemetry.NAMES, "sam_passes", "sam_cost"):
        group, _, part = name.partition("/")
        written = f"`{group}/...`" in text and f"`{part}`" in text if part else f"`{name}`" in text
        assert name.startswith("_") or written, name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_and_pages_that_are_named_exist(page):
    text = page.read_text()
    linked = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    assert [target for target in linked if not (page.parent / target).exists()] == []
    named = re.findall(r"`((?:hf_sam|recipes|configs|docs|tests)/[\w/.-]+\.\w+)`", text)
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_configurations_written_in_pages_are_valid(page):
    for call in re.findall(r"SAMConfig\([^()]*\)", page.read_text()):
        if "..." not in call:
            assert eval(call, {"SAMConfig": SAMConfig}) is not None


def test_search_for_hyperparameters_runs_as_written(tmp_path, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/troubleshooting.md").read_text(), flags=re.DOTALL)
    names = {
        "SAMConfig": SAMConfig,
        "SAMTrainer": SAMTrainer,
        "model_init": lambda: tiny.mlp(),
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


def script(name: str) -> ModuleType:
    """The module of a script in docs/results."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / "docs/results" / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_of_the_survival_study_are_those_of_its_raw_data():
    page = (ROOT / "docs/results/survival.md").read_text()
    table = script("survival_language/table.py")
    losses = pd.read_csv(table.LOSSES)
    assert set(losses.seed) == set(range(8))
    for row in table.primary_outcome(losses).itertuples():
        budget = row.budget.replace("passes", "gradients")
        assert f"| {row.treatment}, {budget} | {row.difference:+.3f} [{row.low:.3f}, {row.high:.3f}] |" in page
    means = losses.groupby(["budget", "arm", "treatment"])["loss"].mean().round(3)
    for arm in ("adamw", "adamw-high", "short-annealing", "random", "flatten"):
        for budget in table.BUDGETS.values():
            cells = [f"{means[budget, arm, name]:.3f}" for name in ("as trained", "4 bits", "3 bits", "2 bits")]
            assert f"| {arm} | {' | '.join(cells)} |" in page.replace("**", "")


def test_the_tables_of_the_encoders_are_those_of_their_raw_data():
    page = (ROOT / "docs/results/survival.md").read_text()
    table = script("survival_encoders/table.py")
    scores = pd.read_csv(table.SCORES)
    for row in table.differences(scores, "4 bits").itertuples():
        cell = f"{row.task}, {row.budget.replace('passes', 'gradients')}"
        assert f"| {cell} | {row.difference:+.1f} [{row.low:.1f}, {row.high:.1f}] |" in page
    for (_, _, _), cell in scores.groupby(["task", "budget", "arm"]):
        means = cell.groupby("treatment")["accuracy"].mean().round(1)
        cells = [f"{means[name]:.1f}" for name in table.TREATMENTS]
        assert f"| {cell.arm.iloc[0]} | {' | '.join(cells)} |" in page


def test_the_table_of_forgetting_is_that_of_its_raw_data():
    page = (ROOT / "docs/results/survival.md").read_text()
    table = script("survival_language/forgetting.py")
    losses = pd.read_csv(table.LOSSES)
    assert len(losses) == 200
    first, second = table.differences(losses), table.differences(losses, table.HIGHER_TARGET)
    assert f"at training loss {first['training loss'][0]:.3f}, the lowest that all runs reach" in page
    for one, other in zip(first.itertuples(), second.itertuples(), strict=True):
        cells = [f"{row.difference:+.3f} [{row.low:.3f}, {row.high:.3f}]" for row in (one, other)]
        assert f"| {one.minus} | {cells[0]} |" in page
        assert f"| {cells[1]} |" in page


def test_the_tables_of_wrong_labels_are_those_of_their_raw_data():
    page = (ROOT / "docs/results/noise.md").read_text()
    table = script("noise/table.py")
    scores = pd.read_csv(table.SCORES)
    for (_, arm), cell in scores.groupby(["study", "arm"]):
        means = cell.groupby("task", sort=False)[["accuracy", "nll"]].mean()
        for task in means.itertuples():
            assert re.search(rf"\| {re.escape(arm)} \|.* {task.accuracy:.1f} \| {task.nll:.2f} \|", page), (arm, task)
    found = table.differences(scores[scores.study != "noise_more_controls"])
    for (_, *names), pair in found.groupby(["study", "task", "treatment", "control"]):
        accuracy, nll = (next(pair[pair.metric == metric].itertuples()) for metric in ("accuracy", "nll"))
        cells = [
            f"{row.difference:+.{digits}f} [{row.low:+.{digits}f}, {row.high:+.{digits}f}]"
            for row, digits in ((accuracy, 1), (nll, 2))
        ]
        assert f"| {' | '.join([*names, *cells])} |" in page


def test_the_tables_of_the_default_are_those_of_their_raw_data():
    page = (ROOT / "docs/results/default.md").read_text()
    table = script("default/table.py")
    tables = table.markdown(pd.read_csv(table.SCORES))
    assert set(tables) == {"sam", "no embeddings", "late", "late, no embeddings", "capped", "default"}
    for text in tables.values():
        assert text in page
    overall = table.overall(pd.read_csv(table.SCORES), "default")
    for kind in ("right", "30 % wrong"):
        assert overall[kind].replace("-", "−").replace(", +", ", ") in page


def test_the_tables_of_units_are_those_of_their_raw_data():
    page = (ROOT / "docs/results/units.md").read_text()
    table = script("units/table.py")
    for text in table.markdown(pd.read_csv(table.RUNS)):
        assert text in page


def test_the_tables_of_the_finder_are_those_of_its_raw_data():
    page = (ROOT / "docs/results/finder.md").read_text()
    table = script("finder/searches.py")
    for text in table.markdown(pd.read_csv(table.SEARCHES)):
        assert text in page


if __name__ == "__main__" and sys.argv[1:] == ["write"]:
    write()
