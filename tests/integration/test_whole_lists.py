"""The path that an accelerator takes, on the CPU: weights moved in place, and everything beside the passes on whole lists."""

from __future__ import annotations

import pytest
import torch
from integration import equivalence, tiny
from torch import nn

from hf_sam import SAMConfig
from hf_sam.methods import METHODS
from hf_sam.testing import kit
from hf_sam.update import buckets, step

# Of every row, one configuration that perturbs within a few steps.
ROWS = {name: {} for name in METHODS} | {
    "looksam": {"interval": 2},
    "periodic": {"interval": 2},
    "carried": {"interval": 2},
    "late": {"start": 1},
    "imbsam": {"options": {"tail_classes": [0, 1]}},
}


@pytest.fixture(autouse=True, params=["one bucket", "many buckets"])
def whole_lists(request, monkeypatch):
    monkeypatch.setattr(step, "IN_BUCKETS", True)
    if request.param == "many buckets":
        monkeypatch.setattr(buckets, "BUCKET_BYTES", 256)


def config(method: str, **fields) -> SAMConfig:
    return SAMConfig(method=method, **{**ROWS[method], **fields})


# --- the stock Trainer ---------------------------------------------------------------------------------------------


def bf16_mlp():
    return tiny.mlp(torch.bfloat16)


def mlp_with_statistics():
    return tiny.mlp(batch_norm=True, dropout=0.2)


class SharedWeights(nn.Module):
    """The second layer is a transposed view of the first, a parameter of its own in the same memory."""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.randn(6, 3))
        self.second = nn.Parameter(self.first.detach().t())
        self.third = nn.Parameter(torch.randn(3, 3))

    def forward(self, x, labels):
        logits = torch.tanh(torch.tanh(x @ self.first) @ self.second) @ self.first @ self.third
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def shared_weights():
    tiny.set_seed(0)
    return SharedWeights()


@pytest.mark.parametrize(("scope", "accumulation"), [("device", 1), ("micro", 2), ("device", 2)])
@pytest.mark.parametrize(
    ("model", "data"),
    [
        (mlp_with_statistics, tiny.vectors),
        (bf16_mlp, lambda: tiny.vectors(dtype=torch.bfloat16)),
        (tiny.gpt2, tiny.texts),
        (shared_weights, tiny.vectors),
    ],
    ids=["statistics and dropout", "bf16 weights", "tied weights", "a transposed view"],
)
def test_a_vanishing_rho_is_the_stock_trainer(tmp_path, model, data, scope, accumulation):
    ours, stock = equivalence.both(tmp_path, scope, accumulation, model=model, data=data(), optim="sgd")
    assert_moved(ours)
    equivalence.assert_like_stock(ours, stock, perturbs=model is not bf16_mlp)


@pytest.mark.parametrize("sam", equivalence.FEWER_PASSES, ids=lambda sam: sam["method"])
def test_a_vanishing_rho_of_a_cheap_method_is_the_stock_trainer(tmp_path, sam):
    ours, stock = equivalence.both(tmp_path, sam=sam, model=mlp_with_statistics)
    equivalence.assert_like_stock(ours, stock, perturbs=False)


def assert_moved(trainer):
    assert trainer._sam.space.in_buckets


# --- weights come back ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ROWS)
def test_weights_that_no_optimizer_moves_are_the_same_bits_after_a_run_of_any_method(tmp_path, method):
    sam = config(method, rho=0.5)
    seen = kit.run(sam, tmp_path, learning_rate=0.0, max_steps=4)
    assert seen.trainer._sam.space.in_buckets
    assert all(torch.equal(weights, seen.initial) for weights in seen.trajectory)
    if method not in ("bilora", "flat-lora"):  # which perturb no weights of the model
        assert max(tiny.logged(seen.trainer, "sam_perturbation_norm")) > 0.01


@pytest.mark.parametrize("make", [shared_weights, bf16_mlp, tiny.gpt2], ids=["a transposed view", "bf16", "tied"])
@pytest.mark.parametrize("sam", [{}, {"method": "random"}, {"ascent_steps": 2}, {"stochastic_rounding": True}], ids=str)
def test_weights_in_odd_memory_are_moved_and_come_back(tmp_path, make, sam):
    data = (
        tiny.texts() if make is tiny.gpt2 else tiny.vectors(dtype=torch.bfloat16 if make is bf16_mlp else torch.float32)
    )
    model = make()
    before = tiny.state(model)
    options = {"learning_rate": 0.0, "optim": "sgd", "weight_decay": 0.0}
    trainer = tiny.trained(model, data, tmp_path, SAMConfig(rho=0.5, **sam), **options)
    assert tiny.same_bits(tiny.state(model), before)
    clean = tiny.flat(model)
    assert any(not torch.equal(weights, clean) for _, weights in trainer.passes)


class Failing(tiny.WatchedSAMTrainer):
    """Raises in the loss of the pass that is told by its number."""

    fails_at, error = 0, RuntimeError

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        if len(self.passes) == self.fails_at:
            raise self.error("in a pass")
        return loss


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("method", ["sam", "gsam", "random", "previous", "carried", "friendly"])
def test_an_exception_inside_a_pass_leaves_the_weights(tmp_path, method, error):
    model = tiny.mlp()
    trainer = Failing(
        model=model,
        args=tiny.arguments(tmp_path),
        train_dataset=tiny.vectors(),
        sam_config=config(method, rho=0.5),
    )
    trainer.fails_at = {"random": 2, "previous": 2, "carried": 3}.get(method, 4)  # the second step's perturbed pass
    trainer.error = error
    with pytest.raises(error, match="in a pass"):
        trainer.train()
    assert not torch.equal(trainer.passes[-1][1], trainer.trajectory[-1]), "the pass was to run at other weights"
    assert torch.equal(tiny.flat(model), trainer.trajectory[-1])


# --- state ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["sam", "friendly", "looksam", "previous", "carried", "msam", "aesam", "random"])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path, method):
    options = {"max_steps": 5, "save_strategy": "steps", "save_steps": 3}
    make, data, sam = (lambda: tiny.mlp(dropout=0.2)), tiny.vectors(), config(method, rho=0.1)
    whole = tiny.trained(make(), data, tmp_path, sam, **options)
    again = tiny.trainer_for(make(), data, tmp_path, sam, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert torch.equal(torch.stack(again.trajectory), torch.stack(whole.trajectory[3:]))
