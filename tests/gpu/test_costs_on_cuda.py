"""What the update costs on a GPU beyond its second pass: no waiting for the device, one copy of the weights."""

from __future__ import annotations

import contextlib

import pytest
import torch
from gpu import on_device
from integration import tiny
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from hf_sam import SAMConfig, SAMTrainer
from hf_sam.methods import Steepest

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


# --- no waiting ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def synchronisation(mode: str | int):
    """CUDA's own check, which raises at an operation that makes the host wait where `mode` is `"error"`."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class NeverWaiting(SAMTrainer):
    """From the second step on whatever waits for the device raises, but for the base trainer's own passes."""

    watched_steps = 0

    def training_step(self, *args, **kwargs):
        if self.state.global_step == 0:  # in which much happens once
            return super().training_step(*args, **kwargs)
        self.watched_steps += 1
        with synchronisation("error"):
            return super().training_step(*args, **kwargs)

    def start_update(self) -> None:
        super().start_update()
        one_pass = self._sam_passes._training_step

        def unwatched(*args, **kwargs):
            with synchronisation("default"):
                return one_pass(*args, **kwargs)

        self._sam_passes._training_step = unwatched


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")  # that it does not see everything
@pytest.mark.parametrize("config", [{}, {"p": "inf"}, {"method": "asam"}, {"method": "gsam"}, {"method": "friendly"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_step_does_not_wait_for_the_device(config, dtype, tmp_path):
    args = on_device.arguments(CUDA, tmp_path, max_steps=4, gradient_accumulation_steps=2, logging_strategy="no")
    model = tiny.mlp(dtype, dropout=0.1, batch_norm=True)
    trainer = NeverWaiting(
        model, args, train_dataset=tiny.vectors(dtype=dtype), sam_config=SAMConfig(**config, scope="device")
    )
    trainer.train()
    assert trainer.watched_steps == 3 * 2


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_the_check_sees_what_waits(tmp_path):
    class Waiting(Steepest):
        def eps(self, g, step):
            return super().eps(g, step) * float(g.norm())

    args = on_device.arguments(CUDA, tmp_path, logging_strategy="no")
    trainer = NeverWaiting(tiny.mlp(), args, train_dataset=tiny.vectors(), sam_config=SAMConfig(ascent=Waiting()))
    with pytest.raises(RuntimeError, match="synchroniz"):
        trainer.train()


# --- memory --------------------------------------------------------------------------------------------------------


class Deep(nn.Module):
    """Almost all memory is weights, in many layers, so that what is held of one layer for a moment does not count."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1024, 1024, bias=False, dtype=dtype) for _ in range(64))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return {"loss": x.float().square().mean(), "logits": x}


class PeakOfLaterSteps(TrainerCallback):
    """Forgets the first step's peak, in which libraries allocate what they keep."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            torch.cuda.reset_peak_memory_stats()


def peak(folder, sam: SAMConfig | None, dtype: torch.dtype) -> float:
    """Peak of the run in units of the weights."""
    torch.cuda.empty_cache()
    data = [{"x": torch.randn(1024, dtype=dtype), "labels": 0} for _ in range(8)]
    args = on_device.arguments(
        CUDA, folder, max_steps=4, per_device_train_batch_size=1, optim="sgd", logging_strategy="no"
    )
    model = Deep(dtype)
    kwargs = {"model": model, "args": args, "train_dataset": data, "callbacks": [PeakOfLaterSteps()]}
    trainer = Trainer(**kwargs) if sam is None else SAMTrainer(**kwargs, sam_config=sam)
    trainer.train()
    return torch.cuda.max_memory_allocated() / sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("config", "copies"),
    [({"rho": 10.0}, 1), ({"method": "asam", "rho": 10.0}, 1), ({"method": "gsam", "rho": 10.0}, 2)],
)
def test_memory_beyond_the_stock_trainer_is_what_the_method_promises(config, copies, dtype, tmp_path):
    stock = peak(tmp_path, None, dtype)
    assert 2 <= stock < 2.6  # weights and gradients
    beyond = peak(tmp_path, SAMConfig(**config), dtype) - stock
    assert copies - 0.1 <= beyond <= copies + 0.15


# --- CUDA graphs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_cuda_graphs_are_refused(mode, tmp_path):
    args = on_device.arguments(CUDA, tmp_path, torch_compile=True, torch_compile_mode=mode)
    with pytest.raises(ValueError, match="CUDA graphs"):
        SAMTrainer(tiny.mlp(), args, train_dataset=tiny.vectors(), sam_config=SAMConfig())
