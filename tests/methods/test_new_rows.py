"""The later rows of the table, each against its formula written a second time on one flat float64 vector."""

from __future__ import annotations

import math

import oracles
import pytest
import torch
import torch.nn.functional as F
from integration import tiny
from methods.test_rows import DECAY, LR, assert_equal_to_1e_12, reference, run
from models import OrderedSAMTrainer, arguments, examples, stack, tiny_classifier, train

from hf_sam import SAMConfig
from hf_sam.methods import Functional, LoraNoise
from hf_sam.methods.lora_noise import NoisyLayers, noise

# PEFT still reads the name that transformers has given up.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def shapes():
    return {name: p.shape for name, p in oracles.used_parameters(tiny_classifier()).items()}


@pytest.mark.parametrize(("sigma", "ceiling"), [(0.05, 10.0), (0.2, 0.05), (0.1, 0.15)])
def test_lesam(tmp_path, sigma, ceiling):
    config = SAMConfig(method="lesam", sigma=sigma, rho=ceiling, options={"decay_start": 1.0})
    expected = reference(lambda loss, w, step: oracles.loss_budget(loss, w, sigma, ceiling), steps=3)
    assert_equal_to_1e_12(run(tmp_path, config, steps=3), expected)
    assert_equal_to_1e_12(run(tmp_path, SAMConfig(sigma=sigma, rho=ceiling), steps=3), expected)


def test_lesams_budget_falls_by_a_cosine_at_the_end_of_the_run(tmp_path):
    def step_gradient(loss, w, step):
        t = max(0.0, (step / 4 - 0.25) / 0.75)
        return oracles.loss_budget(loss, w, 0.1 * (1 + math.cos(math.pi * t)) / 2, 10.0)

    config = SAMConfig(method="lesam", sigma=0.1, rho=10.0, options={"decay_start": 0.25})
    assert_equal_to_1e_12(run(tmp_path, config, steps=4), reference(step_gradient, steps=4))


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "m", "steps"),
    [
        (4, 2, None, [[4, 4]] * 3),
        (8, 1, 3, [[3, 3, 2]] * 3),
        (4, 2, 3, [[3, 1, 3, 1]] * 3),
        (2, 3, None, [[2, 2, 2], [2]]),  # the last window of an epoch is short
    ],
)
def test_each_part_of_a_step_has_the_budget_in_its_own_loss(tmp_path, batch_size, accumulation, m, steps):
    """Whatever number of parts the step has, by the formula on the mean loss of every part."""
    sigma, ceiling = 0.05, 10.0
    model, data = tiny_classifier(), examples(8)
    w, start = oracles.flatten(oracles.used_parameters(model)), 0
    for sizes in steps:
        g_s = torch.zeros_like(w)
        for size in sizes:
            loss = oracles.loss_function(model, stack(data[start : start + size]))
            g_s += size / sum(sizes) * oracles.loss_budget(loss, w, sigma, ceiling)
            start = (start + size) % len(data)
        w = w - LR * (g_s + DECAY * w)
    for method, options in (("sam", {}), ("lesam", {"decay_start": 1.0})):
        config = SAMConfig(method=method, sigma=sigma, rho=ceiling, m=m, scope="micro", options=options)
        actual = run(tmp_path / method, config, len(steps), batch_size, accumulation)
        assert_equal_to_1e_12(actual, w)


def test_the_rise_of_a_linear_loss_is_lesams_budget(tmp_path):
    class Linear(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.ones(5, dtype=torch.float64))

        def forward(self, x, labels):
            return {"loss": (x @ self.w).mean(), "logits": x}

    trainer = train(tmp_path, SAMConfig(method="lesam", sigma=0.07, rho=100.0), Linear(), max_steps=1)
    assert trainer.state.log_history[0]["sam_sharpness"] == pytest.approx(0.07, rel=1e-6)


@pytest.mark.parametrize("functional", [False, True])
def test_precond(tmp_path, functional):
    """With AdamW, step by step by hand."""
    model, batch, rho, floor = tiny_classifier(), stack(examples(8)), 0.2, 0.01
    loss, logits = oracles.loss_function(model, batch), oracles.loss_function(model, batch, part="logits")
    w = oracles.flatten(oracles.used_parameters(model))
    m, v, (b1, b2), lr = torch.zeros_like(w), None, (0.9, 0.999), 0.01
    for step in range(1, 4):
        w_eps = w + oracles.preconditioned_eps(oracles.gradient(loss, w), v, rho, floor)
        g = oracles.gradient(loss, w_eps)
        if functional:
            outer = oracles.gradient(lambda z: F.cross_entropy(z, batch["labels"]), logits(w).detach())
            g = oracles.gradient(lambda u, outer=outer: (logits(u) * outer).sum(), w_eps)
        m, v = b1 * m + (1 - b1) * g, b2 * (torch.zeros_like(w) if v is None else v) + (1 - b2) * g**2
        w = w - lr * (m / (1 - b1**step)) / ((v / (1 - b2**step)).sqrt() + 1e-8)
    config = SAMConfig(
        method="precond", rho=rho, options={"floor": floor}, descent=Functional() if functional else None
    )
    options = {"optim": "adamw_torch", "learning_rate": lr, "weight_decay": 0.0, "per_device_train_batch_size": 8}
    trainer = train(tmp_path, config, model, examples(8), **options)
    torch.testing.assert_close(oracles.flatten(oracles.used_parameters(trainer.model)), w, rtol=0, atol=1e-10)


def test_precond_without_second_moments_names_the_remedy(tmp_path):
    with pytest.raises(ValueError, match=r"SGD has no readable.*exp_avg_sq"):
        run(tmp_path, SAMConfig(method="precond"), steps=3)


def test_precond_is_refused_where_only_vectors_have_second_moments(tmp_path):
    """Adafactor keeps those of matrices in factors: only biases and norms would be perturbed."""
    with pytest.raises(ValueError, match=r"Adafactor has no readable.*exp_avg_sq"):
        train(tmp_path, SAMConfig(method="precond"), optim="adafactor")


def test_gcsam(tmp_path):
    def step_gradient(loss, w, step):
        return oracles.gradient(
            loss, w + oracles.eps_of(oracles.by_tensor(oracles.gradient(loss, w), shapes(), oracles.centred), 0.2, 2)
        )

    assert_equal_to_1e_12(run(tmp_path, SAMConfig(method="gcsam", rho=0.2), steps=3), reference(step_gradient, steps=3))


@pytest.mark.parametrize("quantile", [0.0, 0.5, 0.8, 0.95])
def test_zsharp(tmp_path, quantile):
    def step_gradient(loss, w, step):
        kept = oracles.by_tensor(oracles.gradient(loss, w), shapes(), lambda t: oracles.outliers(t, quantile))
        return oracles.gradient(loss, w + oracles.eps_of(kept, 0.2, 2))

    config = SAMConfig(method="zsharp", rho=0.2, options={"quantile": quantile})
    assert_equal_to_1e_12(run(tmp_path, config, steps=3), reference(step_gradient, steps=3))


def test_aesam_perturbs_where_the_squared_norm_is_above_its_threshold(tmp_path):
    state, perturbed, steps = {}, [], 8

    def step_gradient(loss, w, step):
        g = oracles.gradient(loss, w)
        n = g @ g
        mean, variance = state.get("mean", n), state.get("variance", torch.zeros_like(n))
        state["mean"] = 0.8 * mean + 0.2 * n
        state["variance"] = 0.8 * variance + 0.2 * (n - state["mean"]) ** 2
        c = (step / steps) * -1.5 + (1 - step / steps) * 0.5
        perturbed.append(bool(n >= state["mean"] + c * state["variance"].sqrt()))
        return oracles.gradient(loss, w + oracles.eps_of(g, 0.2, 2)) if perturbed[-1] else g

    config = SAMConfig(method="aesam", rho=0.2, options={"decay": 0.8, "lambda_1": -1.5, "lambda_2": 0.5})
    actual = run(tmp_path, config, steps=steps)
    assert_equal_to_1e_12(actual, reference(step_gradient, steps=steps))
    assert len(set(perturbed)) == 2, "both kinds of steps are seen"


def tail_step(loss_of, batch, is_tail, weight, rho):
    """The gradient at w of the others, and `weight` times that of the tail's examples at w + eps."""

    def step_gradient(loss, w, step):
        total = len(is_tail)

        def part(mask):
            rows = {name: value[mask] for name, value in batch.items()}
            inner = loss_of(rows)
            return lambda v: inner(v) * mask.sum() / total

        found = torch.zeros_like(w)
        if (~is_tail).any():
            found = found + oracles.gradient(part(~is_tail), w)
        if is_tail.any():
            tail = part(is_tail)
            found = found + weight * oracles.gradient(tail, w + oracles.eps_of(oracles.gradient(tail, w), rho, 2))
        return found

    return step_gradient


@pytest.mark.parametrize(("classes", "weight"), [([1], 1.0), ([0, 2], 2.0), ([7], 1.0), ([0, 1, 2], 1.0)], ids=str)
def test_imbsam(tmp_path, classes, weight):
    batch = stack(examples(8))
    is_tail = torch.isin(batch["labels"], torch.tensor(classes))
    step = tail_step(lambda rows: oracles.loss_function(tiny_classifier(), rows), batch, is_tail, weight, 0.2)
    config = SAMConfig(method="imbsam", rho=0.2, options={"tail_classes": classes, "tail_weight": weight})
    actual = run(tmp_path, config, steps=3, batch_size=8, accumulation=1)
    assert_equal_to_1e_12(actual, reference(step, steps=3))


def test_imbsam_counts_the_training_labels(tmp_path):
    data = examples(24)
    counts = torch.bincount(torch.stack([row["labels"] for row in data]))
    below = int(counts.min()) + 1
    rare = [c for c, count in enumerate(counts.tolist()) if count < below]
    assert 0 < len(rare) < 3

    def final(options):
        config = SAMConfig(method="imbsam", rho=0.2, options=options)
        trainer = train(tmp_path, config, data=data, max_steps=4)
        return oracles.flatten(oracles.used_parameters(trainer.model))

    assert torch.equal(final({"tail_below": below}), final({"tail_classes": rare}))


def test_imbsam_takes_a_column_of_the_batch_that_is_not_the_models(tmp_path):
    rows = [{**row, "rare": torch.tensor(int(row["labels"] == 1))} for row in examples(8)]
    config = SAMConfig(method="imbsam", rho=0.2, options={"part": "rare"})
    by_column = train(tmp_path, config, data=rows, remove_unused_columns=False)
    by_class = train(tmp_path, SAMConfig(method="imbsam", rho=0.2, options={"tail_classes": [1]}))
    for a, b in zip(by_column.model.parameters(), by_class.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_imbsam_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match=r"part='rare' is not a tensor in the batch.*remove_unused_columns=False"):
        train(tmp_path, SAMConfig(method="imbsam", options={"part": "rare"}))
    with pytest.raises(ValueError, match="one class per example"):
        tiny.trained(tiny.llama(), tiny.texts(), tmp_path, SAMConfig(method="imbsam", options={"tail_classes": [1]}))


# --- flat-lora -------------------------------------------------------------------------------------------------------


def adapted():
    return tiny.with_lora(tiny.bert(), ["query", "value"]).double()


def test_flat_loras_deviations_are_those_of_the_merged_rows():
    model = adapted()
    layers = NoisyLayers(model)
    with layers.noisy(0.3, torch.Generator().manual_seed(1)):
        for i, layer in enumerate(layers._layers.values()):
            deviations, _ = layers.drawn(i)
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            merged = layer.get_base_layer().weight + layer.scaling["default"] * b @ a
            expected = 0.3 * merged.norm(dim=1) / layer.in_features**0.5
            torch.testing.assert_close(deviations, expected.detach(), rtol=1e-12, atol=0)


def test_flat_loras_pass_is_that_of_noisy_weights():
    model = adapted()
    layers = NoisyLayers(model)
    batch = {"input_ids": torch.tensor([[1, 2, 3, 4]]), "labels": torch.tensor([1])}
    with layers.noisy(0.3, torch.Generator().manual_seed(1)):
        loss = model(**batch).loss
        loss.backward()
        drawn = [noise(*layers.drawn(i), layer.in_features) for i, layer in enumerate(layers._layers.values())]
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    layers.remove()
    with torch.no_grad():
        for layer, n in zip(layers._layers.values(), drawn, strict=True):
            layer.get_base_layer().weight.add_(n)
    expected = model(**batch).loss
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(gradients[name], p.grad, rtol=1e-9, atol=1e-12)


def test_flat_lora_leaves_the_base_alone_ramps_up_and_repeats(tmp_path):
    def trained():
        model = tiny.with_lora(tiny.bert(), ["query", "value"])
        before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
        trainer = tiny.trained(model, tiny.sentences(), tmp_path, SAMConfig(method="flat-lora", rho=0.3), max_steps=5)
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
        return trainer

    one, two = trained(), trained()
    assert torch.equal(torch.stack(one.trajectory), torch.stack(two.trajectory))
    expected = [0.3 * (1 - math.cos(math.pi * step / 5)) / 2 for step in range(5)]
    assert tiny.logged(one, "sam_rho") == pytest.approx(expected, abs=1e-6)
    assert not any(module._forward_hooks for name, module in one.model.named_modules() if "query" in name)


def test_flat_lora_needs_an_adapter(tmp_path):
    with pytest.raises(ValueError, match="no linear LoRA layer"):
        train(tmp_path, SAMConfig(ascent=LoraNoise()))


@pytest.mark.parametrize("method", ["lesam", "aesam", "imbsam", "precond"])
def test_resumed_is_bitwise_uninterrupted(tmp_path, method):
    options = {"imbsam": {"tail_classes": [1]}}.get(method)

    def trainer(folder):
        return OrderedSAMTrainer(
            model=tiny_classifier(dropout=0.3),
            args=arguments(
                folder, max_steps=7, save_strategy="steps", save_steps=3, optim="adamw_torch", learning_rate=0.01
            ),
            train_dataset=examples(16),
            sam_config=SAMConfig(method=method, rho=0.2, options=options),
        )

    whole = trainer(tmp_path / "whole")
    whole.train()
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
