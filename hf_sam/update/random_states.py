"""Capture and restore the global random number generators."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Iterable

import numpy as np
import torch

# Key and position of numpy's Mersenne twister.
_STATE_BYTES = 624 * 4 + 4


class RandomStates:
    """The state of all global random number generators: torch's on each device, numpy's and Python's."""

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
        """Restore the captured state of every generator."""
        torch.set_rng_state(self._torch)
        for device, state in self._accelerators:
            torch.get_device_module(device).set_rng_state(state, device)
        self._numpy.restore()
        random.setstate(self._python)


class _NumpyState:
    """The state of numpy's global generator, read and set only if numbers were drawn since.

    Reading and setting it take longer than for all other generators together. Comparing the generator's memory shows
    whether numbers were drawn, unless the second of a pair of normal numbers is cached: then the state is always read
    and set.
    """

    _latest: _NumpyState | None = None
    _of_a_pair: bytes | None = (
        None  # memory of the last state with a cached number; the same memory may occur without one
    )

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
    """The memory of numpy's global generator; None if it is not the default Mersenne twister."""
    generator = np.random.get_bit_generator()
    return (
        ctypes.string_at(generator.ctypes.state_address, _STATE_BYTES) if type(generator) is np.random.MT19937 else None
    )
