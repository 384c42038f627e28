"""Losses that are compared or logged are of the same examples: at a vanishing rho there is no difference to see."""

from __future__ import annotations

import math

import pytest
import torch
from integration import tiny

from hf_sam import METHODS, Needs, SAMConfig
from hf_sam.methods.base import needs_of

# PEFT still reads the name that transformers has given up.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
RHO = 1e-30
VARIANTS = {
    **{name: {"method": name} for name in METHODS},
    "imbsam": {"method": "imbsam", "options": {"tail_classes": [1]}},
    "subset, a half": {"method": "subset", "ascent_fraction": 0.5},
    "sam on a part": {"ascent_fraction": 0.3},
    "gamma": {"method": "esam", "gamma": 0.75, "beta": 1.0},
    "asam on a part": {"method": "asam", "ascent_fraction": 0.5},
    "carried every step": {"method": "carried", "interval": 1},
    "m": {"m": 2},
    "esam with m": {"method": "esam", "m": 2},
}


# Rows that need an adapter.
ADAPTED = {name for name, row in METHODS.items() if needs_of(row.ascent, row.descent) & Needs.ATTACHMENT}


def run(sam, folder, dropout=0.0, accumulation=1, dtype=torch.float64):
    """Train under these fields of `SAMConfig`, or with the stock Trainer where there are none."""
    method = (sam or {}).get("method")
    config = None if sam is None else SAMConfig(**{"rho": RHO, **sam})
    options = {"max_steps": 6, "gradient_accumulation_steps": accumulation, "optim": "sgd"}
    if method == "msam":
        options["optim_args"] = "momentum=0.9"
    if method == "precond":
        options["optim"] = "adamw_torch"
    if method in ADAPTED:
        model, data = tiny.with_lora(tiny.bert(dropout=dropout), ["query", "value"]), tiny.sentences()
    else:
        model, data = tiny.mlp(dtype, dropout=dropout), tiny.vectors(64, dtype)
    return tiny.trained(model, data, folder, config, **options)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", VARIANTS)
def test_no_sharpness_is_seen_where_nothing_was_perturbed(name, accumulation, dropout, tmp_path):
    trainer = run(VARIANTS[name], tmp_path, dropout, accumulation)
    assert tiny.logged(trainer, "sam_rho")
    for value in tiny.logged(trainer, "sam_sharpness"):
        assert abs(value) < 1e-6


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", [name for name in VARIANTS if VARIANTS[name].get("method") not in ADAPTED])
def test_the_logged_loss_is_that_of_the_whole_batch(name, accumulation, tmp_path):
    """That of the examples that the stock Trainer would have logged."""
    ours = run(VARIANTS[name], tmp_path, accumulation=accumulation)
    reference = ours.trajectory  # ESAM and LookSAM step along something else even then
    assert len(reference) == 6
    stock = losses_along(reference, accumulation)
    assert tiny.logged(ours, "loss") == pytest.approx(stock, rel=1e-6)


def losses_along(trajectory, accumulation):
    """The loss of the whole batch of each step, at the weights that the step began from."""
    data, size, model = tiny.vectors(64, torch.float64), 4 * accumulation, tiny.mlp(torch.float64)
    found = []
    for step in range(len(trajectory)):
        rows = [data[i % len(data)] for i in range(step * size, (step + 1) * size)]
        x, labels = torch.stack([row["x"] for row in rows]), torch.tensor([row["labels"] for row in rows])
        with torch.no_grad():
            found.append(model(x, labels)["loss"].item())
        torch.nn.utils.vector_to_parameters(trajectory[step], model.parameters())
    return found


@pytest.mark.parametrize("name", ["subset", "subset, a half", "sam on a part", "asam on a part"])
def test_a_vanishing_rho_logs_the_stock_trainers_losses(name, tmp_path):
    ours, stock = run(VARIANTS[name], tmp_path), run(None, tmp_path)
    assert tiny.logged(ours, "loss") == pytest.approx(tiny.logged(stock, "loss"), rel=1e-9)
    assert ours.state.log_history[-1]["train_loss"] == pytest.approx(
        stock.state.log_history[-1]["train_loss"], rel=1e-9
    )


def test_a_large_rho_shows_sharpness_on_the_whole_batch(tmp_path):
    """Where a sharpness is logged for a pass on a part, it is a finite number, and not always that of rho = 0."""
    trainer = run({**VARIANTS["subset"], "rho": 0.5}, tmp_path)
    assert all(math.isfinite(value) for value in tiny.logged(trainer, "sam_sharpness"))
    assert all(math.isfinite(value) for value in tiny.logged(trainer, "loss"))
