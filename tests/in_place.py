"""Weights changed where they lie, as on a GPU, for tests that have only a CPU."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from unittest import mock


def found_in(name: str, *modules: str):
    """The class, wherever it lives."""
    for module in modules:
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
    raise ImportError(f"{name} is in none of {', '.join(modules)}")


Perturbation = found_in("Perturbation", "hf_sam.update.parameters", "hf_sam.parameters", "hf_sam.update.perturbation")


@contextlib.contextmanager
def weights_changed_in_place() -> Iterator[None]:
    """Inside, no perturbation lets a parameter point to other memory."""
    original = Perturbation.__init__

    def init(self, generator=None, renew_copies=None, *args, **kwargs):
        kwargs["swaps_memory"] = False
        if renew_copies is not None:
            kwargs["renew_copies"] = renew_copies
        original(self, generator, **kwargs)

    with mock.patch.object(Perturbation, "__init__", init):
        yield
