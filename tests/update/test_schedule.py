import pytest

from hf_sam import SAMConfig
from hf_sam.update.schedule import Schedule


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
