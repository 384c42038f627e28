"""A step that float16 loses to an overflow changes nothing that a method carries from one step to the next."""

from __future__ import annotations

import copy

import pytest
import torch
from integration import tiny

from hf_sam import METHODS, SAMConfig

LR = 0.05
BATCH = 4
# Of a state that is kept too long, decayed once more or replaced, all show at this rho.
STATEFUL = {
    "friendly": {"method": "friendly", "rho": 0.3, "sigma": 0.8, "ema_decay": 0.6},
    "looksam": {"method": "looksam", "rho": 0.3, "alpha": 0.7, "interval": 3},
    "carried": {"method": "carried", "rho": 0.3, "interval": 3, "ascent_fraction": 1.0, "alpha": 1.0},
    "previous": {"method": "previous", "rho": 0.3},
}
STATELESS = {
    "sam": {"rho": 0.3},
    "gsam": {"method": "gsam", "rho": 0.3},
    "wsam": {"method": "wsam", "rho": 0.3},
    "asam": {"method": "asam"},
    "esam": {"method": "esam", "rho": 0.3},
    "functional": {"method": "functional", "rho": 0.3},
    "msam": {"method": "msam", "rho": 0.3},
    "ascent_steps": {"rho": 0.3, "ascent_steps": 2},
    "second_order": {"rho": 0.3, "second_order": True},
}


class Overflowing(tiny.WatchedSAMTrainer):
    """Loses chosen passes of one optimizer step.

    Attributes:
        at (`int`): The step.
        passes_lost (`Container[int]`): Which of its passes, from 0; None for all.
        kind (`str`): `"inf"` or `"nan"` losses, or `"one tensor"`, whose gradient alone is infinite.
    """

    at, passes_lost, kind = -1, None, "inf"
    hooks: list = []  # noqa: RUF012 - of the class: what a second pass leaves on the trainer is taken back

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        while self.hooks:
            self.hooks.pop().remove()
        position = sum(step == self.at for step, _ in self.passes) - 1
        lost = self.passes_lost is None or position in self.passes_lost
        if self.state.global_step != self.at or not lost or not torch.is_grad_enabled():
            return loss
        if self.kind == "one tensor":
            weight = self.model.last.weight
            if weight.requires_grad:
                self.hooks.append(weight.register_hook(lambda gradient: torch.full_like(gradient, torch.inf)))
            return loss
        return loss * float(self.kind)


def scaled_run(folder, sam, data, *, steps, accumulation=1, at=-1, passes_lost=None, kind="inf"):
    tiny.set_seed(2)
    trainer = Overflowing(
        model=tiny.mlp(),
        args=tiny.arguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=accumulation,
            learning_rate=LR,
            optim="adamw_torch" if sam.get("method") == "precond" else "sgd",
            optim_args="momentum=0.9" if sam.get("method") == "msam" else None,
            max_grad_norm=0.0,
        ),
        train_dataset=data,
        sam_config=SAMConfig(**sam),
    )
    trainer.at, trainer.passes_lost, trainer.kind = at, passes_lost, kind
    # As fp16=True sets it up on a GPU: the loss is scaled, and gradients are unscaled before the step.
    accelerator = trainer.accelerator
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    accelerator.unscale_gradients = lambda: accelerator.scaler.unscale_(trainer.optimizer.optimizer)
    trainer.train()
    return trainer


def without_step(data, step, accumulation=1):
    size = BATCH * accumulation
    return data[: step * size] + data[(step + 1) * size :]


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def assert_finite(trainer):
    assert all(torch.isfinite(weights).all() for weights in trainer.trajectory)
    assert all(torch.isfinite(weights).all() for _, weights in trainer.passes)


def passes_of(trainer, step):
    return sum(at == step for at, _ in trainer.passes)


# --- a lost step is as if it had not been -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["inf", "nan", "one tensor"])
@pytest.mark.parametrize("passes_lost", [None, (1,)], ids=["every pass", "second pass"])
@pytest.mark.parametrize(("scope", "accumulation"), [("device", 1), ("device", 2), ("micro", 1), ("micro", 2)])
def test_friendlys_average_is_as_it_was(scope, accumulation, passes_lost, kind, tmp_path):
    """The second pass of a step, counted over its micro-batches, is a perturbed one wherever only that is lost."""
    sam, data = {**STATEFUL["friendly"], "scope": scope}, tiny.vectors(64)
    if passes_lost is not None:
        passes_lost = (2 * accumulation - 1,)  # the last one of the step is a perturbed one in every scope
    run = {"steps": 5, "accumulation": accumulation, "at": 2, "passes_lost": passes_lost, "kind": kind}
    lost = scaled_run(tmp_path, sam, data, **run)
    rest = scaled_run(tmp_path, sam, without_step(data, 2, accumulation), steps=4, accumulation=accumulation)
    assert_finite(lost)
    assert torch.equal(lost.trajectory[2], lost.trajectory[1])
    assert_close(torch.stack(lost.trajectory[3:]), torch.stack(rest.trajectory[2:]))


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("kind", ["inf", "nan", "one tensor"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_previous_gradient_is_as_it_was(accumulation, kind, at, tmp_path):
    sam, data = STATEFUL["previous"], tiny.vectors(64)
    lost = scaled_run(tmp_path, sam, data, steps=5, accumulation=accumulation, at=at, kind=kind)
    rest = scaled_run(tmp_path, sam, without_step(data, at, accumulation), steps=4, accumulation=accumulation)
    assert_finite(lost)
    assert_close(torch.stack(lost.trajectory[at + 1 :]), torch.stack(rest.trajectory[at:]))


@pytest.mark.parametrize("kind", ["inf", "nan", "one tensor"])
@pytest.mark.parametrize("method", ["looksam", "carried"])
def test_a_direction_outlives_a_lost_step_between(method, kind, tmp_path):
    """Step 1 of the interval is lost, step 2 goes along what step 0 has found."""
    sam, data = {**STATEFUL[method], "interval": 4}, tiny.vectors(64)
    lost = scaled_run(tmp_path, sam, data, steps=4, at=1, kind=kind)
    rest = scaled_run(tmp_path, sam, without_step(data, 1), steps=3)
    assert_finite(lost)
    assert passes_of(lost, 2) == passes_of(rest, 1) == 1
    assert_close(torch.stack(lost.trajectory[2:]), torch.stack(rest.trajectory[1:]))


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("kind", ["inf", "nan", "one tensor"])
@pytest.mark.parametrize("passes_lost", [None, (1,)], ids=["every pass", "second pass"])
@pytest.mark.parametrize("method", ["looksam", "carried"])
def test_after_a_lost_step_with_two_passes_the_next_one_has_two(method, passes_lost, kind, at, tmp_path):
    sam, data = STATEFUL[method], tiny.vectors(64)
    lost = scaled_run(tmp_path, sam, data, steps=at + 3, at=at, passes_lost=passes_lost, kind=kind)
    rest = scaled_run(tmp_path, sam, without_step(data, at), steps=at + 2)
    assert_finite(lost)
    assert passes_of(lost, at) == 2
    assert passes_of(lost, at + 1) == 2
    assert_close(lost.trajectory[at + 1], rest.trajectory[at])  # the same two passes on the same examples
    if method == "looksam":
        assert passes_of(lost, at + 2) == 1  # and what they have found is used
        assert_close(lost.trajectory[at + 2], rest.trajectory[at + 1])


# --- an overflow in the clean pass only ----------------------------------------------------------------------------


def model_at(weights):
    model = tiny.mlp()
    torch.nn.utils.vector_to_parameters(weights, model.parameters())
    return model


def gradient(weights, data, step):
    """Of the batch of `step`, as one vector."""
    model, rows = model_at(weights), data[step * BATCH : (step + 1) * BATCH]
    x, labels = torch.stack([row["x"] for row in rows]), torch.tensor([row["labels"] for row in rows])
    gradients = torch.autograd.grad(model(x, labels)["loss"], list(model.parameters()))
    return torch.cat([g.flatten() for g in gradients])


def sam_gradient(weights, data, step, rho, direction=None):
    direction = gradient(weights, data, step) if direction is None else direction
    return gradient(weights + rho * direction / direction.norm(), data, step)


def friendly_by_hand(data, steps, lost, was_skipped):
    """At a lost step the average stays, and the step is either none or one without a perturbation."""
    sam, w = STATEFUL["friendly"], tiny.flat(tiny.mlp())
    average, trajectory = torch.zeros_like(w), []
    for step in range(steps):
        g = gradient(w, data, step)
        if step == lost:
            w = w if was_skipped else w - LR * g
        else:
            w = w - LR * sam_gradient(w, data, step, sam["rho"], g - sam["sigma"] * average)
            average = sam["ema_decay"] * average + (1 - sam["ema_decay"]) * g
        trajectory.append(w)
    return torch.stack(trajectory)


@pytest.mark.parametrize("kind", ["inf", "nan", "one tensor"])
@pytest.mark.parametrize("at", [0, 2])
def test_a_lost_clean_pass_leaves_friendlys_average(at, kind, tmp_path):
    data = tiny.vectors(64)
    run = {"steps": 5, "at": at, "passes_lost": (0,), "kind": kind}
    lost = scaled_run(tmp_path, {**STATEFUL["friendly"], "scope": "device"}, data, **run)
    before = lost.trajectory[at - 1] if at else tiny.flat(tiny.mlp())
    expected = friendly_by_hand(data, 5, at, was_skipped=torch.equal(lost.trajectory[at], before))
    assert_finite(lost)
    assert_close(torch.stack(lost.trajectory), expected)


def test_friendly_by_hand_is_friendly(tmp_path):
    """The reference of the test above, on a run that loses nothing."""
    data = tiny.vectors(64)
    whole = scaled_run(tmp_path, {**STATEFUL["friendly"], "scope": "device"}, data, steps=4)
    assert_close(torch.stack(whole.trajectory), friendly_by_hand(data, 4, -1, was_skipped=False))


@pytest.mark.parametrize("kind", ["inf", "nan", "one tensor"])
@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("method", ["looksam", "carried"])
def test_after_a_lost_clean_pass_the_next_step_has_two_passes(method, at, kind, tmp_path):
    sam, data = STATEFUL[method], tiny.vectors(64)
    lost = scaled_run(tmp_path, sam, data, steps=at + 3, at=at, passes_lost=(0,), kind=kind)
    assert_finite(lost)
    assert passes_of(lost, at + 1) == 2
    w = lost.trajectory[at]
    g, g_s = gradient(w, data, at + 1), sam_gradient(w, data, at + 1, sam["rho"])
    assert_close(lost.trajectory[at + 1], w - LR * g_s)
    w = lost.trajectory[at + 1]
    if method == "looksam":
        kept, plain = g_s - (g_s @ g) / (g @ g) * g, gradient(w, data, at + 2)
        expected = w - LR * (plain + sam["alpha"] * plain.norm() / kept.norm() * kept)
    else:
        expected = w - LR * sam_gradient(w, data, at + 2, sam["rho"], g)
    assert_close(lost.trajectory[at + 2], expected)


# --- methods without a state ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["inf", "nan", "one tensor"])
@pytest.mark.parametrize("name", STATELESS)
def test_nothing_else_remembers_a_lost_step(name, kind, tmp_path):
    sam, data = STATELESS[name], tiny.vectors(64)
    lost = scaled_run(tmp_path, sam, data, steps=4, at=2, kind=kind)
    rest = scaled_run(tmp_path, sam, without_step(data, 2), steps=3)
    assert_finite(lost)
    assert torch.equal(lost.trajectory[2], lost.trajectory[1])
    if name != "esam":  # which draws for each step anew
        assert_close(lost.trajectory[3], rest.trajectory[2])


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("bilora", "flat-lora")])
def test_weights_are_finite_after_an_overflow_in_any_pass(method, position, tmp_path):
    sam = copy.deepcopy({**STATELESS, **STATEFUL}.get(method, {"method": method, "rho": 0.3}))
    sam |= {"options": {"tail_classes": [1]}} if method == "imbsam" else {}
    lost = scaled_run(tmp_path, sam, tiny.vectors(64), steps=6, at=3, passes_lost=(position,))
    assert_finite(lost)
    assert not torch.equal(lost.trajectory[5], lost.trajectory[4])


@pytest.mark.parametrize("method", ["msam", "precond"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_method_that_reads_the_optimizers_state_survives_an_overflow_in_the_first_step(
    method, accumulation, tmp_path
):
    """As is usual in fp16, whose scale begins too large: the optimizer has no state yet in the second step."""
    data = tiny.vectors(4 * BATCH * accumulation)
    sam = {"method": method, "rho": 0.1}
    ours = scaled_run(tmp_path, sam, data, steps=4, accumulation=accumulation, at=0)
    assert torch.equal(ours.trajectory[0], ours.passes[0][1])  # the step is lost
    expected = scaled_run(tmp_path, sam, without_step(data, 0, accumulation), steps=3, accumulation=accumulation)
    assert_close(ours.trajectory[1:], expected.trajectory)
