"""Random directions per micro-batch, and tensors that come and go under `torch.compile`."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
from integration import tiny
from torch._dynamo.utils import counters

from hf_sam import SAMConfig

STEPS = 3


def displacements(trainer, accumulation):
    """Of each micro-batch, by step: the weights that the model saw, less those that the step began from."""
    start = [tiny.flat(tiny.mlp()), *trainer.trajectory[:-1]]
    assert len(trainer.passes) == accumulation * len(trainer.trajectory)
    seen = [[] for _ in start]
    for step, weights in trainer.passes:
        seen[step].append(weights - start[step])
    return seen


def drawn(folder, accumulation, **sam):
    sam = SAMConfig(method="random", rho=0.5, **sam)
    trainer = tiny.trained(
        tiny.mlp(),
        tiny.vectors(64),
        folder,
        sam,
        max_steps=STEPS,
        gradient_accumulation_steps=accumulation,
        optim="sgd",
        learning_rate=1e-3,
    )
    return displacements(trainer, accumulation)


def are_parallel(left, right):
    return torch.nn.functional.cosine_similarity(left, right, dim=0) > 0.99


@pytest.mark.parametrize("accumulation", [2, 3])
def test_scope_micro_draws_for_each_micro_batch(accumulation, tmp_path):
    steps = drawn(tmp_path, accumulation, scope="micro")
    found = [eps for step in steps for eps in step]
    for i, eps in enumerate(found):
        assert eps.norm() == pytest.approx(0.5, rel=1e-4)
        assert not any(are_parallel(eps, other) for other in found[:i])


@pytest.mark.parametrize("perturb", ["norm", ["first.*"]], ids=str)
def test_scope_micro_draws_for_each_micro_batch_of_a_part_of_the_weights(perturb, tmp_path):
    for step in drawn(tmp_path, 2, scope="micro", perturb=perturb):
        assert not are_parallel(*step)


@pytest.mark.parametrize("scope", ["device", "global", "auto"])
def test_other_scopes_draw_once_a_step(scope, tmp_path):
    steps = drawn(tmp_path, 2, scope=scope)
    for step in steps:
        torch.testing.assert_close(*step, rtol=0, atol=1e-6)
    assert not are_parallel(steps[0][0], steps[1][0])


def test_draws_of_scope_micro_can_be_repeated(tmp_path):
    """A run resumed, or started again, draws the same."""
    for first, second in zip(drawn(tmp_path, 2, scope="micro"), drawn(tmp_path, 2, scope="micro"), strict=True):
        assert all(torch.equal(left, right) for left, right in zip(first, second, strict=True))


def test_a_resumed_run_draws_what_the_uninterrupted_one_does(tmp_path):
    sam = SAMConfig(method="random", rho=0.5, scope="micro")
    options = {"max_steps": 6, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 3}
    whole = tiny.trained(tiny.mlp(), tiny.vectors(64), tmp_path, sam, **options)
    again = tiny.trainer_for(tiny.mlp(), tiny.vectors(64), tmp_path, sam, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert torch.equal(torch.stack(again.trajectory), torch.stack(whole.trajectory[3:]))


# --- torch.compile -------------------------------------------------------------------------------------------------


@pytest.fixture
def strict_compiler():
    """More recompilations of one piece of code than the compiler's limit are an error, not a silent fall-back."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


def compiled(folder, backend, sam, model=None, **options):
    defaults = {"max_steps": 12, "torch_compile": True, "torch_compile_backend": backend, "optim": "sgd"}
    model = tiny.mlp() if model is None else model
    return tiny.trained(model, tiny.vectors(64), folder, sam, **{**defaults, **options})


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    "sam",
    [
        {"method": "esam"},
        {"method": "esam", "beta": 0.3, "gamma": 1.0},
        {"method": "esam", "beta": 0.3, "gamma": 0.5, "scope": "micro"},
        {"method": "esam", "m": 2},
        {"perturb": "norm"},
        {"method": "subset"},
        {"method": "looksam"},
        {"method": "functional"},
    ],
    ids=lambda sam: " ".join(map(str, sam.values())),
)
@pytest.mark.usefixtures("strict_compiler")
def test_the_recompile_limit_is_not_hit(sam, backend, tmp_path):
    config = SAMConfig(**{"rho": 0.1, **sam})
    ours = compiled(tmp_path, backend, config)
    assert len(ours.trajectory) == 12
    eager = tiny.trained(tiny.mlp(), tiny.vectors(64), tmp_path, config, max_steps=12, optim="sgd")
    torch.testing.assert_close(torch.stack(ours.trajectory), torch.stack(eager.trajectory), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beta", [0.2, 0.6])
@pytest.mark.usefixtures("strict_compiler")
def test_which_tensors_esam_draws_compiles_nothing_anew(beta, tmp_path):
    """The number of graphs does not grow with the number of steps."""
    counts = {}
    for steps in (4, 16):
        torch._dynamo.reset()
        counters.clear()
        sam = SAMConfig(method="esam", rho=0.1, beta=beta, gamma=1.0)
        compiled(tmp_path, "eager", sam, max_steps=steps)
        counts[steps] = counters["stats"]["unique_graphs"]
    assert counts[16] == counts[4] > 0
