"""What one run of sharpness-aware updates holds between two passes. It knows tensors and batches, but no Trainer."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from ..config import SAMConfig
from ..engines.base import Engine
from ..methods.auxiliary_lora import AuxiliaryLora
from ..methods.descents import (
    add_orthogonal_part,
    functional_loss,
    orthogonal_part,
    per_example_losses,
    surrogate_gap,
    weighted_sharpness,
)
from ..methods.geometry import (
    adaptive_direction,
    add_weight_decay,
    dual_norm_direction,
    momentum_direction,
    random_direction,
    remove_average,
)
from .batches import MicroBatch
from .observation import displacement_shows_gradient, record_displacement
from .parameters import Gradients, Perturbation, local, put_gradients, select, take_gradients
from .replay import RunningStatistics
from .schedule import Schedule
from .telemetry import Cost, Telemetry


class SharpnessAwareUpdate:
    """The parts of Algorithm 1 (Foret et al. 2021), put together for one model and one run.

    Args:
        config (`SAMConfig`): The user's choices.
        model (`nn.Module`): The model, not wrapped for distributed training.
        optimizer (`torch.optim.Optimizer`): The base optimizer; read for its weight decay, never stepped here.
        engine (`Engine`): How gradients are synchronised and norms are taken.
        max_steps (`int`): Optimizer steps of the whole run.
        warmup_steps (`int`, *optional*, defaults to 0): Those in which the learning rate warms up.
        seed (`int`): For whatever the method draws; the same on every rank, so that ranks decide alike.

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
        warmup_steps: int = 0,
    ):
        self.config = config
        self.engine = engine
        self.scope = engine.scope(config)
        self.schedule = Schedule.resolve(config, max_steps, warmup_steps)
        self.selected = select(model, config.perturb or "all")
        self.names = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.trainable = list(self.names.values())
        self.device = self.trainable[0].device
        self.statistics = RunningStatistics(model)
        self.telemetry = Telemetry(self.device)
        self.cost = Cost(self.device)
        self.window: list[MicroBatch] = []
        self._weight_decay = {
            p: group.get("weight_decay", 0.0) for group in optimizer.param_groups for p in group["params"]
        }
        self._seed = seed
        self._clean: Gradients = {}
        # What the method carries from step to step, one tensor per parameter: Friendly SAM's average gradient, LookSAM's
        # orthogonal part, the gradient that later steps climb along.
        self.state: dict[Parameter, Tensor] = {}
        self.auxiliary = AuxiliaryLora(model, seed) if config.row.ascent == "auxiliary" else None

    def perturbation(self, step: int) -> Perturbation:
        """A context in which weights can be moved, and after which they are bitwise what they were."""
        generator = self._generator(step) if self.config.stochastic_rounding else None
        swaps_memory = self.device.type == "cpu" and not self.engine.parameters_are_views
        return Perturbation(generator, self.engine.renew_copies, swaps_memory)

    # --- where to look -------------------------------------------------------------------------------------------------

    def looks(self, step: int) -> bool:
        """Whether optimizer step `step`, which perturbs, has a pass of its own that shows where to."""
        is_carried = self.config.row.ascent == "carried" and self.schedule.age(step) > 0 and bool(self.state)
        return self.config.row.has_clean_pass and not is_carried

    def ascent_parameters(self, step: int) -> list[Parameter]:
        """The parameters whose gradients the ascent pass of optimizer step `step` has to compute."""
        if self.keeps_clean_gradient:
            return self.trainable
        chosen = list(self.selected.values())
        if self.config.beta is not None and self.config.beta < 1:
            # The same tensors on every rank and in every micro-batch of the step (Du et al. 2022, Section 3.1).
            dice = random.Random(f"{self._seed} {step}")
            chosen = [p for p in chosen if dice.random() < self.config.beta] or [dice.choice(chosen)]
        return chosen

    def climb(self, perturbation: Perturbation, gradients: Gradients, rho: float, *, measured: bool = False) -> None:
        """`w <- w + eps`, one inner ascent step of size `rho / ascent_steps` along `gradients`, which are consumed.

        Args:
            perturbation (`Perturbation`): The context to move the weights in.
            gradients (`Gradients`): Of the ascent pass; those of parameters that are not perturbed are dropped.
            rho (`float`): Radius of the whole perturbation.
            measured (`bool`, *optional*, defaults to `False`): Keep what `observe` needs afterwards.
        """
        config = self.config
        is_first = not perturbation.is_applied
        if is_first and self.keeps_clean_gradient:
            self._clean = {p: local(g).clone() for p, g in gradients.items()}
        parameters = [p for p in self.selected.values() if p in gradients]
        if not parameters:  # nothing perturbed took part in this pass
            return
        reductions = self.engine.reductions(parameters)
        weights, directions = [local(p) for p in parameters], [local(gradients[p]) for p in parameters]
        loss_scale = self.engine.loss_scale(self.device)
        if is_first:
            self.telemetry.record(sam_rho=rho, sam_ascent_grad_norm=reductions.norm(directions) / loss_scale)
        if (
            measured
            and not self.keeps_clean_gradient
            and config.method != "sam"
            and not displacement_shows_gradient(config)
        ):
            self._clean = {p: g.clone() for p, g in zip(parameters, directions, strict=True)}
        if config.weight_decay_in_ascent:
            decay = [self._weight_decay.get(p, 0.0) for p in parameters]
            add_weight_decay(directions, weights, decay, loss_scale)
        if config.row.ascent == "friendly":
            self._remove_average(parameters, directions, loss_scale)
        if config.row.ascent == "carried":
            self.state = {p: g.clone() for p, g in zip(parameters, directions, strict=True)}
        size = rho / config.ascent_steps if config.ascent_steps else rho
        directions, scale = self._maximiser(parameters, directions, size, reductions)
        if config.beta is not None:
            scale = scale / config.beta
        if measured and config.ascent_steps in (None, 1):
            self.telemetry.record(_intended_norm=scale * reductions.norm(directions))
        perturbation.add(parameters, directions, scale)

    def _maximiser(self, parameters, directions, size, reductions) -> tuple[list[Tensor], Tensor]:
        config = self.config
        if config.adaptive:
            weights = [local(p) for p in parameters]
            return adaptive_direction(directions, weights, size, config.p, config.eta, reductions)
        return dual_norm_direction(directions, size, config.p or 2.0, reductions)

    def step_aside(self, perturbation: Perturbation, rho: float, step: int, optimizer: torch.optim.Optimizer) -> None:
        """`w <- w + eps` for an `eps` that needs no pass; nothing while the optimizer has no momentum yet."""
        parameters, borrowed = list(self.selected.values()), False
        if self.config.row.ascent == "random":
            rank = 0 if self.scope == "global" else self.engine.rank
            reductions = self.engine.reductions(parameters)
            directions, scale = random_direction(parameters, rho, self._generator(step, rank), reductions)
        elif self.config.row.ascent in ("previous", "carried"):
            parameters = [p for p in parameters if p in self.state]
            if not parameters:  # no step has gone before
                return
            reductions = self.engine.reductions(parameters)
            rho *= (1.0 if self.config.alpha is None else self.config.alpha) ** self.schedule.age(step)
            directions = [self.state[p] for p in parameters]
            borrowed = not self.config.adaptive and self.config.p in (None, 2)  # other norms overwrite what they get
            if not borrowed:
                directions = [direction.clone() for direction in directions]
            directions, scale = self._maximiser(parameters, directions, rho, reductions)
        else:
            momenta = {p: momentum_of(optimizer, p) for p in parameters}
            parameters = [p for p in parameters if momenta[p] is not None]
            if not parameters and step > self.cost.first_step:
                name = type(getattr(optimizer, "optimizer", optimizer)).__name__  # inside Accelerate's wrapper
                raise ValueError(
                    f"method='msam' perturbs along the optimizer's momentum, and {name} keeps none that can be read. Use one with "
                    "`exp_avg` (optim='adamw_torch') or `momentum_buffer` (SGD with momentum=0.9)."
                )
            if not parameters:  # the optimizer has not stepped yet
                return
            reductions = self.engine.reductions(parameters)
            directions, scale = momentum_direction([momenta[p] for p in parameters], rho, reductions)
            borrowed = True
        self.telemetry.record(sam_rho=rho)
        perturbation.add(parameters, directions, scale, borrowed=borrowed)

    def keep_gradient(self) -> None:
        """For the step to come: what this one goes along, before clipping."""
        if self.config.row.ascent == "previous":
            gradients = self.engine.gradients(list(self.selected.values()))
            self.state = {p: local(g).clone() for p, g in gradients.items()}

    def climb_beside(self, rho: float, optimizer: torch.optim.Optimizer) -> None:
        """Bi-LoRA's ascent, at the base optimizer's learning rate."""
        loss_scale = self.engine.loss_scale(self.device)
        norm = self.auxiliary.climb(rho, optimizer.param_groups[0]["lr"], loss_scale)
        self.telemetry.record(sam_rho=rho, sam_perturbation_norm=norm)

    def _remove_average(self, parameters: list[Parameter], gradients: list[Tensor], loss_scale: Tensor | float) -> None:
        averages = [self.state.setdefault(p, torch.zeros_like(local(p))) for p in parameters]
        own = [g.clone() for g in gradients]
        remove_average(gradients, averages, self.config.sigma, loss_scale)
        torch._foreach_mul_(averages, self.config.ema_decay)
        torch._foreach_add_(averages, torch._foreach_mul(own, (1 - self.config.ema_decay) / loss_scale))

    def _generator(self, step: int, rank: int = 0) -> torch.Generator:
        """Random numbers that depend on nothing but seed, step and rank, so that a resumed run draws the same ones."""
        return torch.Generator(self.device).manual_seed(random.Random(f"{self._seed} {step} {rank}").getrandbits(63))

    def state_dict(self) -> dict[str, Tensor]:
        """What the method carries from step to step, by name, for a checkpoint."""
        if self.auxiliary is not None:
            return self.auxiliary.state_dict()
        return {name: self.state[p] for name, p in self.names.items() if p in self.state}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state_dict`."""
        if self.auxiliary is not None:
            self.auxiliary.load_state_dict(state)
        else:
            self.state = {self.names[name]: tensor for name, tensor in state.items()}

    # --- what to step along --------------------------------------------------------------------------------------------

    @property
    def keeps_clean_gradient(self) -> bool:
        """Whether the descent combines `g` with `g_s`: one more copy of the parameters."""
        return self.config.row.combines or bool(self.config.second_order)

    def combine(
        self,
        accumulated: Gradients,
        rho: float,
        is_last: bool,
        hessian_vector_product: Callable[[dict[Parameter, Tensor]], dict[Parameter, Tensor]],
    ) -> None:
        """`p.grad` from `g_s` to what the optimizer steps along, added to the earlier micro-batches' `accumulated`.

        Where `g` and `g_s` are this rank's own, so is the combination, and the ranks' mean is taken at the end.
        """
        config = self.config
        perturbed = take_gradients(self.trainable)
        parameters = [p for p in self.trainable if p in perturbed or p in self._clean]
        reductions = self.engine.reductions(parameters)
        g = [self._clean[p] if p in self._clean else torch.zeros_like(local(p)) for p in parameters]
        descents = [perturbed[p] if p in perturbed else torch.zeros_like(p) for p in parameters]
        g_s = [local(gradient) for gradient in descents]
        self._clean = {}
        if config.row.descent == "surrogate-gap":
            surrogate_gap(g, g_s, config.alpha, reductions)
        elif config.row.descent == "weighted":
            weighted_sharpness(g, g_s, config.gamma)
        elif config.row.descent == "reused":
            self.state = dict(zip(parameters, orthogonal_part(g, g_s, reductions), strict=True))
        if config.second_order:
            self._add_second_order(parameters, g, g_s, rho, hessian_vector_product)
        for p, gradient in zip(parameters, descents, strict=True):
            p.grad = accumulated[p].add_(gradient) if p in accumulated else gradient
        put_gradients({p: gradient for p, gradient in accumulated.items() if p.grad is None})
        self._average(is_last)

    def examine_clean(self, batch: MicroBatch, loss: Tensor, outputs, labels: Tensor | None, shifted: bool) -> Tensor:
        """Leave with `batch` what a descent with a changed loss needs of the clean pass; returns the loss unchanged."""
        logits = logits_of(outputs, self.config.method)
        if self.config.row.descent == "functional":
            (batch.clean,) = torch.autograd.grad(loss, logits, retain_graph=True)
        else:
            batch.clean = per_example_losses(logits.detach(), labels, shifted)
        return loss

    def examine_perturbed(
        self, batch: MicroBatch, loss: Tensor, outputs, labels: Tensor | None, shifted: bool
    ) -> Tensor:
        """The loss to descend on."""
        if self.config.row.descent == "functional" and batch.clean is not None:
            return functional_loss(loss, logits_of(outputs, self.config.method), batch.clean)
        return loss

    def reuse(self, is_last: bool) -> None:
        """LookSAM's steps between: `p.grad` of a plain pass, led along the part of `g_s` that was kept."""
        parameters = [p for p in self.trainable if p.grad is not None and p in self.state]
        if not is_last or not parameters:
            return
        kept = [self.state[p] for p in parameters]
        gradients = self.engine.gradients(parameters)
        parts = [local(gradients[p]) for p in parameters]
        add_orthogonal_part(parts, kept, self.config.alpha, self.engine.reductions(parameters))
        put_gradients(gradients)
        self._average(is_last)

    def _add_second_order(self, parameters, g, g_s, rho, hessian_vector_product) -> None:
        selected = set(self.selected.values())
        perturbed = [i for i, p in enumerate(parameters) if p in selected]
        reductions = self.engine.reductions([parameters[i] for i in perturbed])
        g, v = [g[i] for i in perturbed], [g_s[i] for i in perturbed]
        norm = reductions.norm(g) / self.engine.loss_scale(self.device)
        v = orthogonal_part(g, v, reductions)
        product = hessian_vector_product({parameters[i]: v_i for i, v_i in zip(perturbed, v, strict=True)})
        if self.scope == "global":  # g and g_s are the ranks' means: so has the product to be
            put_gradients(product)
            self.engine.average_gradients(self.trainable)
            product = take_gradients(self.trainable)
        plain = [gradient.clone() for gradient in g_s]
        for p, gradient in zip(parameters, g_s, strict=True):
            gradient.add_(torch.nan_to_num(product[p] * (rho / norm), nan=0.0, posinf=0.0, neginf=0.0))
        reductions = self.engine.reductions(parameters)
        cosine = reductions.dot(plain, g_s) / (reductions.norm(plain) * reductions.norm(g_s))
        self.telemetry.record(sam_second_order_cosine=cosine)

    def _average(self, is_last: bool) -> None:
        if is_last and self.scope != "global":
            self.engine.average_gradients(self.trainable)

    # --- what a run logs -----------------------------------------------------------------------------------------------

    def observe(self, perturbation: Perturbation, perturbed: Gradients) -> None:
        """Record the realised size of the perturbation, and the cosine between `g` and `g_s` where `g` is at hand."""
        record_displacement(self.telemetry, self.engine, self.config, perturbation, perturbed, self._clean)
        if not self.keeps_clean_gradient:
            self._clean = {}

    def close_window(self) -> list[MicroBatch]:
        """The micro-batches that share one perturbation; the next one starts a new window."""
        window, self.window = self.window, []
        return window

    def close_step(self) -> None:
        """Record the losses of the optimizer step whose last micro-batch this was."""
        losses = self.telemetry.close_step()
        self.telemetry.record(sam_perturbed_loss=losses["perturbed_loss"])
        if "clean_loss" in losses:  # a one-pass method never sees it
            self.telemetry.record(sam_sharpness=losses["perturbed_loss"] - losses["clean_loss"])

    def effective_m(self, batch_size: int, accumulation_steps: int, world_size: int) -> int:
        """Examples that share one perturbation, where every micro-batch is full."""
        if self.scope == "micro":
            return min(self.config.m or batch_size, batch_size)
        return batch_size * accumulation_steps * (world_size if self.scope == "global" else 1)


def momentum_of(optimizer: torch.optim.Optimizer, parameter: Parameter) -> Tensor | None:
    """The optimizer's average of past gradients of `parameter`, None where it has none that can be read.

    One that is kept in few bits (torchao's 8-bit and 4-bit optimizers) is returned as the numbers it stands for.
    """
    state = optimizer.state.get(parameter, {})
    momentum = state.get("exp_avg", state.get("momentum_buffer"))
    if momentum is None:
        return None
    momentum = local(momentum)
    return momentum if type(momentum) in (Tensor, Parameter) else momentum.dequantize()


def logits_of(outputs, method: str) -> Tensor:
    """The model's logits.

    Raises:
        ValueError: The output has none.
    """
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
    if logits is None:
        raise ValueError(f"method={method!r} needs a model whose output has `logits`; this one returned none.")
    return logits
