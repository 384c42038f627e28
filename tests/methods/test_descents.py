from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_sam.losses_of_parts import per_example_losses
from hf_sam.methods import Functional, HardestHit, Reused, SurrogateGap, Weighted
from hf_sam.methods.descents import orthogonal_part
from hf_sam.update.vector import Vector

PARAMETERS = [nn.Parameter(torch.zeros(())) for _ in range(2)]


def vector(*tensors):
    return Vector(PARAMETERS[: len(tensors)], list(tensors))


def pair():
    generator = torch.Generator().manual_seed(0)
    return [
        vector(*(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 4), (5,))))
        for _ in range(2)
    ]


def flat(v):
    return torch.cat([t.flatten() for t in v.numbers()])


def step(**memory):
    return SimpleNamespace(memory=memory)


def test_orthogonal_part_of_sixteen_bit_gradients_keeps_nothing_along_them():
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(300_000, generator=generator).bfloat16() * 3
    g_s = (1.37 * g.float() + torch.randn(300_000, generator=generator)).bfloat16()
    (kept,) = orthogonal_part(vector(g_s), to=vector(g)).numbers()
    assert torch.cosine_similarity(kept.double(), g.double(), dim=0).abs() < 2e-3  # 8e-3 with a rounded coefficient


def test_orthogonal_part_is_globally_orthogonal_and_not_per_tensor():
    g, g_s = pair()
    kept = orthogonal_part(g_s, to=g)
    assert abs(flat(kept) @ flat(g)) < 1e-12
    assert all(abs(k.flatten() @ c.flatten()) > 1e-3 for k, c in zip(kept.numbers(), g.numbers(), strict=True))


def test_gsam_leaves_the_component_along_the_perturbed_gradient():
    g, g_s = pair()
    clean, before = flat(g).clone(), flat(g_s).clone()
    found = flat(SurrogateGap(alpha=0.4).gradient(g, g_s, step()))
    torch.testing.assert_close(found @ before, before @ before, rtol=1e-12, atol=0)
    change = before - found
    assert torch.linalg.matrix_rank(torch.stack([change, clean, before]), rtol=1e-10) == 2
    orthogonal = clean - (clean @ before) / (before @ before) * before
    torch.testing.assert_close(change, 0.4 * orthogonal, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.9])
def test_wsam_weighs_both_gradients(gamma):
    g, g_s = pair()
    expected = (1 - 2 * gamma) / (1 - gamma) * flat(g) + gamma / (1 - gamma) * flat(g_s)
    found = Weighted(gamma).gradient(g, g_s, step())
    torch.testing.assert_close(flat(found), expected, rtol=1e-12, atol=1e-15)


def test_looksam_keeps_the_part_of_the_perturbed_gradient_that_is_orthogonal_and_steps_along_all_of_it():
    (g, g_s), due = pair(), step()
    clean, before = flat(g).clone(), flat(g_s).clone()
    assert torch.equal(flat(Reused().gradient(g, g_s, due)), before)
    expected = before - (before @ clean) / (clean @ clean) * clean
    torch.testing.assert_close(flat(due.memory["orthogonal"]), expected, rtol=1e-12, atol=1e-15)


def test_looksam_between_adds_alpha_times_the_norm_of_g():
    g, kept = pair()
    before, direction = flat(g).clone(), flat(kept).clone()
    found = Reused(alpha=0.7).between(g, step(orthogonal=kept))
    assert (flat(found) - before).norm() == pytest.approx(0.7 * before.norm().item())
    torch.testing.assert_close(
        F.cosine_similarity(flat(found) - before, direction, dim=0), torch.ones((), dtype=torch.float64)
    )
    assert torch.equal(flat(kept), direction), "what is kept is used again"


def test_zero_gradients_do_not_make_nan():
    zeros = vector(torch.zeros(3), torch.zeros(2))
    assert torch.isfinite(flat(orthogonal_part(vector(torch.ones(3), torch.ones(2)), to=zeros))).all()
    found = Reused(alpha=0.7).between(vector(torch.ones(3), torch.ones(2)), step(orthogonal=zeros))
    assert torch.equal(flat(found), torch.ones(5))
    assert torch.isfinite(flat(SurrogateGap().gradient(vector(torch.ones(3)), vector(torch.zeros(3)), step()))).all()


def test_hardest_hit_takes_the_largest_rise_and_at_least_one():
    before, after = torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.tensor([1.1, 2.0, 0.5, 1.6])
    assert HardestHit(0.5).examples(before, after).tolist() == [1, 3]
    assert HardestHit(0.01).examples(before, after).tolist() == [1]
    assert HardestHit(0.99).examples(before, after).tolist() == [0, 1, 2, 3]
    assert HardestHit(1.0).examples(before, after) is None, "all of them, without a look at their losses"


def test_per_example_losses_of_classes_tokens_labels_and_targets():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, generator=generator)
    labels = torch.tensor([0, 2, 1, 1])
    torch.testing.assert_close(per_example_losses(logits, labels), F.cross_entropy(logits, labels, reduction="none"))

    tokens = torch.randn(2, 4, 6, generator=generator)
    targets = torch.tensor([[1, 2, -100, 5], [0, 3, 3, 1]])
    expected = [F.cross_entropy(tokens[i], targets[i]) for i in range(2)]
    torch.testing.assert_close(per_example_losses(tokens, targets), torch.stack(expected))
    shifted = [F.cross_entropy(tokens[i, :-1], targets[i, 1:]) for i in range(2)]
    torch.testing.assert_close(per_example_losses(tokens, targets, shifted=True), torch.stack(shifted))

    several = torch.tensor([[1.0, 0.0, 1.0]] * 4)
    expected = F.binary_cross_entropy_with_logits(logits, several, reduction="none").mean(1)
    torch.testing.assert_close(per_example_losses(logits, several), expected)
    torch.testing.assert_close(per_example_losses(logits[:, :1], several[:, 0]), (logits[:, 0] - 1) ** 2)


def test_functional_loss_has_the_value_of_one_loss_and_the_gradient_of_another():
    logits = torch.randn(4, 3, requires_grad=True)
    outer = torch.randn(4, 3)
    loss = Functional().loss(logits.square().sum(), logits, outer)
    assert loss.item() == pytest.approx(logits.square().sum().item(), rel=1e-6)
    assert torch.equal(torch.autograd.grad(loss, logits)[0], outer)


def test_functional_keeps_the_derivative_at_the_logits_and_leaves_the_graph_for_backward():
    logits = torch.randn(4, 3, requires_grad=True)
    loss = logits.square().sum()
    assert torch.equal(Functional().keep(loss, logits), 2 * logits)
    loss.backward()
