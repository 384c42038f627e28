"""`make bench-gpu` as far as a CPU can take it: one whole cell, and what is left when the time is up."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest
import torch

from hf_sam.benchmark import on_gpu, stepped_trainer
from hf_sam.benchmark.gpu_cells import AUTOCAST, COMPILED, MODELS, PRECISIONS, cells
from hf_sam.benchmark.on_gpu import main

ROW = {"variant": "trainer", "problem": "not measured"}


@pytest.fixture(autouse=True)
def _settings_stay_here(monkeypatch):
    """`torch_compile=True` writes into the environment, where the next trainer would find it."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    yield
    torch.set_float32_matmul_precision("highest")


def dry_run(folder, only: str, *words: str) -> list[dict]:
    assert main(["--device=cpu", f"--output_dir={folder}", f"--only={only}", "--steps=5", *words]) == 0
    (cell,) = json.loads((folder / "bench.json").read_text())["cells"]
    return cell["rows"]


def test_a_dry_run_measures_all_that_a_card_is_asked_for(tmp_path):
    rows = dry_run(tmp_path, "ViT-S/14, bf16 autocast, batch 3", "--variants", "sam", "periodic", "hand-loop")
    assert [row["variant"] for row in rows] == ["trainer", "sam", "periodic", "hand-loop"]
    stock, sam, periodic, _ = rows
    assert stock["ratio"] == 1
    assert all(0 < row["seconds_25"] <= row["seconds_50"] <= row["seconds_75"] for row in rows)
    assert all(row["ratio_low"] <= row["ratio"] <= row["ratio_high"] for row in rows)
    assert stock["launches"] < periodic["launches"] < sam["launches"] < 4 * stock["launches"]
    assert sam["synchronisations"] <= 2 * stock["synchronisations"]
    assert -1 < sam["bookkeeping"] < 1  # a difference of times, which may be negative on a busy machine
    page = (tmp_path / "bench.md").read_text()
    assert "- `sam` costs at most" in page
    assert page.count("| sam |") == 1


@pytest.mark.slow
def test_a_compiled_cell_leaves_no_other_cell_compiled(tmp_path, monkeypatch):
    backends = []

    def spying(variant, *, args, **kwargs):
        trainer = stepped_trainer(variant, args=args, **kwargs)
        backends.append(str(trainer.accelerator.state.dynamo_plugin.backend.value).lower())
        return trainer

    monkeypatch.setattr(on_gpu, "stepped_trainer", spying)
    first, second = (next(c for c in cells(True) if c.precision == name) for name in (COMPILED, AUTOCAST))
    for cell in (first, second):
        (row,) = on_gpu.run_cell(cell, [on_gpu.STOCK, on_gpu.VARIANTS["sam"]], "cpu", 5)[1:]
        assert "ratio" in row
        assert ("bookkeeping" in row) == (cell is second)
    assert backends == ["eager"] * 2 + ["no"] * 2


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("model", MODELS)
def test_every_cell_in_a_dry_run(model, precision, tmp_path):
    assert all("ratio" in row for row in dry_run(tmp_path, f"^{model}, {precision}, batch 2", "--variants", "sam"))


def test_every_model_and_precision_has_a_batch_that_fills_the_card_and_one_that_does_not():
    assert len(set(cells(tiny=False))) == len(MODELS) * len(PRECISIONS) * 2
    first = cells(tiny=False)[: 2 * len(MODELS)]
    assert {cell.model for cell in first} == set(MODELS), "when time runs out every model has been seen"


@pytest.mark.parametrize(
    ("number", "status", "end"), [(signal.SIGTERM, 143, "ended by SIGTERM"), (signal.SIGINT, 130, "ended by SIGINT")]
)
def test_what_was_measured_is_kept_when_it_is_told_to_stop(number, status, end, tmp_path, monkeypatch):
    calls = []

    def run_cell(cell, *_):
        calls.append(cell)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
            time.sleep(5)
        return [ROW]

    monkeypatch.setattr(on_gpu, "run_cell", run_cell)
    before = signal.getsignal(number)
    assert main(["--device=cpu", f"--output_dir={tmp_path}"]) == status
    assert signal.getsignal(number) is before
    document = json.loads((tmp_path / "bench.json").read_text())
    assert [cell["model"] for cell in document["cells"]] == [calls[0].model]
    assert document["end"] == end
    assert document["left_out"][0] == str(calls[1])
    assert {path.name for path in tmp_path.iterdir()} == {"bench.json", "bench.md"}


def test_cells_are_left_out_when_the_time_is_up(tmp_path, monkeypatch):
    monkeypatch.setattr(on_gpu, "run_cell", lambda *_: time.sleep(30))
    began = time.monotonic()
    assert main(["--device=cpu", f"--output_dir={tmp_path}", "--minutes=0"]) == 0
    assert time.monotonic() - began < 10
    document = json.loads((tmp_path / "bench.json").read_text())
    assert document["end"] == "the time was up"
    assert len(document["left_out"]) == len(cells(tiny=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_cuda_device_one_line_says_so(capsys, tmp_path):
    assert main([f"--output_dir={tmp_path}"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_memory_that_runs_out_is_a_row_and_the_others_are_measured_in_pairs(tmp_path, monkeypatch):
    groups = []

    def run_group(cell, group, *_):
        groups.append([variant.name for variant in group])
        if len(group) > 2 or group[1].name == "gsam":
            raise torch.OutOfMemoryError("no more")
        return {variant.name: {"ratio": 1.0} for variant in group}

    monkeypatch.setattr(on_gpu, "run_group", run_group)
    variants = [on_gpu.VARIANTS[name] for name in ("trainer", "sam", "gsam", "asam")]
    rows = on_gpu.run_cell(cells(tiny=True)[0], variants, "cpu", 5)
    assert groups == [["trainer", "sam", "gsam", "asam"], ["trainer", "sam"], ["trainer", "gsam"], ["trainer", "asam"]]
    assert [row.get("problem") for row in rows] == [None, None, "out of memory", None]
