"""Steps are the Trainer's own, counts and ratios are right, and `recipes/benchmark.py` writes what it says."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from collections import Counter
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import stand_ins
import torch
from conftest import ROOT
from integration import tiny
from integration.test_memory import Wide
from transformers import Trainer, set_seed

from hf_sam import METHODS, SAMConfig, SAMTrainer
from hf_sam.benchmark import (
    STOCK,
    VARIANTS,
    Measurement,
    Variant,
    measure,
    stepped_trainer,
)
from hf_sam.benchmark.measure import count, turns
from hf_sam.benchmark.reference_loop import PytorchOptimizerLoop, TwoPassLoop
from hf_sam.experiments.records import RunRecord
from hf_sam.reporting.benchmark import frontier, gains
from hf_sam.tasks import benchmark as recipe
from hf_sam.tasks.command_line import errors

# Examples forward and backward through the model in a perturbed step, and in a plain one, in units of the batch of 4.
TWO = ((2, 2), (1, 1))
PASSES = {
    **dict.fromkeys(METHODS, TWO),
    "subset": ((1.25, 1.25), (1, 1)),
    "esam": ((2.5, 1.5), (1, 1)),  # clean, one forward to choose, and the half that is chosen
    "carried": ((1.25, 1.25), (1, 1)),
    **dict.fromkeys(("msam", "previous", "bilora", "random", "flat-lora"), ((1, 1), (1, 1))),
    **dict.fromkeys(("trainer", "rho-0"), ((1, 1), (1, 1))),
    "hand-loop": TWO,
    "pytorch-optimizer": TWO,
    "subset-5": ((1.25, 1.25), (1, 1)),
    "late-5": TWO,
    **dict.fromkeys(("late-subset", "norm-only-subset", "late-norm-only-subset"), ((1.25, 1.25), (1, 1))),
}
SHARES = {
    "looksam": 0.2,
    "carried": 0.2,
    "periodic": 0.2,
    "late": 0.25,
    "subset-5": 0.2,
    "late-5": 0.05,
    "late-subset": 0.25,
}
SHARES |= {"trainer": 0, "rho-0": 0, "late-norm-only-subset": 0.25}


def builder(folder, model=None, data=None, **options):
    """Makes trainers for `measure`, all from the same model."""
    model = tiny.vit(dropout=0.1) if model is None else model
    data = tiny.images() if data is None else data
    options = {"logging_strategy": "no", "dataloader_drop_last": True, **options}

    def build(variant: Variant, steps: int):
        set_seed(2)
        common = {"args": tiny.arguments(folder, max_steps=steps, **options), "train_dataset": data}
        common["model"] = copy.deepcopy(model)
        return stepped_trainer(variant, **common)

    return build


# --- steps -----------------------------------------------------------------------------------------------------------


def test_steps_in_turns_are_bitwise_those_of_an_ordinary_run(tmp_path):
    """With dropout, a shuffled data set and accumulation; the two take turns, and neither disturbs the other."""
    options = {"train_sampling_strategy": "random", "gradient_accumulation_steps": 2, "lr_scheduler_type": "linear"}
    build = builder(tmp_path, **options)
    trainers = [build(STOCK, 4), build(VARIANTS["sam"], 4)]
    for trainer in trainers:
        trainer.prepare()
    for name, steps in turns(["0", "1"], 4, block=3, seed=0):
        trainers[int(name)].take_steps(steps)
    for trainer in trainers:
        trainer.close()
    weights = [tiny.state(trainer.model) for trainer in trainers]
    assert not tiny.same_bits(*weights)

    for ours, kind, extra in ((weights[0], Trainer, {}), (weights[1], SAMTrainer, {"sam_config": SAMConfig()})):
        set_seed(2)
        args = tiny.arguments(tmp_path, max_steps=4, logging_strategy="no", dataloader_drop_last=True, **options)
        trainer = kind(model=tiny.vit(dropout=0.1), args=args, train_dataset=tiny.images(), **extra)
        trainer.train()
        assert tiny.same_bits(ours, tiny.state(trainer.model))
    assert all(len(trainer.clock.seconds) == trainer.state.global_step == 4 for trainer in trainers)


NEEDS_PEER = pytest.mark.skipif(not find_spec("pytorch_optimizer"), reason="needs hf-sam[benchmark]")
# The package takes the gradient's norm in float32.
LOOPS = [(TwoPassLoop, 1e-12), pytest.param(PytorchOptimizerLoop, 1e-8, marks=NEEDS_PEER)]


@pytest.mark.parametrize(("loop", "tolerance"), LOOPS)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_loop_by_hand_takes_sams_step(accumulation, loop, tolerance, tmp_path):
    model, lr, rho = tiny.mlp(torch.float64), 0.1, 0.3
    data = tiny.vectors(dtype=torch.float64)
    options = {"optim": "sgd", "learning_rate": lr, "max_grad_norm": 0, "gradient_accumulation_steps": accumulation}
    trainer = builder(tmp_path, model, data, **options)(Variant("by hand", SAMConfig(rho=rho), loop), 2)
    trainer.prepare()
    trainer.take_steps(2)

    parameters = list(model.parameters())
    for step in range(2):
        batch = data[step * 4 * accumulation : (step + 1) * 4 * accumulation]
        x, labels = torch.stack([row["x"] for row in batch]), torch.tensor([row["labels"] for row in batch])
        g = torch.autograd.grad(model(x, labels)["loss"], parameters)
        norm = torch.sqrt(sum(part.square().sum() for part in g))
        moved = {name: p + rho * part / norm for (name, p), part in zip(model.named_parameters(), g, strict=True)}
        loss = torch.func.functional_call(model, moved, (x, labels))["loss"]
        g_s = torch.autograd.grad(loss, list(moved.values()))
        with torch.no_grad():
            for p, part in zip(parameters, g_s, strict=True):
                p -= lr * part
    torch.testing.assert_close(tiny.flat(trainer.model), tiny.flat(model), rtol=0, atol=tolerance)


# --- counts ----------------------------------------------------------------------------------------------------------


def test_every_method_is_a_variant():
    assert set(METHODS) < set(VARIANTS) == set(PASSES)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT reads it
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=NEEDS_PEER) if name == "pytorch-optimizer" else name for name in VARIANTS]
)
def test_counted_passes_are_those_of_the_configuration(name, tmp_path):
    variant = VARIANTS[name]
    model = tiny.with_lora(tiny.vit(), ["q_proj", "v_proj"]) if name in ("bilora", "flat-lora") else tiny.vit()
    counted = count(variant, builder(tmp_path, model))
    if name == "aesam":  # decides in each step; the claim is what it costs at most
        assert 1 <= counted.passes < variant.expected_passes == 2
        return
    share = SHARES.get(name, 1)
    forward, backward = (
        share * perturbed + (1 - share) * plain for perturbed, plain in zip(*PASSES[name], strict=True)
    )
    assert (counted.forward, counted.backward) == pytest.approx((forward, backward))
    assert counted.passes == pytest.approx(forward / 3 + 2 * backward / 3)
    assert variant.expected_passes == pytest.approx(counted.passes)
    assert counted.bytes == 0


def test_peak_memory_of_a_model_that_is_almost_all_weights(tmp_path):
    """Weights and their gradients; SAM one copy more, and in a step that is observed a few of a layer; by hand no less."""
    model = Wide(torch.float32)
    model.layers.extend(torch.nn.Linear(256, 256, bias=False) for _ in range(20))
    size = sum(p.nbytes for p in model.parameters())
    data = [{"x": torch.randn(256), "labels": 0} for _ in range(8)]
    build = builder(tmp_path, model, data, per_device_train_batch_size=1, optim="sgd", max_grad_norm=0)
    peaks = {name: count(VARIANTS[name], build).peak_memory / size for name in ("trainer", "sam", "hand-loop")}
    assert peaks["trainer"] == pytest.approx(2, abs=0.1)
    assert 1 <= peaks["sam"] - peaks["trainer"] <= 1.25
    assert 1 <= peaks["hand-loop"] - peaks["trainer"] <= 1.25


def test_a_peer_that_is_not_installed_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    assert "pip install 'hf-sam[benchmark]'" in count(VARIANTS["pytorch-optimizer"], builder(tmp_path))


def test_impossible_variants_say_why(tmp_path):
    rows = measure([VARIANTS["bilora"], VARIANTS["msam"]], builder(tmp_path), steps=2, warmup=1, block=1)
    stock, bilora, msam = rows
    assert "no linear LoRA layer" in bilora.reason
    assert bilora.counted is None
    assert stock.ratio() == 1
    assert len(msam.seconds) == len(msam.stock_seconds) == 2


# --- times -----------------------------------------------------------------------------------------------------------


def test_in_every_round_each_has_one_turn():
    order = list(turns(["a", "b", "c"], steps=11, block=4, seed=0))
    rounds = [order[i : i + 3] for i in range(0, 9, 3)]
    assert [{steps for _, steps in turn} for turn in rounds] == [{4}, {4}, {3}]
    assert all(sorted(name for name, _ in turn) == ["a", "b", "c"] for turn in rounds)
    firsts = Counter(name for name, _ in list(turns(["a", "b", "c"], 300, 1, seed=0))[::3])
    assert min(firsts.values()) > 70  # no one is always the first


def test_ratio_weighs_perturbed_and_plain_steps_by_the_schedule():
    late = VARIANTS["late"]  # a quarter of the steps
    entry = Measurement(
        late,
        seconds=[1.0, 2.0, 9.0, 6.0, 8.0],
        perturbed=[False, False, False, True, True],
        stock_seconds=[1.0, 1.0, 1.0, 2.0, 3.0],
    )
    # plain: median 2 over stock's 1; perturbed: median 7 over stock's 2.5 in the same turns
    assert entry.ratio() == pytest.approx(0.75 * 2 / 1 + 0.25 * 7 / 2.5)
    assert entry.step_seconds() == pytest.approx(0.75 * 2 + 0.25 * 7)
    low, high = entry.ratio_interval(np.random.default_rng(0))
    assert 0.75 * 1 + 0.25 * 8 / 3 <= low < entry.ratio() < high <= 0.75 * 9 + 0.25 * 3


def test_a_machine_that_slows_down_for_all_changes_no_ratio():
    slow = np.linspace(1, 3, 20)
    entry = Measurement(VARIANTS["sam"], seconds=list(2 * slow), perturbed=[True] * 20, stock_seconds=list(slow))
    assert entry.ratio() == pytest.approx(2)
    assert entry.ratio_interval(np.random.default_rng(0)) == pytest.approx((2, 2))


def test_too_few_steps_for_a_schedule_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"steps=3 after warmup=2 include no perturbed step of periodic\. Give more steps"
    ):
        measure([VARIANTS["periodic"]], builder(tmp_path), steps=3, warmup=2)


# --- gain against cost -----------------------------------------------------------------------------------------------


def record(arm: str, seed: int, accuracy: float, sam: SAMConfig | None) -> RunRecord:
    return RunRecord(
        task="digits",
        arm=arm,
        seed=seed,
        status="finished",
        metrics={"accuracy": accuracy},
        config={"sam": None if sam is None else sam.to_dict()},
    )


def test_gains_stand_beside_the_ratio_of_the_same_configuration():
    records = []
    for seed in range(3):
        records += [
            record("adamw", seed, 0.80, SAMConfig(rho=0)),
            record("sam", seed, 0.83, SAMConfig(rho=0.2)),  # another rho costs the same
            record("subset", seed, 0.82, SAMConfig(method="subset")),
            record("other", seed, 0.9, SAMConfig(ascent_steps=3)),  # was not timed
        ]
    variants = [STOCK, VARIANTS["rho-0"], VARIANTS["sam"], VARIANTS["subset"]]
    rows = pd.DataFrame({"variant": [c.name for c in variants], "ratio": [1, 1.01, 1.9, 1.3]})
    found = gains(records, rows, variants)
    assert found.arm.tolist() == ["sam", "subset"]
    assert found.ratio.tolist() == [1.9, 1.3]
    assert found.gain.tolist() == pytest.approx([3, 2])


def test_frontier_keeps_what_nothing_dominates():
    points = [(1.0, 0.0), (1.3, 2.0), (1.5, 1.0), (2.0, 3.0), (2.0, 2.5)]
    assert frontier(points) == [(1.0, 0.0), (1.3, 2.0), (2.0, 3.0)]


# --- the recipe --------------------------------------------------------------------------------------------------------

FAST = ["--use_cpu=true", "--disable_tqdm=true", "--steps=8", "--warmup=2", "--block=2", "--variants_at_once=2"]
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
SHAPES = {
    "image-classification": {"image_size": 16, "patch_size": 8},
    "text-classification": {"vocab_size": 32, "max_position_embeddings": 8},
    "causal-lm": {"vocab_size": 32, "max_position_embeddings": 8, "num_key_value_heads": 2},
}


def made_up(task: str) -> list[str]:
    return [f"--task={task}", "--synthetic=true", f"--config_overrides={json.dumps(SMALL | SHAPES[task])}", *FAST]


def test_a_sweep_leaves_tables_and_drawings(tmp_path):
    words = ["--methods", "late", "bilora", '{"method": "sam", "interval": 2}', "--batch_sizes", "2", "4"]
    rows = recipe.main([*made_up("text-classification"), *words, f"--output_dir={tmp_path}"])
    names = {"benchmark.json", "benchmark.csv", "benchmark.md", "ratios.png", "ratios_1.png", "sweep.png"}
    assert {path.name for path in tmp_path.iterdir()} == names | {"report.html", "report.md", "figures", "data"}
    report = (tmp_path / "report.md").read_text()
    assert re.search(r"> \*\*A step of late takes \d\.\d\d times as long as one of the stock Trainer", report)
    assert "- Not timed: bilora. method='bilora'" in report
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {"ratios-0", "ratios-1", "sweep"}
    assert rows.variant.tolist() == 2 * ["trainer", "late", "bilora", "method sam, interval 2"]
    assert rows.passes.tolist()[:2] == pytest.approx([1, 1.25])
    assert rows.timed_steps.dropna().tolist() == [8] * 6
    assert (rows.peak_memory.dropna() > 0).all()
    document = json.loads((tmp_path / "benchmark.json").read_text())
    assert document["environment"]["packages"]["torch"] == version("torch")
    assert len(document["settings"][0]["steps"]["late"]) == 8
    page = (tmp_path / "benchmark.md").read_text()
    assert "impossible: method='bilora'" in page
    assert "Command: `hf-sam benchmark --task=text-classification" in page
    assert len(pd.read_csv(tmp_path / "benchmark.csv")) == 8


@pytest.mark.parametrize("task", ["image-classification", "causal-lm"])
def test_made_up_data_of_every_task(task, tmp_path):
    words = [*made_up(task), "--steps=2", "--methods", "sam", "hand-loop", f"--output_dir={tmp_path}"]
    rows = recipe.main(words)
    assert rows.passes.tolist() == pytest.approx([1, 2, 2])


def test_the_users_own_model_and_data(tmp_path, encoder):
    (tmp_path / "data").mkdir()
    data = stand_ins.write("texts", tmp_path / "data")
    words = ["--task=text-classification", f"--model_name_or_path={encoder}", f"--dataset={data}", *FAST]
    rows = recipe.main([*words, "--steps=2", "--methods", "sam", "--batch_sizes=2", f"--output_dir={tmp_path}"])
    assert rows.samples_per_second.gt(0).all()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task=images"], "task=images is unknown. Give --task: image-classification"),
        (["--task=causal-lm"], "Give --dataset, or --synthetic true"),
        (["--methods", "smm"], "methods: 'smm' is unknown. Did you mean 'sam'"),
        (["--methods", '{"method": "sam", "roh": 1}'], "methods: 'roh' is not a field of SAMConfig"),
        (["--methods", '{"method"'], "methods: "),
        (["--steps=0"], "steps=0 must be at least 1"),
        (
            ["--steps=2", "--methods", "periodic"],
            "include no perturbed step of periodic|include no plain step of periodic",
        ),
        (["--sizes", "3M"], "sizes: '3M' is unknown. Allowed: 2M"),
        (["--batch_sizes", "0"], "each must be at least 1"),
        (["--records", "/no/such/folder"], "contains no run_record.json"),
        (["--dataset", "digits"], "not both"),
        (["--stepz=3"], "'stepz' is not an argument of this recipe. Did you mean 'steps'"),
    ],
)
def test_mistakes_end_in_one_line(words, message, tmp_path, monkeypatch, capsys):
    argv = words if words[0] in ("--task=images", "--task=causal-lm") else [*made_up("text-classification"), *words]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *argv, f"--output_dir={tmp_path}"])
    with pytest.raises(SystemExit) as ended:
        errors.run(recipe.main)
    assert ended.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.strip().splitlines() if line.startswith("error: ")]
    assert pd.Series([line]).str.contains(message, regex=True).all()


@pytest.mark.slow
def test_two_processes_count_what_they_send(tmp_path):
    """DDP reduces every gradient once in a stock step; twice by hand and with scope global; SAM's own scope adds nothing."""
    launch = ["-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu.yaml"]
    methods = ["--methods", "sam", "hand-loop", "gsam", '{"method": "sam", "scope": "global"}']
    words = [*launch, "recipes/benchmark.py", *made_up("text-classification"), *methods, "--batch_sizes=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, *words, f"--output_dir={tmp_path}"],
        cwd=ROOT, capture_output=True, text=True, timeout=900, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = pd.read_csv(Path(tmp_path) / "benchmark.csv").set_index("variant")
    stock = rows.bytes["trainer"]
    assert stock == pytest.approx(4 * rows.parameters["trainer"], rel=0.05)
    relative = (rows.bytes / stock).to_dict()
    assert relative == pytest.approx(
        {"trainer": 1, "sam": 1, "hand-loop": 2, "gsam": 1, "method sam, scope global": 2}, rel=0.05
    )
    assert "sent (MiB)" in (tmp_path / "benchmark.md").read_text()
