"""The update on a device: the formula, the exact restore, both passes alike, the precisions, a compiled model."""

from __future__ import annotations

import oracles
import pytest
import torch
from gpu import on_device
from integration import tiny
from models import stack

from hf_sam import SAMConfig

RATE = 0.1
FORMULAS = {
    "sam": ({"rho": 0.2}, lambda loss, w: oracles.sam(loss, w, 0.2)),
    "p=inf": ({"rho": 0.02, "p": "inf"}, lambda loss, w: oracles.sam(loss, w, 0.02, float("inf"))),
    "asam": ({"method": "asam", "rho": 0.5}, lambda loss, w: oracles.asam(loss, w, 0.5, 0.01)),
    "gsam": (
        {"method": "gsam", "rho": 0.2, "alpha": 0.4, "rho_schedule": "constant"},
        lambda loss, w: oracles.gsam(loss, w, 0.2, 0.4),
    ),
    "second order": ({"rho": 0.2, "second_order": True}, lambda loss, w: oracles.second_order(loss, w, 0.2)),
}


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, {"rtol": 1e-9, "atol": 1e-11}), (torch.float32, {"rtol": 1e-5, "atol": 1e-6})],
    ids=["float64", "float32"],
)
@pytest.mark.parametrize("name", FORMULAS)
def test_one_step_is_the_formula_in_float64_on_the_cpu(device, name, dtype, tolerance, tmp_path):
    fields, formula = FORMULAS[name]
    options = {"max_steps": 1, "optim": "sgd", "learning_rate": RATE, "max_grad_norm": 0.0}
    model, data = tiny.mlp(dtype), tiny.vectors(dtype=dtype)
    ours = on_device.trained(device, tmp_path, SAMConfig(**fields), model=model, data=data, **options)
    rows = [{**row, "labels": torch.tensor(row["labels"])} for row in tiny.vectors(dtype=torch.float64)[:4]]
    loss = oracles.loss_function(tiny.mlp(torch.float64), stack(rows))
    w = tiny.flat(tiny.mlp(torch.float64))
    expected = w - RATE * formula(loss, w)
    torch.testing.assert_close(on_device.course(ours)[0].double(), expected, **tolerance)


# --- the second pass -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["micro", "device"])
def test_both_passes_draw_the_same_dropout_masks(device, scope, tmp_path):
    """A vanishing rho is then the stock Trainer's run, bitwise, and its second loss the first."""
    options = {"gradient_accumulation_steps": 2, "max_steps": 4}
    stock = on_device.trained(device, tmp_path, None, model=tiny.mlp(dropout=0.5), **options)
    sam = SAMConfig(rho=1e-30, scope=scope)
    ours = on_device.trained(device, tmp_path, sam, model=tiny.mlp(dropout=0.5), **options)
    assert torch.equal(on_device.course(ours), on_device.course(stock))
    assert tiny.logged(ours, "sam_sharpness") == [0.0] * 4
    fresh = SAMConfig(rho=1e-30, scope=scope, replay_rng=False)
    other = on_device.trained(device, tmp_path, fresh, model=tiny.mlp(dropout=0.5), **options)
    assert all(tiny.logged(other, "sam_sharpness")), "masks that are drawn anew show in the loss"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_weights_come_back_bitwise(device, dtype, tmp_path):
    """At a learning rate of 0 nothing but the perturbation moves them."""
    model, data = tiny.mlp(dtype), tiny.vectors(dtype=dtype)
    ours = on_device.trained(
        device, tmp_path, SAMConfig(rho=0.5), model=model, data=data, learning_rate=0.0, optim="sgd"
    )
    start = tiny.flat(tiny.mlp(dtype))
    assert all(torch.equal(point, start) for point in on_device.course(ours))
    assert all(not torch.equal(weights.cpu(), start) for _, weights in ours.passes[1::2])


class Interrupted(tiny.WatchedSAMTrainer):
    """The second pass of the second step raises."""

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        if len(self.passes) == 4:
            raise KeyboardInterrupt
        return loss


def test_weights_come_back_bitwise_when_the_second_pass_raises(device, tmp_path):
    args = on_device.arguments(device, tmp_path)
    trainer = Interrupted(tiny.mlp(), args, train_dataset=tiny.vectors(), sam_config=SAMConfig(rho=0.5))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert torch.equal(tiny.flat(trainer.model), trainer.trajectory[-1])
    assert not torch.equal(trainer.passes[-1][1], trainer.trajectory[-1])


# --- precisions ----------------------------------------------------------------------------------------------------


class Overflowing(tiny.WatchedSAMTrainer):
    """The loss of pass `overflows_at`, counted from 0, is too large for its scaled gradient."""

    overflows_at = -1

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return loss * 1e38 if len(self.passes) - 1 == self.overflows_at else loss


@pytest.mark.parametrize(("overflows_at", "skipped", "scale"), [(-1, [], 256), (2, [], 256), (3, [1], 128)])
def test_an_overflow_of_float16_in_either_pass(device, overflows_at, skipped, scale, tmp_path):
    """In the clean pass of step 1 it leaves the step unperturbed, in the other one it skips that step, once."""
    args = on_device.arguments(device, tmp_path, max_steps=4, fp16=device.type == "cuda")
    trainer = Overflowing(tiny.mlp(), args, train_dataset=tiny.vectors(), sam_config=SAMConfig(rho=0.3))
    trainer.overflows_at = overflows_at
    accelerator = trainer.accelerator
    accelerator.scaler = torch.amp.GradScaler(device.type, init_scale=256.0, growth_interval=1000)
    if device.type == "cpu":  # where fp16=True is refused; on a GPU it does this itself
        accelerator.unscale_gradients = lambda: accelerator.scaler.unscale_(trainer.optimizer.optimizer)
    trainer.train()
    points = [tiny.flat(tiny.mlp()), *on_device.course(trainer)]
    assert [i for i in range(4) if torch.equal(points[i + 1], points[i])] == skipped
    assert accelerator.scaler.get_scale() == scale
    assert all(torch.isfinite(weights).all() for _, weights in trainer.passes)
    at_step_1 = [weights for step, weights in trainer.passes if step == 1]
    assert torch.equal(*at_step_1) == (overflows_at == 2)


def test_autocast_to_bfloat16_perturbs_float32_weights_by_rho(device, tmp_path):
    ours = on_device.trained(device, tmp_path, SAMConfig(rho=0.05), bf16=True)
    assert tiny.logged(ours, "sam_perturbation_norm") == pytest.approx([0.05] * 3, rel=1e-4)
    vanishing = on_device.trained(device, tmp_path, SAMConfig(rho=1e-30), bf16=True)
    stock = on_device.trained(device, tmp_path, None, bf16=True)
    assert torch.equal(on_device.course(vanishing), on_device.course(stock))
    assert not torch.equal(on_device.course(ours), on_device.course(stock))


# --- compiled ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")  # which are left off on purpose
def test_a_compiled_model_takes_the_same_course(device, tmp_path):
    backend = "inductor" if device.type == "cuda" else "eager"
    compiled = {"torch_compile": True, "torch_compile_backend": backend}
    plain = on_device.trained(device, tmp_path, SAMConfig(rho=0.5), model=tiny.vit(), data=tiny.images())
    ours = on_device.trained(device, tmp_path, SAMConfig(rho=0.5), model=tiny.vit(), data=tiny.images(), **compiled)
    torch.testing.assert_close(on_device.course(ours), on_device.course(plain), rtol=1e-3, atol=1e-4)
