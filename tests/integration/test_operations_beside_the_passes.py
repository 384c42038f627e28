"""How many operations a step dispatches beside its passes, on the path that an accelerator takes: no more for more tensors."""

from __future__ import annotations

import pytest
import torch
from integration import tiny
from integration.counting import Operations, Tower, counted_steps
from torch import nn
from transformers import PrinterCallback

from hf_sam import SAMConfig, SAMTrainer
from hf_sam.methods import METHODS
from hf_sam.update import step

# The most operations in a step that does not log, and in one that does. docs/cost.md has the counts by method.
MOST: dict[str, tuple[int, int]] = {
    "sam": (31, 69),
    "asam": (39, 79),
    "gsam": (50, 88),
    "wsam": (34, 72),
    "friendly": (35, 75),
    "esam": (59, 98),
    "looksam": (49, 87),
    "msam": (24, 36),
    "periodic": (31, 69),
    "late": (31, 66),
    "subset": (41, 79),
    "norm-only": (29, 67),
    "functional": (31, 69),
    "previous": (24, 36),
    "carried": (40, 79),
    "bilora": (23, 23),
    "random": (25, 40),
    "lesam": (31, 70),
    "precond": (40, 80),
    "flat-lora": (1, 1),
    "imbsam": (52, 71),
    "aesam": (44, 83),
    "gcsam": (36, 76),
    "zsharp": (40, 80),
}
# What makes every step the method's dearest one, and the choices of parameters and of examples those of all models.
FIELDS = {
    "looksam": {"interval": 2},
    "periodic": {"interval": 2},
    "carried": {"interval": 2},
    "late": {"start": 1},
    "esam": {"beta": 1.0},
    "imbsam": {"options": {"tail_classes": [0, 2]}},
    "aesam": {"options": {"lambda_1": -1e6, "lambda_2": -1e6}},
}
# One number is read where the host has to know it: which examples are rare, and whether there is a second pass.
READS = {"imbsam": {"nonzero": 1}, "aesam": {"_local_scalar_dense": 1}}
STEPS, LOGS_EVERY, SETTLED = 8, 7, 3  # the first steps watch what a pass changes


@pytest.fixture(autouse=True)
def whole_lists(monkeypatch):
    monkeypatch.setattr(step, "IN_BUCKETS", True)


def model_of(tensors: int, method: str) -> nn.Module:
    """With that many trainable tensors; a deeper one has more of the same."""
    tiny.set_seed(0)
    if method not in ("bilora", "flat-lora"):
        return Tower(tensors // 4)
    from peft import LoraConfig, get_peft_model

    base = Tower(tensors // 2)
    names = [name for name, module in base.named_modules() if isinstance(module, nn.Linear)]
    return get_peft_model(base, LoraConfig(r=2, target_modules=names, init_lora_weights=False))


def steps_of(method: str, tensors: int, folder, monkeypatch) -> tuple[list[Operations], list[Operations]]:
    """Of a run, the steps that do not log and those that do, but for the first ones."""
    model = model_of(tensors, method)
    assert sum(p.requires_grad for p in model.parameters()) == tensors
    trainer = SAMTrainer(
        model=model,
        args=tiny.arguments(folder, max_steps=STEPS, logging_steps=LOGS_EVERY),
        train_dataset=tiny.vectors(),
        sam_config=SAMConfig(method=method, **FIELDS.get(method, {})),
    )
    trainer.remove_callback(PrinterCallback)
    measured = []
    original = trainer._is_measured_step
    trainer._is_measured_step = lambda: measured.append(original()) or measured[-1]
    with counted_steps(monkeypatch) as steps:
        trainer.train()
    assert trainer._sam.space.in_buckets
    assert len(measured) == len(steps) == STEPS
    settled = list(zip(steps, measured, strict=True))[SETTLED:]
    return [s for s, logs in settled if not logs], [s for s, logs in settled if logs]


@pytest.mark.parametrize("method", METHODS)
def test_they_do_not_grow_with_the_number_of_tensors_and_nothing_waits_for_the_device(method, tmp_path, monkeypatch):
    counts, waits = {}, []
    for tensors in (20, 200):
        quiet, loud = steps_of(method, tensors, tmp_path, monkeypatch)
        counts[tensors] = [[s.launches for s in quiet], [s.launches for s in loud]]
        waits += [s.waits for s in quiet]
    assert counts[20] == counts[200]
    assert all(max(found) <= most for found, most in zip(counts[20], MOST[method], strict=True))
    assert all(waited == READS.get(method, {}) for waited in waits)


def test_a_method_of_ones_own_in_plain_formulas_does_not_grow_either(tmp_path, monkeypatch):
    from dataclasses import dataclass

    from hf_sam import Ascent, Descent, Needs

    @dataclass(frozen=True)
    class Signs(Ascent):
        memory = ("mean",)

        def eps(self, g, step):
            mean = step.memory.get("mean", g)
            step.memory["mean"] = mean * 0.9 + g.abs() * 0.1
            d = (g.sign() + step.weights * 0.1) / (g.abs().sqrt() + 1e-3)
            return d * (step.rho / d.norm())

    @dataclass(frozen=True)
    class Half(Descent):
        needs = Needs.CLEAN_GRADIENT

        def gradient(self, g, g_s, step):
            return g_s - g * (g.dot(g_s) / g.dot(g))

    counts = []
    for tensors in (20, 200):
        trainer = SAMTrainer(
            model=model_of(tensors, "sam"),
            args=tiny.arguments(tmp_path, max_steps=4, logging_steps=10),
            train_dataset=tiny.vectors(),
            sam_config=SAMConfig(ascent=Signs(), descent=Half(), rho=0.1),
        )
        with counted_steps(monkeypatch) as steps:
            trainer.train()
        counts.append([steps[2].launches, steps[2].waits])
    assert counts[0] == counts[1]
    assert counts[0][0] < 100
    assert not counts[0][1]


def test_the_count_sees_what_works_tensor_by_tensor(tmp_path, monkeypatch):
    monkeypatch.setattr(step, "IN_BUCKETS", False)
    trainer = SAMTrainer(
        model=model_of(20, "sam"),
        args=tiny.arguments(tmp_path, logging_steps=10),
        train_dataset=tiny.vectors(),
        sam_config=SAMConfig(),
    )
    with counted_steps(monkeypatch) as steps:
        trainer.train()
    assert steps[1].launches >= 20
    assert steps[1].waits


def test_16_bit_weights_beside_norms_in_float32_are_two_lists_not_many(tmp_path, monkeypatch):
    counts = []
    for tensors in (20, 200):
        model = model_of(tensors, "sam").to(torch.bfloat16)
        model.norm.float()
        with torch.autocast("cpu", torch.bfloat16):
            trainer = SAMTrainer(
                model=model,
                args=tiny.arguments(tmp_path, max_steps=4, logging_steps=10),
                train_dataset=tiny.vectors(),
                sam_config=SAMConfig(method="gsam"),
            )
            with counted_steps(monkeypatch) as steps:
                trainer.train()
        counts.append(steps[2].launches)
    assert counts[0] == counts[1] < 100
