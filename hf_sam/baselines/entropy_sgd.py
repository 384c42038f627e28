"""Entropy-SGD as an arm of a comparison: a baseline that searches for wide valleys by averaging a random walk."""

from __future__ import annotations

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback

from .checkpoints import checkpoint_folder, file_to_resume

FILE_NAME = "entropy_sgd.safetensors"


class EntropySGD(TrainerCallback):
    """
    Turn the optimizer's steps into the inner walk of Entropy-SGD (Chaudhari et al. 2017, arXiv 1611.01838, Alg. 1).

    Each step of the Trainer is one step of Langevin dynamics that starts at `x`, on its own batch and at the base
    optimizer's learning rate. After `inner_steps` steps, `x` moves towards the average of the walk, and the next walk
    starts there:

        x' <- x' - lr [grad L(x') - gamma (x - x')] + sqrt(lr) noise N(0, I)
        mu <- (1 - average) mu + average x'
        every inner_steps:  x <- x - outer_lr (x - mu),  x' <- mu <- x

    With SGD as the base optimizer, this is the paper's algorithm, whose outer step `eta gamma` is `outer_lr`. It costs
    one pass per step. Under DDP, all ranks draw the same noise.

    Args:
        inner_steps (`int`, *optional*, defaults to 20): Length L of each walk, at least 1.
        gamma (`float`, *optional*, defaults to 0.03): Strength of the pull back to `x`, at least 0.
        average (`float`, *optional*, defaults to 0.75): Weight of the newest point in `mu`, in (0, 1].
        noise (`float`, *optional*, defaults to 1e-4): Standard deviation of the thermal noise, at least 0.
        outer_lr (`float`, *optional*, defaults to 1.0): Outer step size, above 0; 1 moves `x` to the average.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        inner_steps: int = 20,
        gamma: float = 0.03,
        average: float = 0.75,
        noise: float = 1e-4,
        outer_lr: float = 1.0,
    ):
        for name, value, is_allowed, allowed in (
            ("inner_steps", inner_steps, inner_steps >= 1, "at least 1"),
            ("gamma", gamma, gamma >= 0, "at least 0"),
            ("average", average, 0 < average <= 1, "in (0, 1]"),
            ("noise", noise, noise >= 0, "at least 0"),
            ("outer_lr", outer_lr, outer_lr > 0, "above 0"),
        ):
            if not is_allowed:
                raise ValueError(f"{name}={value} must be {allowed}.")
        self.inner_steps, self.gamma, self.average = inner_steps, gamma, average
        self.noise, self.outer_lr = noise, outer_lr
        self._anchors: dict[str, Tensor] = {}  # x
        self._means: dict[str, Tensor] = {}  # mu

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        if saved := file_to_resume(args, state, FILE_NAME):
            tensors = load_file(saved, device=str(args.device))
            self._anchors = {name[2:]: t for name, t in tensors.items() if name.startswith("x.")}
            self._means = {name[2:]: t for name, t in tensors.items() if name.startswith("m.")}
        else:
            self._begin_walk(model)

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        generator = torch.Generator(args.device).manual_seed((args.seed << 32) + state.global_step)
        lr = optimizer.param_groups[0]["lr"]
        with torch.no_grad():
            for name, p in self._trainable(model):
                draw = torch.randn(p.shape, generator=generator, device=p.device, dtype=p.dtype)
                if p.grad is not None:
                    p.grad.add_(p - self._anchors[name], alpha=self.gamma)
                    if self.noise and lr:
                        p.grad.sub_(draw, alpha=self.noise / lr**0.5)

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        is_outer = (state.global_step + 1) % self.inner_steps == 0
        for name, p in self._trainable(model):
            self._means[name].lerp_(p, self.average)
            if is_outer:
                p.copy_(self._anchors[name].lerp(self._means[name], self.outer_lr))
        if is_outer:
            self._begin_walk(model)

    def on_save(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            tensors = {f"x.{name}": t for name, t in self._anchors.items()}
            tensors |= {f"m.{name}": t for name, t in self._means.items()}
            save_file(tensors, checkpoint_folder(args, state) / FILE_NAME)

    def _begin_walk(self, model) -> None:
        self._anchors = {name: p.detach().clone() for name, p in self._trainable(model)}
        self._means = {name: anchor.clone() for name, anchor in self._anchors.items()}

    @staticmethod
    def _trainable(model):
        return ((name, p) for name, p in model.named_parameters() if p.requires_grad)
