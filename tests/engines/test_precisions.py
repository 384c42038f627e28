"""Weights, masters and optimizer states in fewer bits: the perturbation has the size it should, or a warning says so."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from integration import tiny
from torch import Tensor, nn
from transformers.utils import logging

from hf_sam import Ascent, SAMConfig
from hf_sam.methods import Noise
from hf_sam.update.perturbation import Perturbation


@pytest.fixture
def warnings(caplog):
    """The messages about the perturbation's size, each of which is given once in a process."""
    logging.warning_once.cache_clear()
    logging.enable_propagation()
    yield lambda: [record.message for record in caplog.records if "Rounding to" in record.message]
    logging.disable_propagation()


class FloatMasters(torch.optim.SGD):
    """Steps on float32 copies of bfloat16 weights, which are rounded from them after every step."""

    def __init__(self, params, lr: float):
        self.weights = list(params)
        self.masters = [p.detach().float() for p in self.weights]
        super().__init__(self.weights, lr=lr, momentum=0.9)
        self.inner = torch.optim.SGD(self.masters, lr=lr, momentum=0.9)

    @torch.no_grad()
    def step(self, closure=None):
        for p, master in zip(self.weights, self.masters, strict=True):
            master.grad = None if p.grad is None else p.grad.float()
        self.inner.step()
        for p, master in zip(self.weights, self.masters, strict=True):
            p.copy_(master)


def trained(tmp_path, sam: SAMConfig | None, dtype=torch.float32, masters: bool = False, **options):
    model, data = tiny.mlp(dtype), tiny.vectors(dtype=dtype)
    extra = {"optimizers": (FloatMasters(model.parameters(), lr=1e-2), None)} if masters else None
    return tiny.trained(model, data, tmp_path, sam, extra=extra, max_steps=8, **options)


@pytest.mark.parametrize(
    ("rho", "settings", "is_right"),
    [
        (1e-3, {}, True),
        (1e-3, {"bf16": True}, True),
        (0.5, {"dtype": torch.bfloat16}, True),
        (1e-3, {"dtype": torch.bfloat16}, False),
        (0.5, {"dtype": torch.bfloat16, "masters": True}, True),
        (1e-3, {"dtype": torch.bfloat16, "masters": True}, False),
    ],
    ids=lambda value: str(value).replace("torch.", ""),
)
def test_the_perturbation_has_the_size_of_rho_or_a_warning_says_that_rounding_takes_from_it(
    tmp_path, warnings, rho, settings, is_right
):
    norms = tiny.logged(trained(tmp_path, SAMConfig(rho=rho), **settings), "sam_perturbation_norm")
    assert len(norms) == 8
    if is_right:
        assert norms == pytest.approx([rho] * 8, rel=0.1)
        assert not warnings()
    else:
        assert all(norm < 0.9 * rho for norm in norms)
        (message,) = warnings()
        assert "bfloat16 loses" in message
        assert "stochastic_rounding" in message


@pytest.mark.parametrize(("rho", "is_right"), [(0.5, True), (1e-3, False)])
def test_stochastic_rounding_has_the_size_of_rho_or_a_warning_says_that_it_adds_to_it(
    tmp_path, warnings, rho, is_right
):
    sam = SAMConfig(rho=rho, stochastic_rounding=True)
    norms = tiny.logged(trained(tmp_path, sam, torch.bfloat16), "sam_perturbation_norm")
    if is_right:
        assert norms == pytest.approx([rho] * 8, rel=0.1)
        assert not warnings()
    else:
        assert all(norm > 1.1 * rho for norm in norms)
        (message,) = warnings()
        assert "bfloat16 adds" in message
        assert "stochastic_rounding" not in message


class ManyWeights(tiny.Mlp):
    """Enough weights for the mean over them to be close to the expectation."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 4096), nn.Linear(4096, tiny.CLASSES)
        self.norm = nn.Identity()


@dataclass(frozen=True)
class NoiseInsteadOfTheGradient(Ascent):
    """Draws in a step with two passes."""

    def eps(self, g, step):
        return Noise().eps(None, step)


@pytest.mark.parametrize(
    "method", [{}, {"method": "random"}, {"ascent": NoiseInsteadOfTheGradient()}], ids=["sam", "random", "own"]
)
def test_stochastic_rounding_does_not_depend_on_what_the_method_draws(method, tmp_path, monkeypatch):
    """With the same random numbers for both, weights with a large eps would seldom be rounded up."""
    shares, add = [], Perturbation.add

    def noted(self, eps):
        wanted, before = [t.clone().float() for t in eps.numbers()], [p.detach().float() for p in eps.parameters]
        parameters = eps.parameters
        add(self, eps)
        moved = [p.detach().float() - w for p, w in zip(parameters, before, strict=True)]
        along = sum((m * v).sum() for m, v in zip(moved, wanted, strict=True))
        shares.append(float(along / sum(v.square().sum() for v in wanted)))

    monkeypatch.setattr(Perturbation, "add", noted)
    tiny.set_seed(0)
    sam = SAMConfig(rho=0.02, stochastic_rounding=True, **method)
    model, data = ManyWeights().to(torch.bfloat16), tiny.vectors(dtype=torch.bfloat16)
    tiny.trained(model, data, tmp_path, sam, max_steps=6, learning_rate=0.0, logging_strategy="no")
    assert sum(shares) / len(shares) == pytest.approx(1, abs=0.05)


def test_float32_masters_never_see_the_perturbation(tmp_path):
    """A vanishing rho is bitwise the stock Trainer, and a large one leaves weights that are their masters, rounded."""
    stock = trained(tmp_path, None, torch.bfloat16, masters=True)
    ours = trained(tmp_path, SAMConfig(rho=1e-30), torch.bfloat16, masters=True)
    tiny.assert_same_run(ours, stock)
    ours = trained(tmp_path, SAMConfig(rho=0.5), torch.bfloat16, masters=True)
    optimizer = ours.optimizer.optimizer
    assert all(torch.equal(p, m.to(p.dtype)) for p, m in zip(optimizer.weights, optimizer.masters, strict=True))
    assert not torch.equal(ours.trajectory[-1], stock.trajectory[-1])


# --- optimizer states ----------------------------------------------------------------------------------------------


class EightBits(Tensor):
    """Numbers in eight bits, as torchao's optimizers keep them: a tensor of another type, which few operations take."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: float):
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes: Tensor, scale: float):
        self.codes, self.scale = codes, scale

    def dequantize(self) -> Tensor:
        return self.codes * self.scale

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is not torch.ops.aten.detach.default:
            raise NotImplementedError(f"{function} of eight bits")
        return cls(args[0].codes, args[0].scale)


class EightBitMomentum(torch.optim.Optimizer):
    """SGD with momentum, kept in eight bits between two steps under the name `key`."""

    def __init__(self, params, lr: float, key: str):
        super().__init__(params, {"lr": lr})
        self.key = key

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                momentum = self._read(state).mul_(0.9).add_(p.grad) if state else p.grad.clone()
                p.sub_(momentum, alpha=group["lr"])
                self._write(state, momentum)

    def _read(self, state: dict) -> Tensor:
        return state["codes"] * state["scale"] if self.key == "codes" else state[self.key].dequantize()

    def _write(self, state: dict, momentum: Tensor) -> None:
        scale = momentum.abs().max().item() / 127 or 1.0
        codes = (momentum / scale).round().to(torch.int8)
        state.update({"codes": codes, "scale": scale} if self.key == "codes" else {self.key: EightBits(codes, scale)})


def in_eight_bits(tmp_path, sam: SAMConfig, key: str):
    model = tiny.mlp()
    extra = {"optimizers": (EightBitMomentum(model.parameters(), 1e-2, key), None)}
    return tiny.trained(model, tiny.vectors(), tmp_path, sam, extra=extra, max_steps=4)


@pytest.mark.parametrize("key", ["exp_avg", "momentum_buffer"])
def test_msam_looks_along_a_momentum_of_eight_bits(tmp_path, key):
    trainer = in_eight_bits(tmp_path, SAMConfig(method="msam", rho=0.5), key)
    optimizer = trainer.optimizer.optimizer
    v = torch.cat([optimizer.state[p][key].dequantize().flatten() for p in trainer.model.parameters()])
    update = trainer._sam
    with update.ascent_step.weights(update._step()) as weights:
        weights.add(update.parts.ascent.eps(None, update._step()))
        moved = tiny.flat(trainer.model) - trainer.trajectory[-1]
    torch.testing.assert_close(moved, -0.5 * v / v.norm(), rtol=0, atol=1e-6)
    assert torch.equal(trainer.passes[0][1], tiny.flat(tiny.mlp())), "no momentum before the first step"
    assert all(
        not torch.equal(pass_[1], point) for pass_, point in zip(trainer.passes[1:], trainer.trajectory, strict=False)
    )


def test_msam_refuses_a_momentum_that_cannot_be_read(tmp_path):
    with pytest.raises(
        ValueError, match=r"EightBitMomentum has no readable momentum\. Use an optimizer with `exp_avg`"
    ):
        in_eight_bits(tmp_path, SAMConfig(method="msam", rho=0.5), "codes")


@pytest.mark.parametrize("key", ["exp_avg", "codes"])
def test_sam_needs_no_state_of_the_optimizer(tmp_path, key):
    ours = in_eight_bits(tmp_path, SAMConfig(rho=1e-30), key)
    stock = in_eight_bits(tmp_path, None, key)
    tiny.assert_same_run(ours, stock)
    moved = in_eight_bits(tmp_path, SAMConfig(rho=0.5), key)
    assert not torch.equal(moved.trajectory[-1], stock.trajectory[-1])


class Wide(torch.nn.Module):
    """Wide enough that optimizers of few bits keep its weights' states in them."""

    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(6, 64), torch.nn.Tanh(), torch.nn.Linear(64, 128))
        self.head = torch.nn.Linear(128, 3)

    def forward(self, x, labels=None):
        logits = self.head(torch.tanh(self.body(x)))
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize(
    ("optim", "package"),
    [("adamw_torch_8bit", "torchao"), ("adamw_torch_4bit", "torchao"), ("adamw_8bit", "bitsandbytes")],
)
def test_optimizers_of_few_bits_themselves(tmp_path, monkeypatch, optim, package):
    """torchao's and bitsandbytes' own, which are no dependency of ours, where they are installed."""
    pytest.importorskip(package)
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")  # torchao would compile its step

    def run(sam):
        tiny.set_seed(0)
        return tiny.trained(Wide(), tiny.vectors(), tmp_path, sam, optim=optim, max_steps=4)

    stock, vanishing, sam = run(None), run(SAMConfig(rho=1e-30)), run(SAMConfig(rho=0.5))
    assert torch.equal(torch.stack(vanishing.trajectory), torch.stack(stock.trajectory))
    norms = [entry["sam_perturbation_norm"] for entry in sam.state.log_history if "sam_perturbation_norm" in entry]
    assert norms == pytest.approx([0.5] * len(norms), rel=1e-4)
    assert not torch.equal(sam.trajectory[-1], stock.trajectory[-1])
    if package == "torchao":
        assert run(SAMConfig(method="msam", rho=0.5)).state.global_step == 4
    else:
        with pytest.raises(ValueError, match="has no readable"):
            run(SAMConfig(method="msam", rho=0.5))
