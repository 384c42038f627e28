"""`rho_schedule="lr"`: rho = rho_min + (rho - rho_min) * lr / peak lr, under schedulers that do not start at their peak."""

from __future__ import annotations

import pytest
import torch
from integration import equivalence, tiny
from torch.optim import lr_scheduler
from transformers import TrainerCallback

from hf_sam import SAMConfig

STEPS = 6
RHO, RHO_MIN = 0.5, 0.1


class NoteRate(TrainerCallback):
    """The learning rates with which the optimizer steps."""

    def __init__(self):
        self.rates: list[list[float]] = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append([float(group["lr"]) for group in optimizer.param_groups])


class Falling:
    """A scheduler of the user's own that knows nothing of `initial_lr`."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self):
        for group in self.optimizer.param_groups:
            group["lr"] *= 0.7

    def get_last_lr(self):
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self):
        return {}

    def load_state_dict(self, state): ...


def one_group(model, lr=0.1, **options):
    return torch.optim.SGD(model.parameters(), lr=lr, **options)


def two_groups(model, first, second):
    parameters = list(model.parameters())
    return torch.optim.SGD([{"params": parameters[:2], "lr": first}, {"params": parameters[2:], "lr": second}])


def one_cycle(model):
    optimizer = one_group(model)
    return optimizer, lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=8, pct_start=0.5)


def one_cycle_with_momentum(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return optimizer, lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.02, total_steps=10, pct_start=0.3, anneal_strategy="linear", three_phase=True
    )


def cyclic(model):
    optimizer = one_group(model)
    return optimizer, lr_scheduler.CyclicLR(optimizer, base_lr=0.02, max_lr=0.2, step_size_up=2, cycle_momentum=False)


def factors(*values):
    def make(model):
        optimizer = one_group(model, lr=0.05)
        return optimizer, lr_scheduler.LambdaLR(optimizer, lambda step: values[min(step, len(values) - 1)])

    return make


def first_group_at_zero(model):
    optimizer = two_groups(model, 0.0, 0.1)
    return optimizer, lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 10)


def first_group_held_at_zero_by_its_factor(model):
    optimizer = two_groups(model, 0.1, 0.1)
    return optimizer, lr_scheduler.LambdaLR(optimizer, [lambda step: 0.0, lambda step: 0.9**step])


def no_initial_rate(model):
    optimizer = one_group(model)
    return optimizer, Falling(optimizer)


def rate_as_a_tensor(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.1), foreach=False)
    return optimizer, lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 10)


def warm_restarts(model):
    optimizer = one_group(model)
    return optimizer, lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=3, eta_min=0.01)


def sequential(model):
    optimizer = one_group(model)
    warm_up = lr_scheduler.LinearLR(optimizer, start_factor=0.25, total_iters=3)
    return optimizer, lr_scheduler.SequentialLR(
        optimizer, [warm_up, lr_scheduler.ExponentialLR(optimizer, 0.5)], milestones=[3]
    )


# Optimizer and scheduler, the group that tells, and the highest rate of that group in the whole run.
SCHEDULERS = {
    "OneCycleLR": (one_cycle, 0, 0.2),
    "OneCycleLR on Adam": (one_cycle_with_momentum, 0, 0.02),
    "CyclicLR": (cyclic, 0, 0.2),
    "a factor above 1": (factors(1.0, 2.0, 3.0, 2.0, 1.0, 0.5), 0, 0.15),
    "a factor always above 1": (factors(4.0, 3.0, 2.0), 0, 0.2),
    "first group at zero": (first_group_at_zero, 1, 0.1),
    "first group held at zero": (first_group_held_at_zero_by_its_factor, 1, 0.1),
    "no initial_lr": (no_initial_rate, 0, 0.1),
    "a tensor": (rate_as_a_tensor, 0, 0.1),
    "warm restarts": (warm_restarts, 0, 0.1),
    "one after the other": (sequential, 0, 0.1),
}


def run(make, folder, *, sam=None, accumulation=1, **args):
    noted = NoteRate()
    trainer = equivalence.trainer_for(
        SAMConfig(rho=RHO, rho_min=RHO_MIN, rho_schedule="lr", **(sam or {})),
        folder,
        extra=lambda model: {"optimizers": make(model)},
        callbacks=lambda: [noted],
        gradient_accumulation_steps=accumulation,
        **{"max_steps": STEPS, **args},
    )
    trainer.train(resume_from_checkpoint=args.get("resume_from_checkpoint"))
    return trainer, noted.rates


@pytest.mark.parametrize(("make", "group", "peak"), SCHEDULERS.values(), ids=SCHEDULERS)
@pytest.mark.parametrize("sam", [{}, {"method": "gsam"}, {"method": "random"}], ids=str)
def test_rho_follows_the_rate_relative_to_its_peak(make, group, peak, sam, tmp_path):
    trainer, rates = run(make, tmp_path, sam=sam)
    assert len({rate[group] for rate in rates}) > 2
    assert max(rate[group] for rate in rates) == pytest.approx(peak, rel=1e-6)
    expected = [RHO_MIN + (RHO - RHO_MIN) * rate[group] / peak for rate in rates]
    assert tiny.logged(trainer, "sam_rho") == pytest.approx(expected, rel=1e-5)
    assert tiny.logged(trainer, "sam_perturbation_norm") == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("scope", ["micro", "device"])
def test_rho_follows_the_rate_over_accumulated_steps(scope, tmp_path):
    trainer, rates = run(one_cycle, tmp_path, sam={"scope": scope}, accumulation=2)
    expected = [RHO_MIN + (RHO - RHO_MIN) * rate[0] / 0.2 for rate in rates]
    assert tiny.logged(trainer, "sam_rho") == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant_with_warmup", "polynomial"])
def test_the_trainers_own_schedulers(kind, tmp_path):
    noted = NoteRate()
    trainer = equivalence.trained(
        SAMConfig(rho=RHO, rho_min=RHO_MIN, rho_schedule="lr"),
        tmp_path,
        callbacks=lambda: [noted],
        max_steps=STEPS,
        lr_scheduler_type=kind,
        warmup_steps=2,
    )
    expected = [RHO_MIN + (RHO - RHO_MIN) * rate[0] / 1e-2 for rate in noted.rates]
    assert tiny.logged(trainer, "sam_rho") == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["OneCycleLR", "a factor above 1", "CyclicLR"])
def test_a_resumed_run_knows_the_peak(name, tmp_path):
    """The rate is past its peak where the run goes on."""
    make, group, peak = SCHEDULERS[name]
    whole, rates = run(make, tmp_path / "whole", save_strategy="steps", save_steps=4)
    resumed, _ = run(make, tmp_path / "resumed", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    expected = [RHO_MIN + (RHO - RHO_MIN) * rate[group] / peak for rate in rates]
    assert tiny.logged(resumed, "sam_rho") == pytest.approx(expected, rel=1e-5)
    assert torch.equal(tiny.flat(resumed.model), tiny.flat(whole.model))


def test_asking_for_the_peak_leaves_scheduler_and_optimizer_alone(tmp_path):
    """At a vanishing rho the rates, and with them the run, are the stock Trainer's."""
    for name in ("OneCycleLR", "CyclicLR", "a factor above 1", "OneCycleLR on Adam"):
        ours, stock = equivalence.both(
            tmp_path,
            sam={"rho_schedule": "lr", "rho_min": 0.0},
            extra=lambda model, make=SCHEDULERS[name][0]: {"optimizers": make(model)},
            max_steps=STEPS,
        )
        equivalence.assert_like_stock(ours, stock)
