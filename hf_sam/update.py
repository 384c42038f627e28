"""What one run of sharpness-aware updates holds between two passes. It knows tensors and batches, but no Trainer."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import nn
from transformers.utils import logging

from .ascent import adaptive_direction, add_weight_decay, dual_norm_direction
from .batches import MicroBatch
from .config import SAMConfig
from .engines import Engine
from .parameters import Gradients, Perturbation, select
from .replay import RunningStatistics
from .schedule import Schedule
from .telemetry import Stopwatch, Telemetry

logger = logging.get_logger(__name__)


class SharpnessAwareUpdate:
    """The parts of Algorithm 1 (Foret et al. 2021), put together for one model and one run.

    Args:
        config (`SAMConfig`): The user's choices.
        model (`nn.Module`): The model, not wrapped for distributed training.
        optimizer (`torch.optim.Optimizer`): The base optimizer; read for its weight decay, never stepped here.
        engine (`Engine`): How gradients are synchronised and norms are taken.
        max_steps (`int`): Optimizer steps of the whole run.
        seed (`int`): For stochastic rounding; the same on every rank, so that ranks round alike.

    Raises:
        ValueError: `config.perturb` selects nothing, or no step of the run would perturb.
    """

    def __init__(
        self,
        config: SAMConfig,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        engine: Engine,
        max_steps: int,
        seed: int,
    ):
        self.config = config
        self.engine = engine
        self.scope = engine.scope(config)
        self.schedule = Schedule.resolve(config, max_steps)
        self.selected = select(model, config.perturb)
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.device = self.trainable[0].device
        self.statistics = RunningStatistics(model)
        self.telemetry = Telemetry(self.device)
        self.pass_clock, self.step_clock = Stopwatch(self.device), Stopwatch(self.device)
        self.ascent_passes = self.full_passes = self._micro_batches = 0.0
        self._first_step, self._is_warming_up = None, True
        self.window: list[MicroBatch] = []
        self._weight_decay = {
            p: group.get("weight_decay", 0.0) for group in optimizer.param_groups for p in group["params"]
        }
        self._seed = seed
        self._clean: Gradients = {}

    def perturbation(self, step: int) -> Perturbation:
        """A context in which `climb` moves the weights, and after which they are bitwise what they were."""
        if not self.config.stochastic_rounding:
            return Perturbation()
        generator = torch.Generator(self.device).manual_seed(hash((self._seed, step)) % 2**63)
        return Perturbation(generator)

    def climb(self, perturbation: Perturbation, gradients: Gradients, rho: float, *, measured: bool = False) -> None:
        """`w <- w + eps`, one inner ascent step of size `rho / ascent_steps` along `gradients`, which are consumed.

        Args:
            perturbation (`Perturbation`): The context to move the weights in.
            gradients (`Gradients`): Of the ascent pass; those of parameters that are not perturbed are dropped.
            rho (`float`): Radius of the whole perturbation.
            measured (`bool`, *optional*, defaults to `False`): Keep what `observe` needs afterwards.
        """
        config, reductions = self.config, self.engine.reductions
        parameters = [p for p in self.selected.values() if p in gradients]
        if not parameters:  # nothing perturbed took part in this pass
            return
        directions = [gradients[p] for p in parameters]
        loss_scale = self.engine.loss_scale(self.device)
        self.telemetry.record(sam_rho=rho, sam_ascent_grad_norm=reductions.norm(directions) / loss_scale)
        if measured and not self._is_parallel_to_gradient():
            self._clean = {p: g.clone() for p, g in zip(parameters, directions, strict=True)}
        with torch.no_grad():
            if config.weight_decay_in_ascent:
                decay = [self._weight_decay.get(p, 0.0) for p in parameters]
                add_weight_decay(directions, parameters, decay, loss_scale)
            rho = rho / config.ascent_steps
            if config.adaptive:
                found = adaptive_direction(directions, parameters, rho, config.p, config.eta, reductions)
            else:
                found = dual_norm_direction(directions, rho, config.p, reductions)
            directions, scale = found
            if measured and config.ascent_steps == 1:
                self.telemetry.record(_intended_norm=scale * reductions.norm(directions))
            perturbation.add(parameters, directions, scale)

    def observe(self, perturbation: Perturbation, perturbed: Gradients) -> None:
        """Record the realised `||(w + eps) - w||` and `cos(g, g_s)`.

        For p = 2 without adaptive scaling the displacement is parallel to `g` and stands for it, so that no second copy
        is needed; otherwise `climb` has kept `g` for this step.
        """
        reductions = self.engine.reductions
        norms, dots, g, g_s = [], [], [], []
        for p, displacement in perturbation.displacement():
            norms.append(torch.linalg.vector_norm(displacement))
            if p in perturbed:
                clean = displacement if self._is_parallel_to_gradient() else self._clean[p]
                dots.append(torch.sum(clean * perturbed[p]))
                g.append(torch.linalg.vector_norm(clean))
                g_s.append(torch.linalg.vector_norm(perturbed[p].to(clean.dtype)))
        self._clean = {}
        if norms:
            self.telemetry.record(sam_perturbation_norm=reductions.sum(torch.stack(norms) ** 2).sqrt())
        if dots:
            squares = [reductions.sum(torch.stack(parts) ** 2) for parts in (g, g_s)]
            cosine = reductions.sum(torch.stack(dots)) / (squares[0] * squares[1]).sqrt()
            self.telemetry.record(sam_cosine=cosine)

    def close_step(self) -> None:
        """Record the losses of the optimizer step whose last micro-batch this was."""
        losses = self.telemetry.close_step()
        self.telemetry.record(
            sam_perturbed_loss=losses["perturbed_loss"],
            sam_sharpness=losses["perturbed_loss"] - losses["clean_loss"],
        )

    def check_realised(self, logs: dict[str, float]) -> dict[str, float]:
        """Warn, once, where rounding the weights has changed the size of the perturbation by more than a tenth.

        Returns the entries for the log: without the intended size, and without a cosine that is undefined.
        """
        intended, realised = logs.pop("_intended_norm", 0.0), logs.get("sam_perturbation_norm", 0.0)
        if intended > 0 and abs(realised / intended - 1) > 0.1:
            dtypes = {str(p.dtype).removeprefix("torch.") for p in self.selected.values()}
            logger.warning_once(
                f"The perturbation that was realised has norm {realised:.3g}, not {intended:.3g} as intended: weights "
                f"stored in {' and '.join(sorted(dtypes))} round it away. Keep the weights in float32 (bf16=True trains "
                "float32 weights under autocast), set stochastic_rounding=True, or choose a larger rho."
            )
        return {name: value for name, value in logs.items() if name != "sam_cosine" or not math.isnan(value)}

    def effective_m(self, batch_size: int, accumulation_steps: int, world_size: int) -> int:
        """Examples that share one perturbation, where every micro-batch is full."""
        if self.scope == "micro":
            return min(self.config.m or batch_size, batch_size)
        return batch_size * accumulation_steps * (world_size if self.scope == "global" else 1)

    @property
    def passes_per_step(self) -> float:
        """Forward-backward passes over the batch in a step that perturbs; the last one is the descent pass."""
        return 1 + (self.config.ascent_steps - 1) + self.config.ascent_fraction

    @contextlib.contextmanager
    def micro_batch(self, step: int) -> Iterator[None]:
        """Count and time one `training_step`; the run's first step, in which much happens once, is not timed."""
        if self._first_step is None:
            self._first_step = step
        elif step == self._first_step + 1 and self._is_warming_up:
            self._is_warming_up = False
            self.ascent_passes = self.full_passes = self._micro_batches = 0.0
            self.step_clock.reset()
            self.pass_clock.reset()
        with self.step_clock:
            yield
        self._micro_batches += 1

    def cost(self) -> dict[str, float]:
        """Passes per micro-batch, and the measured time of `training_step` relative to that of one full pass."""
        if not self.full_passes:
            return {}
        one_pass = self.pass_clock.seconds() / self.full_passes
        return {
            "sam_passes": (self.ascent_passes + self.full_passes) / self._micro_batches,
            "sam_cost": self.step_clock.seconds() / self._micro_batches / one_pass,
        }

    def _is_parallel_to_gradient(self) -> bool:
        config = self.config
        return config.p == 2 and not config.adaptive and config.ascent_steps == 1 and not config.weight_decay_in_ascent
