"""The states of all global generators that a forward pass may draw from."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Iterable

import numpy as np
import torch

# Key and position of numpy's Mersenne twister.
_STATE_BYTES = 624 * 4 + 4


class RandomStates:
    """The state of every global generator that a forward pass may draw from: torch's on each device, numpy's, python's."""

    def __init__(self, devices: Iterable[torch.device]):
        self._torch = torch.get_rng_state()
        self._accelerators = [
            (device, torch.get_device_module(device).get_rng_state(device))
            for device in devices
            if device.type != "cpu"
        ]
        self._numpy = _NumpyState.now()  # SpecAugment masks of speech models are drawn from numpy
        self._python = random.getstate()

    def restore(self) -> None:
        """Set every generator to the state captured."""
        torch.set_rng_state(self._torch)
        for device, state in self._accelerators:
            torch.get_device_module(device).set_rng_state(state, device)
        self._numpy.restore()
        random.setstate(self._python)


class _NumpyState:
    """Numpy's global state. Getting and setting it takes longer than all others together, so it is done only after a draw.

    The generator's memory shows whether something was drawn, unless the second of a pair of normal numbers is pending:
    then the state is always read and set.
    """

    _latest: _NumpyState | None = None
    _of_a_pair: bytes | None = None  # the last memory seen with a pending number; it may occur without one, too

    def __init__(self, memory: bytes | None):
        self._state = np.random.get_state(legacy=False)
        if self._state["has_gauss"]:
            _NumpyState._of_a_pair = memory
        self._memory = None if memory == _NumpyState._of_a_pair else memory
        _NumpyState._latest = self

    @classmethod
    def now(cls) -> _NumpyState:
        memory, latest = _memory(), cls._latest
        return latest if latest is not None and memory is not None and memory == latest._memory else cls(memory)

    def restore(self) -> None:
        if self._memory is None or _memory() != self._memory:
            np.random.set_state(self._state)
        _NumpyState._latest = self


def _memory() -> bytes | None:
    """The generator's memory, if it is numpy's default generator."""
    generator = np.random.get_bit_generator()
    return (
        ctypes.string_at(generator.ctypes.state_address, _STATE_BYTES) if type(generator) is np.random.MT19937 else None
    )
