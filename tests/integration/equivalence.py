"""Runs under a vanishing rho beside the stock Trainer's, compared in everything a step may change; steps done by hand.

What is compared goes beyond weights: buffers, whatever state a test names, every logged entry, and the generators'
states when training is over.
"""

from __future__ import annotations

import contextlib
import copy
import random
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from integration import tiny
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from hf_sam import SAMConfig, SAMTrainer

# Scope and accumulation steps. In one process `global` does what `device` does.
SETTINGS = [("device", 1), ("micro", 2), ("device", 2), pytest.param("global", 2, marks=pytest.mark.slow)]
# Methods that run one pass a step, or one in some steps.
FEWER_PASSES = [
    {"method": "random"},
    {"method": "previous"},
    {"method": "msam"},
    {"method": "periodic", "interval": 2},
    {"method": "carried", "interval": 2, "ascent_fraction": 1.0},
]
MEASURED_TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos")
MEASURED_TIMES += ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")


# --- runs ----------------------------------------------------------------------------------------------------------


def trainer_for(
    sam: SAMConfig | None,
    folder,
    *,
    model: Callable[[], nn.Module] = tiny.mlp,
    data: Any = None,
    body: type | None = None,
    extra: Callable[[nn.Module], dict] | None = None,
    callbacks: Callable[[], list[TrainerCallback]] = list,
    **args,
) -> Trainer:
    """A trainer, not yet run; `sam=None` is the stock one.

    Args:
        body (`type`, *optional*): A class to put before the trainer: what a user's subclass overrides.
        extra (`Callable`, *optional*): Makes further arguments of the trainer from the model.
    """
    tiny.set_seed(2)
    built = model()
    base = Trainer if sam is None else SAMTrainer
    cls = base if body is None else type(body.__name__, (body, base), {})
    kwargs = {} if sam is None else {"sam_config": sam}
    return cls(
        model=built,
        args=tiny.arguments(folder, **args),
        train_dataset=tiny.vectors() if data is None else data,
        callbacks=callbacks(),
        **kwargs,
        **({} if extra is None else extra(built)),
    )


def trained(sam: SAMConfig | None, folder, **options) -> Trainer:
    """The same, run; `random_after` of the trainer holds the generators' states at the end."""
    trainer = trainer_for(sam, folder, **options)
    trainer.train()
    trainer.random_after = (torch.get_rng_state(), np.random.get_state(), random.getstate())
    return trainer


def both(
    folder, scope: str = "device", accumulation: int = 1, sam: Mapping[str, Any] | None = None, **options
) -> tuple[Trainer, Trainer]:
    """The same run with a vanishing rho, and by the stock Trainer."""
    config = SAMConfig(rho=1e-30, **({"scope": scope} if sam is None else sam))
    return tuple(
        trained(config_or_none, folder, gradient_accumulation_steps=accumulation, **options)
        for config_or_none in (config, None)
    )


def assert_like_stock(
    ours: Trainer,
    stock: Trainer,
    state_of: Callable[[Trainer], Any] = lambda trainer: None,
    *,
    perturbs: bool = True,
) -> None:
    """Assert that nothing tells both runs apart.

    Args:
        state_of (`Callable`, *optional*): Whatever else has to be the same: numbers, tensors, containers, generators.
        perturbs (`bool`): Whether every step runs a clean and a perturbed pass, whose losses then have to agree.
    """
    assert_same(dict(ours.model.named_parameters()), dict(stock.model.named_parameters()), "parameters")
    assert_same(dict(ours.model.named_buffers()), dict(stock.model.named_buffers()), "buffers")
    assert_same(state_of(ours), state_of(stock), "state")
    assert_same(entries(ours), entries(stock), "logged entries")
    assert_same(ours.random_after, stock.random_after, "random states")
    if perturbs:
        sharpness = tiny.logged(ours, "sam_sharpness")
        assert len(sharpness) >= 1
        assert max(map(abs, sharpness)) < 1e-5, "both passes start alike"


def entries(trainer: Trainer) -> list[dict[str, float]]:
    """The logged entries, without our keys and without what a clock or the number of passes decides."""
    return [
        {key: value for key, value in entry.items() if not key.startswith("sam_") and key not in MEASURED_TIMES}
        for entry in trainer.state.log_history
    ]


def assert_same(left: Any, right: Any, where: str) -> None:
    """Bitwise and by type, through containers, plain objects and generators."""
    assert type(left) is type(right), where
    if isinstance(left, Tensor):
        assert left.shape == right.shape, where
        assert left.requires_grad == right.requires_grad, where
        assert torch.equal(left, right), f"{where} differ by {(left.double() - right.double()).abs().max()}"
    elif isinstance(left, np.ndarray):
        assert np.array_equal(left, right), where
    elif isinstance(left, Mapping):
        assert list(left) == list(right), where
        for key in left:
            assert_same(left[key], right[key], f"{where}: {key}")
    elif isinstance(left, list | tuple | deque):
        assert len(left) == len(right), f"{where}: {len(left)} instead of {len(right)}"
        for i, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_same(a, b, f"{where}[{i}]")
    elif isinstance(left, torch.Generator):
        assert torch.equal(left.get_state(), right.get_state()), where
    elif isinstance(left, np.random.Generator):
        assert left.bit_generator.state == right.bit_generator.state, where
    elif isinstance(left, random.Random):
        assert left.getstate() == right.getstate(), where
    elif hasattr(left, "__dict__") and not isinstance(left, type):
        assert_same(vars(left), vars(right), where)
    else:
        assert left == right, f"{where}: {left} instead of {right}"


def words_as_tokens():
    """A tokenizer for words such as <7>, apart from each other."""
    from integration.test_other_trainers import Tokens
    from tokenizers import pre_tokenizers

    tokenizer = Tokens()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


# --- by hand -------------------------------------------------------------------------------------------------------


def batches(rows: list[dict[str, Any]], size: int) -> list[dict[str, Tensor]]:
    """The batches that the Trainer makes of tensors and integer labels, in the order of the data."""
    return [
        {name: torch.stack([torch.as_tensor(row[name]) for row in rows[i : i + size]]) for name in rows[0]}
        for i in range(0, len(rows), size)
    ]


def windows(parts: list, accumulation: int, steps: int) -> list[list]:
    """The accumulation windows of the first `steps` optimizer steps."""
    return [parts[i * accumulation : (i + 1) * accumulation] for i in range(steps)]


def model_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch)["loss"]


def sgd_steps_by_hand(
    model: nn.Module,
    steps: list[list[dict[str, Tensor]]],
    rho: float,
    lr: float,
    *,
    scope: str = "device",
    loss_of: Callable[[nn.Module, dict[str, Tensor]], Tensor] = model_loss,
    before_step: Callable[[int, nn.Module], None] = lambda step, model: None,
    is_perturbed: Callable[[str], bool] = lambda name: True,
) -> list[dict[str, Tensor]]:
    """SAM on plain SGD, in which every perturbed pass runs on a copy made just before its own clean pass.

    So the copy holds the state that the clean pass began with, whatever kind of state it is. `model` goes from clean
    pass to clean pass and keeps what they leave.

    Args:
        steps (`list[list[dict]]`): The micro-batches of each optimizer step.
        before_step (`Callable`, *optional*): A callback's deeds.
        is_perturbed (`Callable`, *optional*): By the name of a parameter.

    Returns:
        `list[dict[str, Tensor]]`: All parameters by name after every step.
    """
    trajectory = []
    for index, window in enumerate(steps):
        before_step(index, model)
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        total = {name: torch.zeros_like(p) for name, p in model.named_parameters() if p.requires_grad}
        for group in [[batch] for batch in window] if scope == "micro" else [window]:
            copies, clean = [], {name: torch.zeros_like(total[name]) for name in names}
            for batch in group:
                copies.append(copy.deepcopy(model))
                for name, g in _gradient(model, loss_of, batch, names).items():
                    clean[name] += g / len(window)
            chosen = [name for name in names if is_perturbed(name)]
            norm = torch.stack([clean[name].norm() for name in chosen]).norm() if chosen else 1.0
            for other, batch in zip(copies, group, strict=True):
                with torch.no_grad():
                    for name, p in other.named_parameters():
                        if name in chosen:
                            p.add_(rho * clean[name] / norm)
                for name, g_s in _gradient(other, loss_of, batch, names).items():
                    total[name] += g_s / len(window)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name in names:
                    p.sub_(lr * total[name])
        trajectory.append({name: p.detach().clone() for name, p in model.named_parameters()})
    return trajectory


def _gradient(model, loss_of, batch, names) -> dict[str, Tensor]:
    model.train()
    parameters = dict(model.named_parameters())
    loss = loss_of(model, copy.deepcopy(batch))
    gradients = torch.autograd.grad(loss, [parameters[name] for name in names], allow_unused=True)
    return {name: g for name, g in zip(names, gradients, strict=True) if g is not None}


class NoteParameters(TrainerCallback):
    """Notes all parameters by name after every step."""

    def __init__(self):
        self.trajectory: list[dict[str, Tensor]] = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.trajectory.append({name: p.detach().clone() for name, p in model.named_parameters()})


PLAIN_SGD = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.1}


def assert_steps_as_by_hand(folder, expected: list[dict[str, Tensor]], sam: SAMConfig, **options) -> Trainer:
    """Train on plain SGD and compare all parameters after every step with those of `sgd_steps_by_hand`."""
    noted, others = NoteParameters(), options.pop("callbacks", list)
    trainer = trained(
        sam, folder, max_steps=len(expected), callbacks=lambda: [*others(), noted], **{**PLAIN_SGD, **options}
    )
    assert_close(noted.trajectory, expected)
    return trainer


def assert_close(trajectory: Iterable[dict[str, Tensor]], expected: Iterable[dict[str, Tensor]]) -> None:
    for step, (ours, by_hand) in enumerate(zip(trajectory, expected, strict=True)):
        assert ours.keys() == by_hand.keys()
        for name in ours:
            where = f"step {step}, {name}: "
            torch.testing.assert_close(ours[name], by_hand[name], rtol=1e-9, atol=1e-11, msg=where.__add__)


@contextlib.contextmanager
def right_or_refused(field: str) -> Iterator[None]:
    """The enclosed assertions hold, or a ValueError names `field`, a regular expression, in one line."""
    try:
        yield
    except ValueError as error:
        message = str(error)
        if "\n" in message or not re.search(rf"\b({field})\b", message):
            raise AssertionError(f"refused in other words: {message}") from error
