"""Every method through the Trainer, step by step, against its paper's formula on one flat vector."""

import math

import oracles
import pytest
import torch
import torch.nn.functional as F
from models import OrderedSAMTrainer, arguments, examples, stack, tiny_classifier, train, weights

from hf_sam import METHODS, SAMConfig

LR, DECAY = 0.1, 0.01


def run(folder, config: SAMConfig, steps: int, batch_size: int = 4, accumulation: int = 2, **kwargs) -> torch.Tensor:
    """The flat vector of used parameters after `steps` full-batch steps of SGD with weight decay."""
    model = tiny_classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, weight_decay=DECAY, momentum=kwargs.pop("momentum", 0.0))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    trainer = OrderedSAMTrainer(
        model=model,
        args=arguments(
            folder,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=steps,
            **kwargs,
        ),
        train_dataset=examples(8),
        optimizers=(optimizer, scheduler),
        sam_config=config,
    )
    trainer.train()
    return oracles.flatten(oracles.used_parameters(model))


def reference(step_gradient, steps: int) -> torch.Tensor:
    """The same run on the flat vector: `step_gradient(loss, w, step)` and SGD with weight decay."""
    model = tiny_classifier()
    loss = oracles.loss_function(model, stack(examples(8)))
    w = oracles.flatten(oracles.used_parameters(model))
    for step in range(steps):
        w = w - LR * (step_gradient(loss, w, step) + DECAY * w)
    return w


def assert_equal_to_1e_12(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("p", [1, 1.5, 2, 3, math.inf])
def test_sam_trajectory_for_every_norm(tmp_path, p):
    rho = 0.05
    actual = run(tmp_path, SAMConfig(rho=rho, p=p), steps=5)
    assert_equal_to_1e_12(actual, reference(lambda loss, w, step: oracles.sam(loss, w, rho, p), steps=5))


def test_sam_moves_away_from_plain_training(tmp_path):
    sam = run(tmp_path, SAMConfig(rho=0.05), steps=5)
    plain = reference(lambda loss, w, step: oracles.gradient(loss, w), steps=5)
    assert (sam - plain).abs().max() > 1e-4


@pytest.mark.parametrize("eta", [0.01, 0.0])
def test_asam_trajectory(tmp_path, eta):
    actual = run(tmp_path, SAMConfig(method="asam", rho=0.5, eta=eta), steps=5)
    assert_equal_to_1e_12(actual, reference(lambda loss, w, step: oracles.asam(loss, w, 0.5, eta), steps=5))


@pytest.mark.parametrize("steps", [2, 3])
def test_inner_ascent_steps(tmp_path, steps):
    actual = run(tmp_path, SAMConfig(rho=0.3, ascent_steps=steps), steps=3)
    assert_equal_to_1e_12(actual, reference(lambda loss, w, step: oracles.sam(loss, w, 0.3, steps=steps), steps=3))


def test_weight_decay_in_ascent(tmp_path):
    actual = run(tmp_path, SAMConfig(rho=0.3, weight_decay_in_ascent=True), steps=3)
    assert_equal_to_1e_12(actual, reference(lambda loss, w, step: oracles.sam(loss, w, 0.3, decay=DECAY), steps=3))


def test_gsam(tmp_path):
    config = SAMConfig(method="gsam", rho=0.2, alpha=0.4, rho_schedule="constant")
    assert_equal_to_1e_12(
        run(tmp_path, config, steps=3), reference(lambda loss, w, step: oracles.gsam(loss, w, 0.2, 0.4), steps=3)
    )


def test_wsam(tmp_path):
    actual = run(tmp_path, SAMConfig(method="wsam", rho=0.2, gamma=0.9), steps=3)
    assert_equal_to_1e_12(actual, reference(lambda loss, w, step: oracles.wsam(loss, w, 0.2, 0.9), steps=3))


def test_friendly(tmp_path):
    state = {}
    actual = run(tmp_path, SAMConfig(method="friendly", rho=0.2, sigma=0.8, ema_decay=0.6), steps=4)
    expected = reference(lambda loss, w, step: oracles.friendly(loss, w, 0.2, 0.8, 0.6, state), steps=4)
    assert_equal_to_1e_12(actual, expected)


def test_looksam(tmp_path):
    state = {}
    actual = run(tmp_path, SAMConfig(method="looksam", rho=0.2, alpha=0.7, interval=3), steps=7)
    expected = reference(lambda loss, w, step: oracles.looksam(loss, w, 0.2, 0.7, 3, step, state), steps=7)
    assert_equal_to_1e_12(actual, expected)


def test_functional(tmp_path):
    batch = stack(examples(8))
    logits = oracles.loss_function(tiny_classifier(), batch, part="logits")
    expected = reference(
        lambda loss, w, step: oracles.functional(loss, logits, lambda z: F.cross_entropy(z, batch["labels"]), w, 0.2),
        steps=3,
    )
    assert_equal_to_1e_12(run(tmp_path, SAMConfig(method="functional", rho=0.2), steps=3), expected)


def test_msam_perturbs_along_minus_momentum(tmp_path):
    model, rho = tiny_classifier(), 0.3
    loss = oracles.loss_function(model, stack(examples(8)))
    w, v = oracles.flatten(oracles.used_parameters(model)), None
    for _ in range(4):
        eps = 0.0 if v is None else -rho * v / v.norm()
        g = oracles.gradient(loss, w + eps) + DECAY * w
        v = g if v is None else 0.9 * v + g
        w = w - LR * v
    assert_equal_to_1e_12(run(tmp_path, SAMConfig(method="msam", rho=rho), steps=4, momentum=0.9), w)


def test_msam_waits_for_warm_up(tmp_path):
    few = run(tmp_path, SAMConfig(method="msam", rho=0.3), steps=3, momentum=0.9, warmup_steps=2)
    model = tiny_classifier()
    loss = oracles.loss_function(model, stack(examples(8)))
    w, v = oracles.flatten(oracles.used_parameters(model)), None
    for step in range(3):
        eps = -0.3 * v / v.norm() if step == 2 else 0.0
        g = oracles.gradient(loss, w + eps) + DECAY * w
        v = g if v is None else 0.9 * v + g
        w = w - LR * v
    assert_equal_to_1e_12(few, w)


def test_msam_without_momentum_names_the_remedy(tmp_path):
    with pytest.raises(ValueError, match=r"SGD has no readable.*momentum=0\.9"):
        run(tmp_path, SAMConfig(method="msam"), steps=3)


def test_previous_perturbs_along_the_gradient_of_the_previous_step(tmp_path):
    state = {}

    def step_gradient(loss, w, step):
        eps = oracles.eps_of(state["g"], 0.2, 2) if state else 0.0
        state["g"] = oracles.gradient(loss, w + eps)
        return state["g"]

    actual = run(tmp_path, SAMConfig(method="previous", rho=0.2), steps=4)
    assert_equal_to_1e_12(actual, reference(step_gradient, steps=4))


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("alpha", [1.0, 0.7, 0.0])
def test_carried_perturbs_along_the_last_gradient_it_computed(tmp_path, alpha, adaptive):
    state = {}

    def step_gradient(loss, w, step):
        if step % 3 == 0:
            state["g"] = oracles.gradient(loss, w)
        rho = 0.2 * alpha ** (step % 3)
        if rho == 0:
            return oracles.gradient(loss, w)
        eps = oracles.eps_adaptive(state["g"], w, rho, 0.01) if adaptive else oracles.eps_of(state["g"], rho, 2)
        return oracles.gradient(loss, w + eps)

    config = SAMConfig(method="carried", rho=0.2, interval=3, alpha=alpha, ascent_fraction=1.0, adaptive=adaptive)
    assert_equal_to_1e_12(run(tmp_path, config, steps=7), reference(step_gradient, steps=7))


def test_subset_perturbs_along_the_gradient_of_the_first_examples_of_each_micro_batch(tmp_path):
    model, rows = tiny_classifier(), examples(8)
    whole = oracles.loss_function(model, stack(rows))
    seen = oracles.loss_function(model, stack(rows[:1] + rows[4:5]))  # a quarter of each of the two micro-batches

    def step_gradient(loss, w, step):
        return oracles.gradient(whole, w + oracles.eps_of(oracles.gradient(seen, w), 0.2, 2))

    actual = run(tmp_path, SAMConfig(method="subset", rho=0.2), steps=3)
    assert_equal_to_1e_12(actual, reference(step_gradient, steps=3))


def test_norm_only_leaves_all_other_weights_unperturbed(tmp_path):
    model = tiny_classifier()
    names = oracles.used_parameters(model)
    mask = oracles.flatten({name: torch.full_like(p, float("norm" in name)) for name, p in names.items()})

    def step_gradient(loss, w, step):
        return oracles.gradient(loss, w + oracles.eps_of(oracles.gradient(loss, w) * mask, 0.5, 2))

    actual = run(tmp_path, SAMConfig(method="norm-only", rho=0.5), steps=3)
    assert_equal_to_1e_12(actual, reference(step_gradient, steps=3))


def test_esam_descends_on_the_hardest_hit_examples(tmp_path):
    model, rows, rho, gamma = tiny_classifier(), examples(8), 0.2, 0.5
    logits = oracles.loss_function(model, stack(rows), part="logits")
    labels = stack(rows)["labels"]

    def step_gradient(loss, w, step):
        w_eps = w + oracles.eps_of(oracles.gradient(loss, w), rho, 2)
        before, after = (F.cross_entropy(logits(v), labels, reduction="none") for v in (w, w_eps))
        kept = (after - before).sort(descending=True).indices[: int(gamma * len(rows))]
        return oracles.gradient(lambda v: F.cross_entropy(logits(v)[kept], labels[kept]), w_eps)

    config = SAMConfig(method="esam", rho=rho, beta=1.0, gamma=gamma)
    actual = run(tmp_path, config, steps=3, batch_size=8, accumulation=1)
    assert_equal_to_1e_12(actual, reference(step_gradient, steps=3))


def test_esam_perturbs_a_random_share_of_tensors_by_eps_over_beta(tmp_path):
    trainer = train(tmp_path, SAMConfig(method="esam", rho=0.2, beta=0.5, gamma=1.0), max_steps=1)
    chosen = {id(p) for p in trainer._sam._ascent_parameters}
    model = tiny_classifier()
    loss = oracles.loss_function(model, stack(examples(8)[:4]))
    is_chosen = {name: id(p) in chosen for name, p in trainer.model.named_parameters()}
    names = oracles.used_parameters(model)
    mask = oracles.flatten({name: torch.full_like(p, float(is_chosen[name])) for name, p in names.items()})
    assert 0 < mask.mean() < 1
    w = oracles.flatten(names)
    g_s = oracles.gradient(loss, w + oracles.eps_of(oracles.gradient(loss, w) * mask, 0.2, 2) / 0.5)
    assert_equal_to_1e_12(oracles.flatten(oracles.used_parameters(trainer.model)), w - LR * g_s)


def test_second_order_is_the_derivative_through_the_perturbation(tmp_path):
    actual = run(tmp_path, SAMConfig(rho=0.2, second_order=True), steps=3)
    expected = reference(lambda loss, w, step: oracles.second_order(loss, w, 0.2), steps=3)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


def test_second_order_agrees_with_finite_differences(tmp_path):
    model, rho, h = tiny_classifier(), 0.2, 1e-5
    loss = oracles.loss_function(model, stack(examples(8)))
    w = oracles.flatten(oracles.used_parameters(model))

    def objective(v):
        return loss(v + oracles.eps_of(oracles.gradient(loss, v), rho, 2)).item()

    steps = torch.eye(len(w), dtype=w.dtype) * h
    numeric = torch.tensor([(objective(w + s) - objective(w - s)) / (2 * h) for s in steps], dtype=w.dtype)
    actual = (w - run(tmp_path, SAMConfig(rho=rho, second_order=True), steps=1)) / LR - DECAY * w
    torch.testing.assert_close(actual, numeric, rtol=1e-6, atol=1e-8)


def test_second_order_logs_the_cosine_to_the_plain_gradient(tmp_path):
    trainer = train(tmp_path, SAMConfig(rho=0.2, second_order=True), max_steps=1, per_device_train_batch_size=8)
    loss = oracles.loss_function(tiny_classifier(), stack(examples(8)))
    w = oracles.flatten(oracles.used_parameters(tiny_classifier()))
    expected = torch.cosine_similarity(oracles.sam(loss, w, 0.2), oracles.second_order(loss, w, 0.2), dim=0)
    assert trainer.state.log_history[0]["sam_second_order_cosine"] == pytest.approx(expected.item(), abs=1e-6)


def test_random_has_the_size_of_rho_and_another_direction_each_step(tmp_path):
    trainer = train(tmp_path, SAMConfig(method="random", rho=0.2), max_steps=3)
    for entry in trainer.state.log_history[:3]:
        assert entry["sam_perturbation_norm"] == pytest.approx(0.2, rel=1e-5)
    assert len({entry["sam_perturbed_loss"] for entry in trainer.state.log_history[:3]}) == 3


IDENTITIES = {
    "gsam": {"alpha": 0.0, "rho_min": 0.05},
    "wsam": {"gamma": 0.5},
    "esam": {"beta": 1.0, "gamma": 1.0},
    "friendly": {"sigma": 0.0},
    "looksam": {"interval": 1},
    "subset": {"ascent_fraction": 1.0},
    "periodic": {"interval": 1},
    "carried": {"interval": 1, "ascent_fraction": 1.0},
    "late": {"start": 0.0},
}


@pytest.mark.parametrize("method", IDENTITIES)
def test_neutral_values_are_bitwise_sam(tmp_path, method):
    def final(config):
        trainer = train(tmp_path, config, tiny_classifier(dropout=0.3), examples(16), gradient_accumulation_steps=2)
        return weights(trainer)

    sam = final(SAMConfig(rho=0.05))
    other = final(SAMConfig(method=method, rho=0.05, **IDENTITIES[method]))
    assert all(torch.equal(a, b) for a, b in zip(sam, other, strict=True))


# Forward passes, backward passes and examples seen in four steps of two micro-batches of four examples each.
FULL = 4 * 2 * 4
COUNTS = {
    "sam": (16, 16, 2 * FULL),
    "asam": (16, 16, 2 * FULL),
    "gsam": (16, 16, 2 * FULL),
    "wsam": (16, 16, 2 * FULL),
    "friendly": (16, 16, 2 * FULL),
    "functional": (16, 16, 2 * FULL),
    "norm-only": (16, 16, 2 * FULL),
    "subset": (16, 16, 1.25 * FULL),
    "esam": (24, 16, 2.5 * FULL),  # the third forward pass, without backward, chooses the half to descend on
    "looksam": (12, 12, 1.5 * FULL),
    "periodic": (12, 12, 1.5 * FULL),
    "late": (10, 10, 1.25 * FULL),
    "carried": (12, 12, 1.125 * FULL),
    "previous": (8, 8, FULL),
    "msam": (8, 8, FULL),
    "random": (8, 8, FULL),
    "lesam": (16, 16, 2 * FULL),
    "precond": (16, 16, 2 * FULL),
    "gcsam": (16, 16, 2 * FULL),
    "zsharp": (16, 16, 2 * FULL),
}


@pytest.mark.parametrize("method", COUNTS)
def test_number_of_passes(tmp_path, method):
    extra = {"interval": 2} if method in ("looksam", "periodic", "carried") else {}
    model, seen = tiny_classifier(), {"forward": 0, "backward": 0, "examples": 0}

    def count(module, args, output):
        seen["forward"] += 1
        seen["examples"] += len(output)
        if output.requires_grad:
            output.register_hook(lambda gradient: seen.update(backward=seen["backward"] + 1))

    model.norm.register_forward_hook(count)  # inside the network: a gradient taken at the logits alone is no pass
    config = SAMConfig(method=method, **extra)
    optim = {"optim": "adamw_torch"} if method in ("msam", "precond") else {}
    trainer = train(tmp_path, config, model, gradient_accumulation_steps=2, max_steps=4, **optim)
    forward, backward, seen_examples = COUNTS[method]
    assert seen == {"forward": forward, "backward": backward, "examples": seen_examples}
    if method != "esam":
        assert trainer.state.log_history[-1]["sam_passes"] == pytest.approx(seen_examples / FULL)


def test_norm_only_ascent_computes_no_other_weight_gradient(tmp_path):
    model, gradients = tiny_classifier(), {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.register_hook(lambda gradient, name=name: gradients.update({name: gradients.get(name, 0) + 1}))
    train(tmp_path, SAMConfig(method="norm-only"), model, max_steps=2)
    assert gradients["norm.weight"] == 4  # both passes of both steps
    assert gradients["first.weight"] == gradients["second.weight"] == 2  # the descent passes only
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("method", ["friendly", "looksam", "previous", "carried"])
def test_interrupted_and_resumed_is_bitwise_uninterrupted(tmp_path, method):
    config = SAMConfig(method=method, rho=0.2)

    def trainer(folder, **kwargs):
        return OrderedSAMTrainer(
            model=tiny_classifier(dropout=0.3),
            args=arguments(folder, max_steps=7, save_strategy="steps", save_steps=3, **kwargs),
            train_dataset=examples(16),
            sam_config=config,
        )

    whole = trainer(tmp_path / "whole")
    whole.train()
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))
    forgetful = trainer(tmp_path / "forgetful")
    (tmp_path / "whole" / "checkpoint-3" / "sam_state_0.safetensors").unlink()
    forgetful.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert not all(torch.equal(a, b) for a, b in zip(weights(whole), weights(forgetful), strict=True))


def test_every_row_says_what_it_is():
    for name, row in METHODS.items():
        assert row.name == name
        assert row.paper in ("control", "this project") or "arXiv" in row.paper or "NeurIPS" in row.paper
        assert row.summary.endswith(".")
        SAMConfig(method=name)


@pytest.mark.parametrize("config", [{"p": 1.5}, {"p": 2}, {"p": 3}, {"method": "asam"}, {"method": "gsam"}], ids=str)
def test_cosine_between_the_clean_and_the_perturbed_gradient(tmp_path, config):
    config = {"rho": 0.2, **config}
    trainer = train(tmp_path, SAMConfig(**config), max_steps=1, per_device_train_batch_size=8, learning_rate=0.0)
    loss = oracles.loss_function(tiny_classifier(), stack(examples(8)))
    w = oracles.flatten(oracles.used_parameters(tiny_classifier()))
    g = oracles.gradient(loss, w)
    eps = oracles.eps_adaptive(g, w, 0.2, 0.01) if config.get("method") == "asam" else None
    p = config.get("p", 2)
    g_s = oracles.gradient(loss, w + (oracles.eps_of(g, trainer._sam.schedule.rho(0, 0.0), p) if eps is None else eps))
    expected = torch.cosine_similarity(g, g_s, dim=0).item()
    assert trainer.state.log_history[0]["sam_cosine"] == pytest.approx(expected, abs=1e-6)


def test_a_second_call_of_train_does_not_go_back_to_the_checkpoint(tmp_path):
    def trainer():
        return OrderedSAMTrainer(
            model=tiny_classifier(),
            args=arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2),
            train_dataset=examples(8),
            sam_config=SAMConfig(method="friendly", rho=0.2),
        )

    trainer().train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    resumed.start_update()
    assert not resumed._sam.memory
