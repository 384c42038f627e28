"""A wheel in an empty environment, without the clone: what `pip install hf-sam` gives, the demo, and a fine-tuning."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "constraints-cpu.txt"


class Environment:
    """A virtual environment, and an empty folder in which its programs run."""

    def __init__(self, folder: Path):
        self.folder, self.bin = folder / "empty", folder / "env/bin"
        self.folder.mkdir()
        run([sys.executable, "-m", "venv", str(folder / "env")], folder)

    def install(self, requirement: str) -> None:
        self.program("pip", "install", "--quiet", "--constraint", str(CONSTRAINTS), requirement)

    def program(self, name: str, *words: str, fails: bool = False) -> str:
        """What it prints; of one that fails, the error."""
        return run([str(self.bin / name), *words], self.folder, fails)


def run(words: list[str], folder: Path, fails: bool = False) -> str:
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        words, cwd=folder, capture_output=True, text=True, timeout=3000, env={**clean, "HF_HUB_OFFLINE": "1"}
    )
    assert (done.returncode != 0) == fails, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stderr if fails else done.stdout


def build(folder: Path) -> Path:
    """The wheel, from a copy, so that nothing is left in the clone."""
    source = folder / "source"
    for name in ("hf_sam", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", "dist", str(source)], folder)
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel


@pytest.mark.slow
def test_a_wheel_runs_the_demo_and_a_fine_tuning_in_an_empty_environment(tmp_path):
    wheel = build(tmp_path)
    packed = set(zipfile.ZipFile(wheel).namelist())
    wanted = {f"hf_sam/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")}
    wanted |= {str(path.relative_to(ROOT)) for path in (ROOT / "hf_sam").rglob("*.py")}
    wanted |= {str(path.relative_to(ROOT)) for path in (ROOT / "hf_sam/reporting/templates").iterdir()}
    assert wanted | {"hf_sam/py.typed"} <= packed

    environment = Environment(tmp_path)
    environment.install(str(wheel))
    assert environment.program("hf-sam", "--version").startswith("hf-sam ")
    assert "image-classification" in environment.program("hf-sam", "--help")
    assert "asam" in environment.program("hf-sam", "methods")
    assert "- scikit-learn: not installed" in environment.program("hf-sam", "env")
    assert "accelerate/fsdp2" in environment.program("hf-sam", "configs")
    path = environment.program("hf-sam", "configs", "--path", "digits_sam")
    assert path.startswith(str(tmp_path / "env"))
    for words in (["image-classification", "digits"], ["compare", "digits"], ["benchmark", "digits"], ["demo"]):
        error = environment.program("hf-sam", *words, fails=True)
        assert error.splitlines()[-1].endswith("is not installed: pip install 'hf-sam[recipes]'")
        assert "Traceback" not in error

    environment.install(f"hf-sam[recipes] @ {wheel.as_uri()}")
    printed = environment.program("hf-sam", "demo", "--seeds", "1", "--max_steps", "4", "--output_dir", "demo")
    assert "SAM, rho 0.2" in printed
    assert "at 2 bits" in printed
    assert (environment.folder / "demo/report/report.html").is_file()
    words = ["image-classification", "digits_sam", "--sam_rho=0.1", "--max_steps=4", "--output_dir=out"]
    printed = environment.program("hf-sam", *words)
    assert "SAM: method sam (default), rho 0.1 (command line)" in printed
    record = json.loads((environment.folder / "out/run_record.json").read_text())
    assert record["status"] == "finished"
    assert record["environment"]["git"] is None
    assert "adamw" in environment.program("hf-sam", "compare", "digits", "--plan")
