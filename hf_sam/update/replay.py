"""The second pass sees what the first one saw: random states, running statistics, and the host's own bookkeeping."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn


class RandomStates:
    """The state of every generator a forward pass may draw from: torch on the CPU and on `device`, numpy, python."""

    def __init__(self, device: torch.device):
        self._device = device
        self._torch = torch.get_rng_state()
        self._accelerator = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
        self._numpy = np.random.get_state()  # SpecAugment masks of speech models are drawn from numpy
        self._python = random.getstate()

    def restore(self) -> None:
        """Set every generator to the state captured."""
        torch.set_rng_state(self._torch)
        if self._accelerator is not None:
            torch.get_device_module(self._device).set_rng_state(self._accelerator, self._device)
        np.random.set_state(self._numpy)
        random.setstate(self._python)


class RunningStatistics:
    """The buffers that a forward pass moves, such as BatchNorm's, told from constants by watching the clean pass.

    Run the clean pass inside `watch` and every other pass inside `kept`, which puts those buffers back.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._moving: dict[str, nn.Module] = {}
        self._has_watched = False

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Note which buffers the enclosed pass moves.

        The first time by their values, since BatchNorm's kernels do not count as changes of version; later ones, which
        wait for no device, by version and identity.
        """
        before = {name: (buffer, buffer._version) for name, buffer in self._model.named_buffers()}
        values = {} if self._has_watched else {name: buffer.clone() for name, (buffer, _) in before.items()}
        yield
        for name, buffer in self._model.named_buffers():
            known, version = before.get(name, (None, 0))
            is_same = known is buffer and version == buffer._version
            if not is_same or (name in values and not torch.equal(values[name], buffer)):
                self._moving[name] = self._model.get_submodule(name.rpartition(".")[0])
        self._has_watched = True

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Leave the buffers after the enclosed passes as they were before them, also when a pass raises."""
        saved = {name: self._buffer(name).detach().clone() for name in self._moving}
        try:
            yield
        finally:
            for name, value in saved.items():
                if self._buffer(name).shape == value.shape:
                    with torch.no_grad():
                        self._buffer(name).copy_(value)
                else:
                    setattr(self._moving[name], name.rpartition(".")[2], value)

    def _buffer(self, name: str) -> Tensor:
        return getattr(self._moving[name], name.rpartition(".")[2])


@contextlib.contextmanager
def bookkeeping_kept(trainer, names: tuple[str, ...]) -> Iterator[None]:
    """Give the attributes `names` of `trainer`, where they exist, their present values back afterwards.

    A trainer that collects metrics inside `compute_loss` would otherwise count every example once per pass.
    """
    clean = {name: getattr(trainer, name) for name in names if hasattr(trainer, name)}
    for name, value in clean.items():
        setattr(trainer, name, copy.deepcopy(value))
    try:
        yield
    finally:
        for name, value in clean.items():
            setattr(trainer, name, value)
