"""The fixed examples on which sharpness is measured, identified by a hash of the model's inputs."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import default_data_collator

LABEL_NAMES = ("labels", "label", "label_ids")

Batch = dict[str, Tensor]


class Subset:
    """Examples in a fixed order, and how they are batched.

    Args:
        examples (`Sequence[Mapping]`):
            Preprocessed examples, as the Trainer passes them to its data collator.
        data_collator (`Callable`, *optional*, defaults to `transformers.default_data_collator`):
            Turns a list of examples into a batch. It must not draw random numbers.
        batch_size (`int`, *optional*, defaults to 16):
            Examples per batch; affects memory and speed, but not the results.

    Raises:
        ValueError: There are no examples, or the collator is not deterministic.
    """

    def __init__(
        self,
        examples: Sequence[Mapping[str, Any]],
        data_collator: Callable[[list], Mapping] | None = None,
        batch_size: int = 16,
    ):
        if not examples:
            raise ValueError("The subset is empty: sharpness needs at least one example.")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r} must be at least 1.")
        self.examples = list(examples)
        self.batch_size = batch_size
        self.data_collator = data_collator or default_data_collator
        with torch.random.fork_rng([]):  # a collator that draws is refused, and must not change the random state
            first, second = (self._batch(self.examples[:batch_size]) for _ in range(2))
        if any(not torch.equal(first[name], second[name]) for name in first):
            raise ValueError(
                "The data collator draws random numbers, so the loss would differ from pass to pass. Use one without "
                "augmentation or random masking; for masked language models, mask the data set once, beforehand."
            )

    @classmethod
    def of(
        cls,
        dataset: Any,
        model: nn.Module,
        num_examples: int | None = None,
        seed: int = 0,
        data_collator: Callable[[list], Mapping] | None = None,
        batch_size: int = 16,
    ) -> Subset:
        """`num_examples` of a map-style data set, drawn without replacement by `seed`; all of it by default.

        Columns that the model's `forward` does not take are dropped, as in the Trainer.

        Raises:
            ValueError: The data set has no length, or no column that the model takes.
        """
        if not isinstance(dataset, Sized):
            raise ValueError("Sharpness is measured on a fixed subset: give a data set with a length, not a stream.")
        count = len(dataset) if num_examples is None else min(num_examples, len(dataset))
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
        accepted = {*forward_arguments(model), *LABEL_NAMES}
        examples = []
        for index in sorted(order[:count].tolist()):
            example = dataset[index]
            examples.append({name: value for name, value in example.items() if name in accepted})
        if examples and not examples[0]:
            raise ValueError(
                f"The model takes none of the data set's columns ({', '.join(example)}). Preprocess the data set first; "
                f"the model's forward takes {', '.join(sorted(accepted))}."
            )
        return cls(examples, data_collator, batch_size)

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self), self.batch_size):
            yield self._batch(self.examples[start : start + self.batch_size])

    def chunks(self, m: int) -> list[Subset]:
        """The subset in consecutive chunks of `m` examples; the last one may be smaller."""
        if m < 1:
            raise ValueError(f"m={m!r} must be at least 1 example.")
        return [
            Subset(self.examples[start : start + m], self.data_collator, self.batch_size)
            for start in range(0, len(self), m)
        ]

    @property
    def fingerprint(self) -> str:
        """The first 16 hexadecimal digits of the SHA-256 of all examples in order, whatever the batch size."""
        digest = hashlib.sha256()
        for example in self.examples:
            for name in sorted(example):
                value = np.ascontiguousarray(example[name])
                digest.update(f"{name} {value.dtype.str} {value.shape};".encode())
                digest.update(value.tobytes())
        return digest.hexdigest()[:16]

    def _batch(self, examples: list[Mapping[str, Any]]) -> Batch:
        batch = dict(self.data_collator([dict(example) for example in examples]))
        return {name: value for name, value in batch.items() if isinstance(value, Tensor)}


def forward_arguments(model: nn.Module) -> set[str]:
    """The names of the arguments of `model.forward`; for a PEFT adapter, those of the model inside it."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return set(inspect.signature(inner.forward).parameters)
