"""What a run logs is what happened."""

from __future__ import annotations

import pytest
import torch
from integration import tiny
from transformers.utils import logging

from hf_sam import SAMConfig

SCOPES = ("micro", "device", "global")
EVERY_STEP = (
    "sam_rho",
    "sam_ascent_grad_norm",
    "sam_perturbation_norm",
    "sam_perturbed_loss",
    "sam_sharpness",
    "sam_cosine",
)


class Losses(tiny.WatchedSAMTrainer):
    """Notes the loss of every pass, as the Trainer would add it up; not on itself, where only clean passes leave traces."""

    window_losses: list[tuple[int, float]]

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        type(self).window_losses.append(
            (self.state.global_step, loss.item() / self.current_gradient_accumulation_steps)
        )
        return loss


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("scope", SCOPES)
def test_every_key_of_every_step(scope, accumulation, tmp_path):
    tiny.set_seed(2)
    Losses.window_losses = []
    trainer = Losses(
        model=tiny.mlp(torch.float64, dropout=0.2),
        args=tiny.arguments(tmp_path, gradient_accumulation_steps=accumulation),
        train_dataset=tiny.vectors(dtype=torch.float64),
        sam_config=SAMConfig(rho=0.3, scope=scope),
    )
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 3
    for step, entry in enumerate(entries):
        losses = [loss for s, loss in trainer.window_losses if s == step]
        weights = [w for s, w in trainer.passes if s == step]
        moved = [not torch.equal(w, weights[0]) for w in weights]
        clean = sum(loss for loss, perturbed in zip(losses, moved, strict=True) if not perturbed)
        perturbed = sum(loss for loss, perturbed in zip(losses, moved, strict=True) if perturbed)
        assert sum(moved) == accumulation
        assert entry["loss"] == pytest.approx(clean, rel=1e-6)
        assert entry["sam_perturbed_loss"] == pytest.approx(perturbed, rel=1e-6)
        assert entry["sam_sharpness"] == pytest.approx(perturbed - clean, rel=1e-4, abs=1e-6)
        assert entry["sam_rho"] == pytest.approx(0.3)
        assert entry["sam_perturbation_norm"] == pytest.approx(0.3, rel=1e-6)
        distances = [(w - weights[0]).norm().item() for w in weights if not torch.equal(w, weights[0])]
        assert distances == pytest.approx([0.3] * accumulation, rel=1e-6)
        assert 0 < entry["sam_cosine"] <= 1


def test_gradient_norms_and_their_cosine_by_hand(tmp_path):
    data = tiny.vectors(4, dtype=torch.float64)
    sam = SAMConfig(rho=0.7)
    trainer = tiny.trained(tiny.mlp(torch.float64), data, tmp_path, sam, max_steps=1, max_grad_norm=0.0)
    entry = trainer.state.log_history[0]

    def gradient(model):
        batch = {"x": torch.stack([row["x"] for row in data]), "labels": torch.tensor([row["labels"] for row in data])}
        loss = model(**batch)["loss"]
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

    model = tiny.mlp(torch.float64)
    g = gradient(model)
    torch.nn.utils.vector_to_parameters(tiny.flat(model) + 0.7 * g / g.norm(), model.parameters())
    g_s = gradient(model)
    assert entry["sam_ascent_grad_norm"] == pytest.approx(g.norm().item(), rel=1e-6)
    assert entry["grad_norm"] == pytest.approx(g_s.norm().item(), rel=1e-6)
    assert entry["sam_cosine"] == pytest.approx((g @ g_s / g.norm() / g_s.norm()).item(), rel=1e-6)


@pytest.mark.parametrize("logging_steps", [2, 3])
def test_entries_over_several_steps_are_means(logging_steps, tmp_path):
    options = {"max_steps": 6}
    each = tiny.trained(tiny.mlp(), tiny.vectors(), tmp_path, SAMConfig(rho=0.3), logging_steps=1, **options)
    means = tiny.trained(
        tiny.mlp(), tiny.vectors(), tmp_path, SAMConfig(rho=0.3), logging_steps=logging_steps, **options
    )
    for key in ("loss", "sam_perturbed_loss", "sam_sharpness", "sam_ascent_grad_norm"):
        values = tiny.logged(each, key)
        expected = [sum(values[i : i + logging_steps]) / logging_steps for i in range(0, 6, logging_steps)]
        assert tiny.logged(means, key) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert tiny.logged(means, "sam_perturbation_norm") == pytest.approx([0.3] * (6 // logging_steps), rel=1e-5)


@pytest.mark.parametrize(
    ("config", "passes"),
    [
        ({}, 2.0),
        ({"ascent_steps": 3}, 4.0),
        ({"interval": 2}, 1.5),
        ({"start": 0.5}, 1.5),
        ({"scope": "micro", "m": 2}, 2.0),
        ({"ascent_fraction": 0.5}, 1.5),
    ],
)
def test_passes_and_floating_point_operations(config, passes, tmp_path):
    options = {"max_steps": 8, "per_device_train_batch_size": 4}
    ours = tiny.trained(tiny.bert(), tiny.sentences(), tmp_path, SAMConfig(**config), **options)
    stock = tiny.trained(tiny.bert(), tiny.sentences(), tmp_path, None, **options)
    assert ours.state.total_flos == pytest.approx(passes * stock.state.total_flos)
    final = ours.state.log_history[-1]
    assert final["sam_passes"] == pytest.approx(passes, abs=0.15)  # the first step warms up and is not counted
    assert final["sam_cost"] > 1


def test_a_phase_without_perturbation_logs_no_perturbation(tmp_path):
    trainer = tiny.trained(tiny.mlp(), tiny.vectors(), tmp_path, SAMConfig(start=2, end=4), max_steps=6)
    with_keys = [entry["step"] for entry in trainer.state.log_history if "sam_perturbation_norm" in entry]
    assert with_keys == [3, 4]
    assert len(tiny.logged(trainer, "loss")) == 6


@pytest.mark.parametrize("schedule", ["linear", "cosine", "lr"])
def test_the_scheduled_rho_is_the_one_realised(schedule, tmp_path):
    options = {"max_steps": 6, "lr_scheduler_type": "linear"}
    sam = SAMConfig(rho=0.4, rho_min=0.1, rho_schedule=schedule)
    trainer = tiny.trained(tiny.mlp(), tiny.vectors(), tmp_path, sam, **options)
    rhos = tiny.logged(trainer, "sam_rho")
    assert tiny.logged(trainer, "sam_perturbation_norm") == pytest.approx(rhos, rel=1e-5)
    assert min(rhos) >= 0.1 - 1e-6
    assert max(rhos) <= 0.4 + 1e-6
    assert len(set(rhos)) > 3


def test_weights_in_sixteen_bits_show_what_rounding_left_and_warn(tmp_path, caplog):
    logging.warning_once.cache_clear()  # given once in a process, and perhaps by another test
    logging.enable_propagation()
    try:
        model, data = tiny.mlp(torch.bfloat16), tiny.vectors(dtype=torch.bfloat16)
        trainer = tiny.trained(model, data, tmp_path, SAMConfig(rho=1e-3))
    finally:
        logging.disable_propagation()
    realised = tiny.logged(trainer, "sam_perturbation_norm")
    expected = [
        (perturbed - clean).float().norm().item()
        for (_, clean), (_, perturbed) in zip(trainer.passes[::2], trainer.passes[1::2], strict=True)
    ]
    assert realised == pytest.approx(expected, rel=1e-3)
    assert all(abs(value / 1e-3 - 1) > 0.1 for value in realised)
    assert any("bfloat16" in record.message and "stochastic_rounding" in record.message for record in caplog.records)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_receives_every_key(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = {"report_to": ["tensorboard"]}
    trainer = tiny.trained(tiny.mlp(), tiny.vectors(), tmp_path, SAMConfig(rho=0.3), **options)
    (folder,) = {path.parent for path in tmp_path.rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(folder)).Reload()
    for key in EVERY_STEP:
        written = [event.value for event in events.Scalars(f"train/{key}")]
        assert written == pytest.approx(tiny.logged(trainer, key), rel=1e-6)
    assert events.Scalars("train/sam_passes")


def test_evaluation_logs_nothing_of_the_update(tmp_path):
    extra = {"eval_dataset": tiny.vectors(8)}
    options = {"eval_strategy": "steps", "eval_steps": 1, "logging_steps": 2, "max_steps": 4}
    trainer = tiny.trained(tiny.mlp(), tiny.vectors(), tmp_path, SAMConfig(), extra=extra, **options)
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluations) == 4
    assert not [key for entry in evaluations for key in entry if key.startswith("sam_")]
    assert len(tiny.logged(trainer, "sam_sharpness")) == 2
