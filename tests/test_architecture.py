"""Which folder may import which: the picture in docs/architecture.md is the code's."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_sam"
MODULES = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for path in PACKAGE.rglob("*.py")}


def imports_of(path: Path) -> set[str]:
    """The modules of the package that a file imports, wherever in the file, but not for type checking alone."""
    package = list(path.relative_to(ROOT).parts[:-1])
    tree = ast.parse(path.read_text())
    typing = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in typing:
            continue
        if isinstance(node, ast.ImportFrom):
            base = (
                [*package[: len(package) - node.level + 1], *filter(None, [node.module])]
                if node.level
                else [node.module]
            )
            base = ".".join(base)
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[0] == "hf_sam"}


def folder_of(module: str) -> str:
    """`hf_sam.update.step` lies in `update`; a module beside the folders is its own."""
    return ([*module.split("."), "hf_sam"])[1]


def graph() -> dict[str, set[str]]:
    edges: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        here = folder_of(path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."))
        if here in ("__init__", "__main__"):  # what users start
            continue
        edges.setdefault(here, set()).update(folder_of(name) for name in imports_of(path))
        edges[here] -= {here, "hf_sam", "__init__"}
    return edges


# What each folder may import of the others; a folder that is not named may import none.
ALLOWED = {
    "methods": {"suggestions"},
    "config": {"methods", "suggestions"},
    "update": {"config", "methods"},
    "engines": {"config", "methods", "update"},
    "losses_of_parts": {"update"},
    "passes": {"engines", "losses_of_parts", "methods", "update"},
    "model_card": {"config"},
    "trainer": {"config", "engines", "model_card", "passes", "update"},
    "testing": {"config", "methods", "trainer", "update"},
    "baselines": set(),
    "sharpness": {"update"},
    "evaluation": {"sharpness", "update"},
    "benchmark": {"config", "methods", "trainer", "update"},
    "experiments": {"baselines", "config", "evaluation", "methods", "suggestions", "update"},
    "rho_search": {"config", "evaluation", "experiments", "methods", "update"},
    "reporting": {"benchmark", "config", "evaluation", "experiments", "methods", "rho_search", "sharpness"},
}


def test_folders_import_each_other_in_one_direction():
    assert list(TopologicalSorter(graph()).static_order())  # raises where there is a cycle


@pytest.mark.parametrize("folder", sorted(graph().keys() - {"tasks"}))
def test_a_folder_imports_no_more_than_it_may(folder):
    assert graph()[folder] <= ALLOWED.get(folder, set())


def test_only_tasks_import_reports():
    assert {folder for folder, imported in graph().items() if "reporting" in imported} == {"tasks"}


def test_nothing_imports_the_tasks():
    assert not [folder for folder, imported in graph().items() if "tasks" in imported]


def test_methods_know_neither_trainer_nor_transformers():
    for path in (PACKAGE / "methods").glob("*.py"):
        assert not re.search(r"^\s*(from|import) (transformers|accelerate)", path.read_text(), re.MULTILINE), path


def test_the_command_line_is_read_before_torch_is_imported():
    code = "import hf_sam.tasks.command_line.program, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_every_folder_is_described_and_installed():
    page, packages = (ROOT / "docs/architecture.md").read_text(), (ROOT / "pyproject.toml").read_text()
    for path in PACKAGE.rglob("__init__.py"):
        name = path.parent.relative_to(ROOT).as_posix()
        assert f'"{name.replace("/", ".")}"' in packages
        assert f"`{name.removeprefix('hf_sam/')}/`" in page or name.count("/") != 1, name
