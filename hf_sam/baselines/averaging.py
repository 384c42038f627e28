"""Weight averaging as an arm of a comparison: stochastic weight averaging and an exponential moving average."""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import TrainerCallback

from .checkpoints import checkpoint_folder, file_to_resume

KINDS = ("swa", "ema")
FILE_NAME = "averaged_weights.safetensors"


class WeightAveraging(TrainerCallback):
    """
    Average the weights during training, and load the average into the model when training ends.

    - `swa` is the mean over the steps from `start` on (Izmailov et al. 2018, arXiv 1803.05407, but with the run's own
      learning rate schedule instead of a cyclic one).
    - `ema` is the exponential moving average over all steps.

    Buffers are averaged, too. Each checkpoint contains the average, so a resumed run ends with the same weights as an
    uninterrupted one.

    Args:
        kind (`str`): `"swa"` or `"ema"`.
        start (`float`, *optional*, defaults to 0.75): Fraction of the run after which `swa` begins, in [0, 1).
        decay (`float`, *optional*, defaults to 0.999): Decay of `ema`, in [0, 1).

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(self, kind: str, start: float = 0.75, decay: float = 0.999):
        if kind not in KINDS:
            raise ValueError(f"average={kind!r} is unknown. Allowed: {', '.join(KINDS)}.")
        for name, value in (("average_start", start), ("average_decay", decay)):
            if not 0 <= value < 1:
                raise ValueError(f"{name}={value} must be in [0, 1).")
        self.kind, self.start, self.decay = kind, start, decay
        self.average: AveragedModel | None = None

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        update = get_ema_multi_avg_fn(self.decay) if self.kind == "ema" else None
        self.average = AveragedModel(model, multi_avg_fn=update, use_buffers=True)
        self.average.requires_grad_(False)
        if saved := file_to_resume(args, state, FILE_NAME):
            load_model(self.average, saved)

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        if self.kind == "ema" or state.global_step > self.start * state.max_steps:
            self.average.update_parameters(model)

    def on_save(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            save_model(self.average, str(checkpoint_folder(args, state) / FILE_NAME))

    @torch.no_grad()
    def on_train_end(self, args, state, control, model=None, **kwargs) -> None:
        if self.average.n_averaged == 0:  # training was stopped before the average began
            return
        averaged: dict[str, Any] = self.average.module.state_dict()
        for name, tensor in model.state_dict().items():
            tensor.copy_(averaged[name])
