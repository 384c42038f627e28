"""What the second pass sees, and what it must leave alone."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
import torch
from integration import tiny
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer

from hf_sam import SAMConfig, SAMTrainer

# PEFT still reads the name that transformers has given up.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
SCOPES = ("micro", "device", "global")


class DropoutMasks:
    """Forward hooks that note the mask of every dropout layer, pass by pass."""

    def __init__(self, model: nn.Module):
        self.passes: list[list[torch.Tensor]] = []
        model.register_forward_pre_hook(lambda *_: self.passes.append([]))
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.register_forward_hook(lambda _, inputs, output: self.passes[-1].append(output == 0))


def masks(tmp_path, scope: str, replay_rng: bool) -> list[list[torch.Tensor]]:
    model = tiny.mlp(dropout=0.5)
    noted = DropoutMasks(model)
    sam = SAMConfig(rho=0.05, scope=scope, replay_rng=replay_rng)
    tiny.trained(model, tiny.vectors(), tmp_path, sam, gradient_accumulation_steps=2, max_steps=2)
    return noted.passes


def pairs(scope: str, steps: int) -> list[tuple[int, int]]:
    """Positions of the clean and the perturbed pass of each micro-batch, two micro-batches a step."""
    within = [(0, 1), (2, 3)] if scope == "micro" else [(0, 2), (1, 3)]
    return [(4 * step + clean, 4 * step + perturbed) for step in range(steps) for clean, perturbed in within]


@pytest.mark.parametrize("scope", SCOPES)
def test_dropout_masks_are_those_of_the_clean_pass(scope, tmp_path):
    passes = masks(tmp_path, scope, replay_rng=True)
    assert len(passes) == 8
    assert all(len(layers) == 1 for layers in passes)
    for clean, perturbed in pairs(scope, steps=2):
        assert torch.equal(passes[clean][0], passes[perturbed][0])
    clean = [passes[i][0] for i, _ in pairs(scope, steps=2)]
    assert not any(torch.equal(clean[0], other) for other in clean[1:])


@pytest.mark.parametrize("scope", SCOPES)
def test_fresh_dropout_masks_on_request(scope, tmp_path):
    passes = masks(tmp_path, scope, replay_rng=False)
    for clean, perturbed in pairs(scope, steps=2):
        assert not torch.equal(passes[clean][0], passes[perturbed][0])


class Noted:
    """A `compute_loss` that draws from every generator and pops what it uses from the inputs."""

    drawn: list[tuple]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        inputs["x"] = inputs["x"] + 0.1 * torch.randn(inputs["x"].shape)
        noise = (torch.rand(()).item(), np.random.rand(), random.random())
        type(self).drawn.append(noise)  # a list of the trainer's own would hold the clean passes only
        outputs = model(**inputs)
        loss = nn.functional.cross_entropy(outputs["logits"], labels) * (1 + 0.1 * sum(noise))
        return (loss, outputs) if return_outputs else loss


class NotedSAMTrainer(Noted, SAMTrainer):
    pass


class NotedTrainer(Noted, Trainer):
    pass


@pytest.mark.parametrize("scope", SCOPES)
def test_a_loss_that_pops_labels_and_draws_from_every_generator(scope, tmp_path):
    def run(trainer_class, **kwargs):
        tiny.set_seed(2)
        args = tiny.arguments(tmp_path, gradient_accumulation_steps=2, remove_unused_columns=False)
        trainer = trainer_class(model=tiny.mlp(), args=args, train_dataset=tiny.vectors(), **kwargs)
        trainer_class.drawn = []
        trainer.train()
        return trainer

    ours, stock = run(NotedSAMTrainer, sam_config=SAMConfig(rho=1e-30, scope=scope)), run(NotedTrainer)
    assert len(set(stock.drawn)) == 6
    assert Counter(ours.drawn) == Counter(stock.drawn * 2)
    assert tiny.same_bits(tiny.state(ours.model), tiny.state(stock.model))


@pytest.mark.parametrize(
    ("scope", "accumulation", "compiles"),
    [*((scope, accumulation, False) for scope in SCOPES for accumulation in (1, 2)), ("device", 2, True)],
)
def test_running_statistics_move_once_per_micro_batch(scope, accumulation, compiles, tmp_path):
    """Expected from the inputs alone: the first layer is frozen, so what reaches BatchNorm never changes."""

    def frozen_first_layer():
        model = tiny.mlp(batch_norm=True)
        model.first.requires_grad_(False)
        return model

    options = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if compiles else {}
    trainer = tiny.trained(
        frozen_first_layer(),
        tiny.vectors(),
        tmp_path,
        SAMConfig(rho=0.5, scope=scope),
        gradient_accumulation_steps=accumulation,
        **options,
    )
    reference = frozen_first_layer().norm.train()
    batches = torch.stack([row["x"] for row in tiny.vectors()]).split(4)
    with torch.no_grad():
        for batch in batches[: 3 * accumulation]:
            reference(frozen_first_layer().first(batch))
    assert trainer.model.norm.num_batches_tracked == 3 * accumulation
    torch.testing.assert_close(trainer.model.norm.running_mean, reference.running_mean)
    torch.testing.assert_close(trainer.model.norm.running_var, reference.running_var)
    assert trainer.model.norm.momentum == reference.momentum


@pytest.mark.parametrize("scope", SCOPES)
def test_a_batch_norm_in_evaluation_mode_stays_as_it_is(scope, tmp_path):
    class Frozen(tiny.Mlp):
        def train(self, mode=True):
            super().train(mode)
            self.norm.eval()
            return self

    tiny.set_seed(0)
    model = Frozen(batch_norm=True)
    tiny.trained(model, tiny.vectors(), tmp_path, SAMConfig(rho=0.5, scope=scope))
    assert model.norm.num_batches_tracked == 0
    assert torch.equal(model.norm.running_mean, torch.zeros(8))


# --- parameters that do not take part ------------------------------------------------------------------------------


class Alternating(tiny.Mlp):
    """Uses its branch in every other forward pass: in one of the two passes of a step."""

    calls = 0

    def forward(self, x, labels=None):
        Alternating.calls += 1  # on the module it would be the same in both passes
        x = x.clone()
        x[0, 0] = 1.0 if Alternating.calls % 2 == self.used_when else -1.0
        return super().forward(x, labels)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("used_in", ["clean pass", "perturbed pass"])
def test_a_parameter_without_gradient_in_one_pass(used_in, scope, tmp_path):
    tiny.set_seed(0)
    model, Alternating.calls = Alternating(branch=True), 0
    model.used_when = 1 if used_in == "clean pass" else 0
    before = tiny.state(model)
    trainer = tiny.trained(model, tiny.vectors(), tmp_path, SAMConfig(rho=0.5, scope=scope), optim="sgd")
    after = tiny.state(model)
    moved = not torch.equal(before["branch.weight"], after["branch.weight"])
    assert moved == (used_in == "perturbed pass")  # only g_s moves it
    assert all(value == pytest.approx(0.5, rel=1e-5) for value in tiny.logged(trainer, "sam_perturbation_norm"))


def test_part_of_the_weights_has_the_same_gradient_under_reentrant_checkpointing(tmp_path):
    """Reentrant checkpoints compute no gradient where their input needs none, as with embeddings that are not perturbed."""
    norms = []
    for reentrant in (False, True):
        trainer = tiny.trained(
            tiny.vit(),
            tiny.images(),
            tmp_path,
            SAMConfig(rho=0.1, perturb="no-embeddings"),
            activation_checkpointing=True,
            activation_checkpointing_kwargs={"use_reentrant": reentrant},
        )
        norms.append(tiny.logged(trainer, "sam_ascent_grad_norm"))
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


@pytest.mark.parametrize("scope", SCOPES)
def test_only_unused_parameters_are_chosen(scope, tmp_path):
    """No example reaches the branch, so nothing is perturbed, and the run is the stock Trainer's."""
    data = [{**row, "x": row["x"].abs().neg()} for row in tiny.vectors()]
    sam = SAMConfig(rho=0.5, scope=scope, perturb=["branch.*"])
    ours = tiny.trained(tiny.mlp(branch=True), data, tmp_path, sam, gradient_accumulation_steps=2)
    stock = tiny.trained(tiny.mlp(branch=True), data, tmp_path, None, gradient_accumulation_steps=2)
    assert torch.equal(torch.stack(ours.trajectory), torch.stack(stock.trajectory))


@pytest.mark.parametrize("scope", SCOPES)
def test_a_tied_weight_is_perturbed_once(scope, tmp_path):
    model = tiny.gpt2()
    assert model.lm_head.weight is model.transformer.wte.weight
    trainer = tiny.trained(model, tiny.texts(), tmp_path, SAMConfig(rho=0.5, scope=scope))
    assert tiny.logged(trainer, "sam_perturbation_norm") == pytest.approx([0.5] * 3, rel=1e-5)
    for (_, clean), (_, perturbed) in zip(trainer.passes[::2], trainer.passes[1::2], strict=True):
        assert (perturbed - clean).norm().item() == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("scope", SCOPES)
def test_the_frozen_base_of_an_adapter_never_moves(scope, tmp_path):
    model = tiny.with_lora(tiny.bert(dropout=0.1), ["query", "value"])
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    visited = []

    class Frozen(tiny.WatchedSAMTrainer):
        def compute_loss(self, model, *args, **kwargs):
            visited.append(all(torch.equal(p, frozen[n]) for n, p in self.model.named_parameters() if n in frozen))
            return super().compute_loss(model, *args, **kwargs)

    args = tiny.arguments(tmp_path, gradient_accumulation_steps=2)
    sam = SAMConfig(rho=0.05, scope=scope)
    trainer = Frozen(model=model, args=args, train_dataset=tiny.sentences(), sam_config=sam)
    trainer.train()
    assert len(visited) == 12
    assert all(visited)
    assert all(p.grad is None for n, p in model.named_parameters() if n in frozen)
    assert tiny.logged(trainer, "sam_perturbation_norm") == pytest.approx([0.05] * 3, rel=1e-5)


# --- cost ----------------------------------------------------------------------------------------------------------


def test_tokens_seen_are_counted_once(tmp_path):
    options = {"include_num_input_tokens_seen": "all", "gradient_accumulation_steps": 2}
    ours = tiny.trained(tiny.gpt2(), tiny.texts(), tmp_path, SAMConfig(), **options)
    assert ours.state.num_input_tokens_seen == 3 * 2 * 4 * 8


@pytest.mark.parametrize("scope", SCOPES)
def test_the_step_never_waits_for_a_number_of_the_device(scope, tmp_path):
    """On a GPU every `_local_scalar_dense` stops the host. On the CPU the scale alone may be read, once a step."""

    class CountReads(TorchDispatchMode):
        reads = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.reads += "_local_scalar_dense" in str(func) or "nonzero" in str(func)
            return func(*args, **(kwargs or {}))

    class Counting(tiny.WatchedSAMTrainer):
        def training_step(self, *args, **kwargs):
            with CountReads() as counter:
                loss = super().training_step(*args, **kwargs)
            self.reads.append(counter.reads)
            return loss

    args = tiny.arguments(tmp_path, gradient_accumulation_steps=2, max_steps=4)
    trainer = Counting(
        model=tiny.mlp(torch.bfloat16, dropout=0.1, batch_norm=True),
        args=args,
        train_dataset=tiny.vectors(dtype=torch.bfloat16),
        sam_config=SAMConfig(rho=1.0, scope=scope),
    )
    trainer.reads = []
    trainer.train()
    steps = [sum(trainer.reads[i : i + 2]) for i in range(0, 8, 2)]
    assert max(steps) <= (2 if scope == "micro" else 1), "one perturbation reads its scale, and nothing else is read"
