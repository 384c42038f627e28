"""Operations that a step dispatches beside its passes and the optimizer's own work."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer

from hf_sam.trainer import SAMTrainer

# These return without a kernel: another look at memory that is there, or memory that nothing is written to.
WITHOUT_KERNEL = {
    *("alias", "as_strided", "detach", "detach_", "expand", "narrow", "permute", "select", "slice", "split", "t"),
    *("split_with_sizes", "transpose", "unbind", "unsqueeze", "squeeze", "view", "_unsafe_view", "_reshape_alias"),
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_", "lift_fresh"),
    *("promote_types", "result_type"),
}
# These make the host wait for the device.
WAITING = {"_local_scalar_dense", "equal", "item", "is_nonzero", "nonzero", "masked_select", "unique", "_unique2"}


class Operations(TorchDispatchMode):
    """Counts what is dispatched inside, but for what `left_out` encloses."""

    def __init__(self):
        super().__init__()
        self.names: Counter[str] = Counter()
        self._depth = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if self._depth == 0:
            self.names[function.name().removeprefix("aten::").partition(".")[0]] += 1
        return function(*args, **(kwargs or {}))

    @contextlib.contextmanager
    def left_out(self) -> Iterator[None]:
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    @property
    def launches(self) -> int:
        return sum(count for name, count in self.names.items() if name not in WITHOUT_KERNEL)

    @property
    def waits(self) -> dict[str, int]:
        return {name: count for name, count in self.names.items() if name in WAITING}


@contextlib.contextmanager
def counted_steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Operations]]:
    """For each `training_step` inside, its operations but for those of the stock Trainer's training step and loss."""
    steps: list[Operations] = []

    def leave_out(name: str) -> None:
        original = getattr(Trainer, name)

        def left_out(self, *args, **kwargs):
            with steps[-1].left_out() if steps else contextlib.nullcontext():
                return original(self, *args, **kwargs)

        patch.setattr(Trainer, name, left_out)

    original = SAMTrainer.training_step

    def training_step(self, *args, **kwargs):
        steps.append(Operations())
        with steps[-1]:
            return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(SAMTrainer, "training_step", training_step)
        leave_out("training_step")
        leave_out("compute_loss")
        yield steps


class Tower(nn.Module):
    """Blocks of four tensors each, all alike."""

    def __init__(self, blocks: int):
        super().__init__()
        self.linear = nn.ModuleList(nn.Linear(6, 6) for _ in range(blocks))
        self.norm = nn.ModuleList(nn.LayerNorm(6) for _ in range(blocks))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        for linear, norm in zip(self.linear, self.norm, strict=True):
            x = x + torch.tanh(linear(norm(x)))
        return {"loss": F.cross_entropy(x, labels), "logits": x}
