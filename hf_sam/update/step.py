"""One optimizer step of Algorithm 1 (Foret et al. 2021), for every method and engine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from transformers.utils import logging

from ..config import Parts, SAMConfig
from ..methods.base import Needs, overrides
from .ascent_step import AscentStep
from .batches import MicroBatch, checked_indices
from .current_step import CurrentStep
from .memory import Memory
from .optimizer_gradient import OptimizerGradient
from .parameters import Gradients, TrainedParameters, put_gradients, take_gradients
from .perturbation import Perturbation
from .replay import PassState
from .runner import Passes, PassRunner
from .schedule import Kind, Schedule, lr_fraction, peak_lr
from .telemetry import Cost, Telemetry
from .vector import Space, Vector

if TYPE_CHECKING:
    from ..engines.base import Engine

logger = logging.get_logger(__name__)

# Whether to work on whole lists of tensors, as on an accelerator; None decides by device. Tests set it.
IN_BUCKETS: bool | None = None
# The key in checkpoints of a skipped step whose ascent the next step repeats.
RETRY_KEY = "_looks_again"


class SharpnessAwareUpdate:
    """The sharpness-aware steps of one run of one model.

    Args:
        config (`SAMConfig`): The user's choices.
        model (`nn.Module`): The model, not wrapped for distributed training.
        optimizer (`torch.optim.Optimizer`): The base optimizer; read, never stepped here.
        engine (`Engine`): Synchronises gradients and computes norms.
        passes (`Passes`): Runs one pass of the trainer.
        max_steps (`int`): Optimizer steps of the whole run.
        seed (`int`): Seed of the method's random numbers; must be the same on every rank.
        warmup_steps (`int`, *optional*, defaults to 0): Learning rate warm-up steps.
        scheduler (*optional*): The learning rate scheduler.
        others (`dict[str, nn.Module]`, *optional*): Modules outside the model that the loss uses, by name.
        train_dataset (*optional*): The training data, for methods that need it.
        owner (`object`, *optional*): An object whose plain attributes are restored for the second pass.
        ignored (`Iterable[str]`, *optional*): Attributes of `owner` that are not restored.
        also_tracked (`Sequence[Any]`, *optional*): Further objects whose contents are restored.

    Raises:
        ValueError: `config.perturb` selects nothing, or no step of the run would be perturbed.
    """

    def __init__(
        self,
        config: SAMConfig,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        engine: Engine,
        passes: Passes,
        *,
        max_steps: int,
        seed: int,
        warmup_steps: int = 0,
        scheduler: Any = None,
        others: dict[str, nn.Module] | None = None,
        owner: object | None = None,
        ignored: Iterable[str] = (),
        also_tracked: Sequence[Any] = (),
        train_dataset: Any = None,
    ):
        ascent, descent = config.parts
        self.config, self.parts, self.engine = config, Parts(ascent.resolved(train_dataset), descent), engine
        self.needs = self.parts.needs
        self.scope = "micro" if self.needs & Needs.UNEVEN_PASSES else engine.scope(config)
        self.schedule = Schedule.resolve(config, max_steps, warmup_steps)
        groups = optimizer if engine.optimizer_holds_parameters else None
        self.parameters = TrainedParameters(model, config.perturb or "all", groups, others, engine.parameters_move)
        self.device = self.parameters.trainable[0].device
        in_buckets = self.device.type != "cpu" if IN_BUCKETS is None else IN_BUCKETS
        self.space = Space(engine.reductions, list(self.parameters.names), in_buckets)
        self.telemetry, self.cost = Telemetry(self.device), Cost(self.device)
        self.attached = self.parts.ascent.attach(model, seed)
        self.memory = Memory((*ascent.memory, *descent.memory), config.label, engine.may_skip_steps, ascent.scalars)
        roots = [model, *(others or {}).values()]
        state = PassState(roots, owner, ignored, not engine.parameters_move, also_tracked)
        self.runner = PassRunner(passes, config, self.parts, engine, self.parameters, state, self.telemetry, self.cost)
        self.optimizer_gradient = OptimizerGradient(
            descent, engine, self.parameters, self.space, self.runner, self.scope, self.device
        )
        self.ascent_step = AscentStep(
            self.parts, config, engine, self.parameters, self.space, optimizer, self.telemetry, model
        )
        self.index, self.kind = 0, Kind.PLAIN
        self.optimizer, self._seed = optimizer, seed
        self._max_steps = max_steps
        # Finding the peak calls the functions of the user's schedule, which may count their calls or draw.
        self._peak_lr = peak_lr(optimizer, scheduler, max_steps) if config.rho_schedule == "lr" else 0.0
        self._window: list[MicroBatch] = []
        self._accumulated: Gradients = {}
        self._micro, self._has_uncommitted_memory, self._retries_ascent = 0, False, False
        self._has_stepped = False

    # --- Algorithm 1 -------------------------------------------------------------------------------------------------

    def run(
        self, model: nn.Module, batch: MicroBatch, index: int, is_last: bool, measured: Callable[[], bool]
    ) -> Tensor:
        """Run one micro-batch of optimizer step `index` and return its loss.

        Weights are unperturbed when this returns. If one perturbation serves the whole accumulation window, every
        micro-batch runs its ascent pass, and the last one also runs the descent passes of the window.

        Args:
            model (`nn.Module`): The model as wrapped by the trainer.
            batch (`MicroBatch`): The micro-batch.
            index (`int`): The optimizer step, from 0.
            is_last (`bool`): Whether this is the last micro-batch, after which the optimizer steps.
            measured (`Callable[[], bool]`): Returns whether the values of this step are about to be logged.
        """
        if self._micro == 0 or index != self.index:  # the latter after an error that user code has caught
            self._begin(model, index, measured())
        step = {
            Kind.PLAIN: self._plain_step,
            Kind.BETWEEN: self._between_step,
            Kind.ONE_PASS: self._one_pass_step,
            Kind.TWO_PASSES: self._sharpness_aware_step,
        }[self.kind]
        if self.kind is not Kind.TWO_PASSES:
            batch = batch.without(getattr(self.parts.ascent, "part", None))
        with self.cost.micro_batch(index), self._gradients_kept_on_error():
            loss = step(model, batch, is_last)
            if is_last and self.kind in (Kind.ONE_PASS, Kind.TWO_PASSES):
                self._finish()
        self._micro = 0 if is_last else self._micro + 1
        self._has_uncommitted_memory = True
        if is_last:
            self.engine.finish_step()
        return loss

    def _sharpness_aware_step(self, model: nn.Module, batch: MicroBatch, is_last: bool) -> Tensor:
        """Run the two-pass step on the micro-batch, on its parts of `m` examples, or on chosen examples."""
        if self.needs & Needs.UNEVEN_PASSES:
            return self._step_with_perturbed_examples(model, batch, is_last)
        m = self.config.m
        if m is None or (batch.size is not None and batch.size <= m):
            return self._two_pass_step(model, batch, is_last)
        self.runner.find_loss_combination(batch, m)
        parts = [batch.part(indices) for indices in batch.chunks(m)]
        return torch.stack([self._two_pass_step(model, part, is_last and part is parts[-1]) for part in parts]).sum()

    def _two_pass_step(self, model: nn.Module, batch: MicroBatch, is_last: bool) -> Tensor:
        """Run Algorithm 1: on this micro-batch, or on the accumulation window once its last micro-batch is here."""
        if self.scope == "micro" or not self._window:  # otherwise p.grad holds the ascent gradient of the window so far
            self._accumulated = take_gradients(self.parameters.trainable)
        # g = grad L(w), in p.grad
        synced = is_last and self.scope == "global"
        clean_loss = self.runner.ascend(model, batch, self._ascent_parameters, self._step(), synced=synced)
        if self._update_parameters():  # the loss itself has frozen or thawed layers
            self._ascent_parameters = self._parameters_for_ascent()
        self._window.append(batch)
        if self.scope != "micro" and not is_last:
            return clean_loss if self.runner.sees_all else torch.zeros_like(clean_loss)
        window, self._window = self._window, []
        accumulated = self._accumulated

        gradients = self.engine.take_gradients(self.parameters.trainable)
        g = self.optimizer_gradient.vector(gradients, self.parameters.selected)
        clean = self._copy(g, gradients) if self.needs & Needs.CLEAN_GRADIENT else None
        can_repeat = self._can_repeat(window)
        with (
            self.runner.preserving_state(),
            self.ascent_step.weights(self._step()) as weights,
            self.parts.ascent.applied(self._step()),
        ):
            eps = self._eps(g, window) if can_repeat else None
            del g
            if eps is None and self._is_complete:  # no perturbation: step along g
                self.optimizer_gradient.assign(
                    self.optimizer_gradient.vector(gradients), gradients, accumulated, is_last
                )
                return clean_loss
            gradients.clear()  # frees those that eps does not use; g is no longer needed
            if eps is not None:
                weights.add(eps)  # w + eps
                eps = None  # so that its memory is freed when the weights are restored
                self._take_inner_ascent_steps(model, weights, window, is_last)
            if not self.parts.combines:
                put_gradients(accumulated)
            # g_s = grad L(w + eps), in p.grad; not averaged over ranks if a gradient built from it is averaged later.
            synced = is_last and (self.scope == "global" or not (self.parts.combines or self.parts.ascent.may_skip))
            perturbed_loss = self.runner.descend(model, window, synced=synced)
            if self.ascent_step.is_measured:
                # Without a cosine if g_s includes gradients of other micro-batches.
                is_alone = self.parts.combines or not accumulated
                perturbed = self.engine.gradients(self.parameters.selected) if is_alone else {}
                self.ascent_step.observe(weights, clean, perturbed)
        if self.parts.combines:  # at w again
            with self.runner.preserving_state():
                step = self._step(share=self._share(window), window=window if self.needs & Needs.HVP else None)
                self.optimizer_gradient.combine(clean, accumulated, step, is_last)
        elif self.parts.ascent.may_skip:
            self.optimizer_gradient.average(is_last)
        self.telemetry.add(perturbed_loss=perturbed_loss)
        return clean_loss if self.runner.sees_all else perturbed_loss

    def _copy(self, g: Vector, gradients: Gradients) -> Vector:
        """A copy of the whole gradient; if `g` is the whole gradient, its norm is computed once for both."""
        if self.parameters.selected is not self.parameters.trainable:
            return self.optimizer_gradient.vector(gradients).clone()
        g.norm()
        return g.clone()

    def _eps(self, g: Vector, window: list[MicroBatch], is_first: bool = True) -> Vector | None:
        step = self._step(self.rho / self.parts.ascent.ascent_steps, self._share(window))
        return self.ascent_step.eps(g, step, self.rho, is_first)

    def _share(self, window: list[MicroBatch]) -> float:
        """The fraction of the step's examples that one perturbation serves."""
        return window[0].share if self.scope == "micro" else 1.0

    def _step_with_perturbed_examples(self, model: nn.Module, batch: MicroBatch, is_last: bool) -> Tensor:
        """Run the chosen examples at `w + eps`, with eps from their own gradient, and the others at `w`."""
        ascent = self.parts.ascent
        chosen = ascent.perturbed_examples(batch.inputs, self._step())
        if chosen is None:
            chosen = torch.arange(batch.size or 0)
        chosen = checked_indices(chosen, ascent, "perturbed_examples")
        batch = batch.without(ascent.part)
        others = torch.tensor(sorted(set(range(batch.size or 0)).difference(chosen.tolist())), dtype=torch.long)
        if len(chosen) and len(others):
            self.runner.find_loss_combination(batch, max(1, batch.size // 2))
        losses = []
        if len(others):
            rest = batch.part(others) if len(chosen) else batch
            losses.append(self.runner.run_all(model, [rest], synced=False))
        if len(chosen):
            part = (batch.part(chosen) if len(others) else batch).times(ascent.tail_weight)
            losses.append(self._two_pass_step(model, part, is_last))
        else:
            self.optimizer_gradient.average(is_last)
        return torch.stack(losses).sum()

    def _can_repeat(self, window: list[MicroBatch]) -> bool:
        """Whether the second pass may run: from the same state as the first, or because the step requires it."""
        if all(part.before.is_restorable for part in window):
            return True
        # DeepSpeed ignores assignments to p.grad, so its optimizer cannot step along g.
        without_eps = self._is_complete and self.engine.optimizer_holds_parameters
        logger.warning_once(
            "A pass changed a buffer, a frozen parameter or its inputs in place for the first time, so the previous value is lost. "
            "It will be saved from now on; this one step "
            + ("is not perturbed." if without_eps else "runs its second pass from the state after the first.")
        )
        return not without_eps

    def _take_inner_ascent_steps(
        self, model: nn.Module, weights: Perturbation, window: list[MicroBatch], is_last: bool
    ) -> None:
        """Take the inner ascent steps after the first one."""
        for _ in range(1, self.parts.ascent.ascent_steps):
            self.runner.run_all(model, window, synced=is_last and self.scope == "global", is_ascent=True)
            g = self.optimizer_gradient.vector(
                self.engine.take_gradients(self.parameters.trainable), self.parameters.selected
            )
            eps = self._eps(g, window, is_first=False)
            if eps is not None:
                weights.add(eps)

    def _one_pass_step(self, model: nn.Module, batch: MicroBatch, is_last: bool) -> Tensor:
        """Run a step whose perturbation needs no clean pass; return the perturbed loss."""
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()  # schedule-free optimizers switch weights here, so before eps is added
        step = self._step()
        with self.ascent_step.weights(step) as weights, self.parts.ascent.applied(step):
            eps = self.ascent_step.checked(self.parts.ascent.eps(None, step))
            if eps is not None:
                self.telemetry.record(sam_rho=self.parts.ascent.radius(step))
                weights.add(eps)
            loss = self.runner.run_all(model, [batch], synced=True)
            if self.ascent_step.is_measured and eps is not None:
                self.ascent_step.observe(weights, None, {})
        self.telemetry.add(perturbed_loss=loss)
        return loss

    def _between_step(self, model: nn.Module, batch: MicroBatch, is_last: bool) -> Tensor:
        """Run a plain pass; the descent combines its gradient with its memory."""
        loss = self.runner.run_all(model, [batch], synced=self.scope == "global")
        if is_last:
            self.optimizer_gradient.between(self._step(), is_last)
        return loss

    def _plain_step(self, model: nn.Module, batch: MicroBatch, is_last: bool) -> Tensor:
        """Run the pass of the stock Trainer."""
        return self.runner.run_all(model, [batch], synced=True)

    # --- the kind of step --------------------------------------------------------------------------------------------

    def _begin(self, model: nn.Module, index: int, measured: bool) -> None:
        """Forget what an abandoned step left, commit the memory of the previous one, and update what a step reads."""
        self._micro, self._window, self._accumulated = 0, [], {}
        self.telemetry.close_step()
        self.commit_memory()
        self._update_parameters()
        self.index = self.runner.index = index
        self.ascent_step.is_measured = measured
        self.rho = self.schedule.rho(index, lr_fraction(self.optimizer, self._peak_lr))
        self.kind = self._kind()
        has_ascent_pass = self.kind is Kind.TWO_PASSES
        self._ascent_parameters = self._parameters_for_ascent() if has_ascent_pass else self.parameters.trainable

    def _update_parameters(self) -> bool:
        """Update what depends on which parameters are trained; return whether they have changed."""
        has_changed = self.parameters.refresh()
        if has_changed:
            self.runner.parameters_changed()
            self.space.changed(list(self.parameters.names))
        return has_changed

    def _kind(self) -> Kind:
        if not self.schedule.is_inside(self.index) or not self.parameters.selected:
            return Kind.PLAIN
        ascent, descent = self.parts
        has_between = overrides(descent, "between")
        is_missing = has_between and not self.memory.is_complete
        has_ascent_pass = bool(self.needs & Needs.GRADIENT)
        if self.schedule.is_due(self.index) or self._retries_ascent or is_missing:
            return Kind.TWO_PASSES if has_ascent_pass else Kind.ONE_PASS
        if ascent.perturbs_between:
            return Kind.ONE_PASS if ascent.ready(self._step()) else Kind.TWO_PASSES
        return Kind.BETWEEN if has_between else Kind.PLAIN

    def _parameters_for_ascent(self) -> list[Parameter]:
        """The parameters whose gradients the ascent pass must compute."""
        if self.parts.combines or self.parts.ascent.may_skip:
            return self.parameters.trainable
        if not overrides(self.parts.ascent, "parameters"):
            return self.parameters.selected
        by_name = {self.parameters.names[p]: p for p in self.parameters.selected}
        chosen = self.parts.ascent.parameters(list(by_name), self._step())
        if unknown := set(chosen).difference(by_name):
            raise ValueError(
                f"{type(self.parts.ascent).__name__}.parameters must return some of the names that it is given, not {unknown}."
            )
        return [by_name[name] for name in chosen]

    @property
    def _is_complete(self) -> bool:
        """Whether the optimizer could step along the ascent gradient: all examples, all trainable parameters."""
        return self.runner.sees_all and len(self._ascent_parameters) == len(self.parameters.trainable)

    def commit_memory(self) -> None:
        """Keep what the previous step wrote to memory, unless one of its passes overflowed."""
        if not self._has_uncommitted_memory or self._micro:  # in the middle of a step, nothing is decided yet
            return
        self._has_uncommitted_memory = False
        was_skipped = self.runner.was_skipped()
        self._has_stepped |= not was_skipped
        overflow, self.ascent_step.has_overflowed = self.ascent_step.has_overflowed, None
        if overflow is not None:  # the optimizer may have stepped along a finite g_s nevertheless
            was_skipped |= bool(overflow)
        self.memory.commit(was_skipped)
        # The next step computes what the skipped step should have computed, rather than an interval later.
        self._retries_ascent = was_skipped and bool(self.memory.names) and self.kind is Kind.TWO_PASSES

    def _step(
        self, rho: float | None = None, share: float = 1.0, window: list[MicroBatch] | None = None
    ) -> CurrentStep:
        """The `Step` for the method; with Hessian-vector products if the micro-batches of the `window` are given."""
        rank = self.engine.rank if self.scope != "global" else 0
        return CurrentStep(
            index=self.index,
            progress=self.index / self._max_steps,
            rho=self.rho if rho is None else rho,
            share=share,
            age=0 if self.kind is Kind.TWO_PASSES else self.schedule.age(self.index),
            is_first=not self._has_stepped,
            selected=self.parameters.selected,
            optimizer=self.optimizer,
            space=self.space,
            memory=self.memory,
            seed=(self._seed, rank, self._micro if self.scope == "micro" else 0),
            telemetry=self.telemetry,
            attached=self.attached,
            loss_scale=self.engine.loss_scale(self.device),
            hessian_product=None if window is None else partial(self.optimizer_gradient.hessian_product, window),
        )

    @contextlib.contextmanager
    def _gradients_kept_on_error(self) -> Iterator[None]:
        """A context that puts back the gradients of earlier micro-batches, in case user code skips one that fails."""
        try:
            yield
        except BaseException:
            if not self._window:  # otherwise they are still in p.grad
                put_gradients(self._accumulated)
            raise
        finally:
            if not self._window:
                self._accumulated = {}

    # --- the end of a step -------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        """Call the method's `after` hook with the gradient that the optimizer is about to step along; record losses."""
        if self.needs & Needs.STEP_GRADIENT:
            gradient = self.optimizer_gradient.vector(self.engine.gradients(self.parameters.selected)).share()
            self.parts.ascent.after(gradient, self._step())
        losses = self.telemetry.close_step()
        if "perturbed_loss" not in losses:
            return
        self.telemetry.record(sam_perturbed_loss=losses["perturbed_loss"])
        if "clean_loss" in losses and self.runner.sees_all and not self.runner.descends_on_part:
            self.telemetry.record(sam_sharpness=losses["perturbed_loss"] - losses["clean_loss"])

    def state_dict(self) -> dict[str, Tensor]:
        """The method's state, by name, for a checkpoint."""
        self.commit_memory()
        state = self.memory.state_dict(self.parameters.names)
        if self.attached is not None:
            state |= self.attached.state_dict()
        return state | ({RETRY_KEY: torch.ones(1)} if self._retries_ascent else {})

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state_dict`."""
        self._retries_ascent = state.pop(RETRY_KEY, None) is not None
        if self.attached is not None:
            self.attached.load_state_dict(state)
        else:
            by_name = {name: p for p, name in self.parameters.names.items()}
            self.memory.load_state_dict(state, by_name, self.space)

    def effective_m(self, batch_size: int, accumulation_steps: int) -> int:
        """Number of examples per perturbation if every micro-batch is full."""
        if self.scope == "micro":
            return min(self.config.m or batch_size, batch_size)
        return batch_size * accumulation_steps * (self.engine.batches if self.scope == "global" else 1)
