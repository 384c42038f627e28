import random
from types import SimpleNamespace

import pytest
import torch
from torch.optim import lr_scheduler
from transformers import get_scheduler

from hf_sam import SAMConfig
from hf_sam.update.schedule import Schedule, lr_fraction, peak_lr


def perturbed_steps(config, max_steps, warmup_steps=0):
    schedule = Schedule.resolve(config, max_steps, warmup_steps)
    return [step for step in range(max_steps) if schedule.perturbs(step)]


def test_every_step_by_default():
    assert perturbed_steps(SAMConfig(), 4) == [0, 1, 2, 3]


def test_fractions_resolve_against_the_run_and_steps_do_not():
    assert perturbed_steps(SAMConfig(start=0.5), 8) == [4, 5, 6, 7]
    assert perturbed_steps(SAMConfig(end=0.25), 8) == [0, 1]
    assert perturbed_steps(SAMConfig(start=2, end=5), 8) == [2, 3, 4]
    assert perturbed_steps(SAMConfig(method="late"), 8) == [6, 7]


def test_interval_counts_from_the_start():
    assert perturbed_steps(SAMConfig(start=1, interval=3), 8) == [1, 4, 7]


def test_momentum_waits_for_warm_up():
    assert perturbed_steps(SAMConfig(method="msam"), 4, warmup_steps=2) == [2, 3]
    assert perturbed_steps(SAMConfig(), 4, warmup_steps=2) == [0, 1, 2, 3]


@pytest.mark.parametrize("config", [SAMConfig(start=8), SAMConfig(start=0.99), SAMConfig(start=6, end=0.5)])
def test_a_phase_that_cannot_start_is_an_error(config):
    with pytest.raises(ValueError, match=r"start=.* and end=.* leave no step to perturb in a run of 8 steps"):
        Schedule.resolve(config, 8)


def test_ramps_go_from_rho_min_to_rho():
    for name, middle in (("linear", 0.06), ("cosine", 0.06)):
        schedule = Schedule.resolve(SAMConfig(rho=0.1, rho_min=0.02, rho_schedule=name), 11)
        assert schedule.rho(0) == pytest.approx(0.02)
        assert schedule.rho(5) == pytest.approx(middle)
        assert schedule.rho(10) == pytest.approx(0.1)
    cosine = Schedule.resolve(SAMConfig(rho=0.1, rho_schedule="cosine"), 11)
    assert cosine.rho(2) < 0.02 < cosine.rho(3)  # slower than linear at first


@pytest.mark.parametrize("lr_fraction", [0.0, 0.3, 1.0, 1.7, -0.1])
def test_rho_that_follows_the_learning_rate_never_leaves_its_range(lr_fraction):
    schedule = Schedule.resolve(SAMConfig(method="gsam"), 10)
    rho = schedule.rho(3, lr_fraction)
    assert 0.1 <= rho <= 0.6
    if 0 <= lr_fraction <= 1:
        assert rho == pytest.approx(0.1 + 0.5 * lr_fraction)


def test_rho_follows_the_trainers_own_learning_rate(tmp_path):
    from models import train

    config = SAMConfig(method="gsam", rho=0.5, rho_min=0.1)
    trainer = train(tmp_path, config, max_steps=6, warmup_steps=2, lr_scheduler_type="linear")
    entries = trainer.state.log_history[:6]
    # the Trainer logs the learning rate that the step used
    for entry in entries:
        assert entry["sam_rho"] == pytest.approx(0.1 + 0.4 * entry["learning_rate"] / 0.1, rel=1e-5)


# --- which step is the next -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_the_next_perturbed_step_is_the_first_one_that_perturbs(seed):
    dice = random.Random(seed)
    max_steps = dice.randint(1, 30)
    start = dice.choice([dice.randrange(max_steps), dice.random() * 0.9])
    end = dice.choice([1.0, 2 * max_steps, max_steps + 3, dice.randint(1, max_steps)])
    config = SAMConfig(
        method=dice.choice(["sam", "carried", "looksam", "periodic", "random"]),
        interval=dice.randint(1, 5),
        start=start,
        end=end if type(end) is not type(start) or end > start else 1.0,
        rho=dice.choice([0.1, 0.1, 0.1, 0.0]),
    )
    try:
        schedule = Schedule.resolve(config, max_steps)
    except ValueError:
        return  # no step of this run would perturb
    steps = [step for step in range(3 * max_steps + 10) if schedule.perturbs(step)]
    for step in range(max_steps + 10):
        assert schedule.next_perturbed(step) == next((s for s in steps if s >= step), None)
    assert all(schedule.is_inside(step) for step in steps)
    assert bool(steps) == (config.rho > 0)


# --- the peak of the learning rate ----------------------------------------------------------------------------------


def optimizer_at(*rates, **defaults):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates]
    return torch.optim.SGD(groups, **{"lr": 0.1, **defaults})


def highest_fraction(optimizer, scheduler, peak, steps):
    """The largest share of `peak` that a run of so many steps reaches."""
    fractions = []
    for _ in range(steps):
        fractions.append(lr_fraction(optimizer, peak))
        optimizer.step()
        scheduler.step()
    return max(fractions)


SCHEDULERS = {
    "constant": lambda o: lr_scheduler.ConstantLR(o, 1.0),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.7, total_steps=40),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, base_lr=0.1, max_lr=0.7, step_size_up=10),
    "LambdaLR above 1": lambda o: lr_scheduler.LambdaLR(o, lambda step: 3 - abs(step - 20) / 10),
    "LambdaLR below 1": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.5 * step / 39),
    "decay": lambda o: lr_scheduler.StepLR(o, step_size=10, gamma=0.1),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=40),
}


@pytest.mark.parametrize("is_wrapped", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_peak_is_the_highest_rate_of_the_run(name, is_wrapped):
    optimizer = optimizer_at(0.1, 0.05)
    scheduler = SCHEDULERS[name](optimizer)
    peak = peak_lr(optimizer, SimpleNamespace(scheduler=scheduler) if is_wrapped else scheduler, 40)
    assert highest_fraction(optimizer, scheduler, peak, 40) == pytest.approx(1.0)


def test_the_peak_of_warmup_is_the_rate_that_follows_it():
    optimizer = optimizer_at(0.1)
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=5, num_training_steps=20)
    assert lr_fraction(optimizer, 1.0) == 0
    assert peak_lr(optimizer, scheduler, 20) == pytest.approx(0.1)


def test_the_peak_of_a_long_run_is_found_with_few_looks():
    looks = []

    def factor(step):
        looks.append(step)
        return min(1.0, step / 5000)

    optimizer = optimizer_at(0.1)
    scheduler = lr_scheduler.LambdaLR(optimizer, factor)
    looks.clear()
    assert peak_lr(optimizer, scheduler, 1_000_000) == pytest.approx(0.1)
    assert len(looks) < 3000
    assert max(looks) == 999_999


def test_a_group_that_does_not_move_does_not_make_the_peak():
    optimizer = optimizer_at(0.0, 0.2)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    peak = peak_lr(optimizer, scheduler, 10)
    assert peak == pytest.approx(0.2)
    assert lr_fraction(optimizer, peak) == pytest.approx(1.0)


def test_rates_that_are_all_zero_are_a_fraction_of_zero():
    optimizer = optimizer_at(0.0, lr=0.0)
    peak = peak_lr(optimizer, None, 10)
    assert peak == 0
    assert lr_fraction(optimizer, peak) == 0


def test_without_a_schedule_the_peak_is_the_rate_that_the_optimizer_was_made_with():
    optimizer = optimizer_at(0.1, lr=0.1)
    assert "initial_lr" not in optimizer.param_groups[0]
    assert peak_lr(optimizer, None, 10) == pytest.approx(0.1)
    optimizer.param_groups[0]["lr"] = 0.05  # of a schedule that a user's own callback follows
    assert peak_lr(optimizer, None, 10) == pytest.approx(0.1)
    optimizer.defaults.pop("lr")
    assert peak_lr(optimizer, None, 10) == pytest.approx(0.05)


def test_rates_that_are_tensors_are_read():
    optimizer = optimizer_at(0.1)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: 2.0)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    peak = peak_lr(optimizer, scheduler, 4)
    assert peak == pytest.approx(0.2)
    assert lr_fraction(optimizer, peak) == pytest.approx(0.5)
