"""float16 with a gradient scaler, on the CPU: an overflow in either pass skips one step and leaves nothing behind."""

from __future__ import annotations

import pytest
import torch
from integration import tiny

from hf_sam import SAMConfig

SCOPES = ("micro", "device", "global")


class Overflowing:
    """Scales the loss of one pass, counted from 0, so that its scaled gradient leaves the range of float32."""

    overflows_at = -1

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs) * 4  # so that a scale of 2**127 is too large for several steps
        return loss * 1e38 if len(self.passes) - 1 == self.overflows_at else loss


class OverflowingSAMTrainer(Overflowing, tiny.WatchedSAMTrainer):
    pass


class OverflowingTrainer(Overflowing, tiny.WatchedTrainer):
    pass


def scaled(tmp_path, trainer_class, *, at: int = -1, scale: float = 2.0**16, accumulation: int = 1, **kwargs):
    tiny.set_seed(2)
    trainer = trainer_class(
        model=tiny.mlp(dropout=0.2),
        args=tiny.arguments(tmp_path, max_steps=5, gradient_accumulation_steps=accumulation, weight_decay=0.1),
        train_dataset=tiny.vectors(),
        **kwargs,
    )
    trainer.overflows_at = at
    # As fp16=True sets it up on a GPU: the loss is scaled, and gradients are unscaled before they are clipped.
    accelerator = trainer.accelerator
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
    accelerator.unscale_gradients = lambda: accelerator.scaler.unscale_(trainer.optimizer.optimizer)
    trainer.train()
    return trainer


def skipped(trainer) -> list[int]:
    before = [tiny.flat(tiny.mlp(dropout=0.2)), *trainer.trajectory[:-1]]
    return [i for i, pair in enumerate(zip(before, trainer.trajectory, strict=True)) if torch.equal(*pair)]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("scope", SCOPES)
def test_scaling_changes_nothing(scope, accumulation, tmp_path):
    sam = SAMConfig(rho=0.3, scope=scope)
    with_scaler = scaled(tmp_path, OverflowingSAMTrainer, sam_config=sam, accumulation=accumulation)
    without = scaled(tmp_path, OverflowingSAMTrainer, sam_config=sam, accumulation=accumulation, scale=1.0)
    assert torch.equal(torch.stack(with_scaler.trajectory), torch.stack(without.trajectory))  # by powers of two
    for key in ("loss", "sam_ascent_grad_norm", "sam_perturbation_norm", "sam_sharpness", "grad_norm"):
        assert tiny.logged(with_scaler, key) == pytest.approx(tiny.logged(without, key), rel=1e-6)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_vanishing_rho_is_the_stock_trainer_through_an_overflow(scope, tmp_path):
    """The scale is far too large: both trainers skip until it has been halved often enough."""
    ours = scaled(tmp_path, OverflowingSAMTrainer, sam_config=SAMConfig(rho=1e-30, scope=scope), scale=2.0**127)
    stock = scaled(tmp_path, OverflowingTrainer, scale=2.0**127)
    assert skipped(stock)
    assert skipped(ours) == skipped(stock)
    assert torch.equal(torch.stack(ours.trajectory), torch.stack(stock.trajectory))
    assert ours.accelerator.scaler.get_scale() == stock.accelerator.scaler.get_scale()


@pytest.mark.parametrize(
    "config", [{}, {"p": 1}, {"p": "inf"}, {"p": 3}, {"method": "asam"}, {"weight_decay_in_ascent": True}]
)
@pytest.mark.parametrize("scope", SCOPES)
def test_real_overflow_in_both_passes(scope, config, tmp_path):
    trainer = scaled(
        tmp_path, OverflowingSAMTrainer, sam_config=SAMConfig(**{"rho": 0.3, **config}, scope=scope), scale=2.0**127
    )
    lost = skipped(trainer)
    assert lost == list(range(len(lost)))
    assert 0 < len(lost) < 5
    assert trainer.accelerator.scaler.get_scale() == 2.0 ** (127 - len(lost))
    for step, weights in trainer.passes:
        assert torch.isfinite(weights).all()
        if step in lost:
            assert torch.equal(weights, tiny.flat(tiny.mlp(dropout=0.2)))  # no direction: eps is exactly 0


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("scope", SCOPES)
def test_overflow_in_one_pass(scope, accumulation, tmp_path):
    """In a clean pass the perturbation of that window is 0; in a perturbed one the step is skipped, once."""
    first = 2 * 2 * accumulation  # the first pass of step 2
    for position in range(2 * accumulation):
        trainer = scaled(
            tmp_path,
            OverflowingSAMTrainer,
            at=first + position,
            scale=2.0**20,
            accumulation=accumulation,
            sam_config=SAMConfig(rho=0.3, scope=scope),
        )
        is_clean = position % 2 == 0 if scope == "micro" else position < accumulation
        assert skipped(trainer) == ([] if is_clean else [2])
        assert trainer.accelerator.scaler.get_scale() == (2.0**20 if is_clean else 2.0**19)
        assert all(torch.isfinite(weights).all() for _, weights in trainer.passes)
        at_step = [weights for step, weights in trainer.passes if step == 2]
        unmoved = sum(torch.equal(weights, trainer.trajectory[1]) for weights in at_step)
        if is_clean:
            lost = 1 if scope == "micro" else accumulation
            assert unmoved == accumulation + lost
        else:
            assert unmoved == accumulation


@pytest.mark.parametrize("scope", SCOPES)
def test_a_loss_that_is_not_a_number_without_a_scaler(scope, tmp_path):
    """As with the stock Trainer the step is poisoned by g_s, but eps is 0 and the restored weights were finite."""

    class Poisoned(tiny.WatchedSAMTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss * float("nan") if len(self.passes) == 1 else loss

    args = tiny.arguments(tmp_path)
    sam = SAMConfig(rho=0.3, scope=scope)
    trainer = Poisoned(model=tiny.mlp(), args=args, train_dataset=tiny.vectors(), sam_config=sam)
    trainer.train()
    assert torch.equal(trainer.passes[1][1], trainer.passes[0][1])  # eps is exactly 0
    assert all(torch.isfinite(weights).all() for _, weights in trainer.passes)
