import pytest
import torch
import torch.nn.functional as F

from hf_sam.methods.descents import (
    add_orthogonal_part,
    functional_loss,
    hardest_hit,
    orthogonal_part,
    per_example_losses,
    surrogate_gap,
)
from hf_sam.update.reductions import Reductions

REDUCTIONS = Reductions()


def pair():
    generator = torch.Generator().manual_seed(0)
    return [
        [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 4), (5,))] for _ in range(2)
    ]


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def test_orthogonal_part_of_sixteen_bit_gradients_keeps_nothing_along_them():
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(300_000, generator=generator).bfloat16() * 3
    g_s = (1.37 * g.float() + torch.randn(300_000, generator=generator)).bfloat16()
    (kept,) = orthogonal_part([g], [g_s], REDUCTIONS)
    assert torch.cosine_similarity(kept.double(), g.double(), dim=0).abs() < 2e-3  # 8e-3 with a rounded coefficient


def test_orthogonal_part_is_globally_orthogonal_and_not_per_tensor():
    g, g_s = pair()
    kept = orthogonal_part(g, g_s, REDUCTIONS)
    assert abs(flat(kept) @ flat(g)) < 1e-12
    assert all(abs(k.flatten() @ c.flatten()) > 1e-3 for k, c in zip(kept, g, strict=True))


def test_gsam_leaves_the_component_along_the_perturbed_gradient():
    g, g_s = pair()
    before = flat(g_s).clone()
    surrogate_gap(g, g_s, 0.4, REDUCTIONS)
    torch.testing.assert_close(flat(g_s) @ before, before @ before, rtol=1e-12, atol=0)
    change = before - flat(g_s)
    assert torch.linalg.matrix_rank(torch.stack([change, flat(g), before]), rtol=1e-10) == 2


def test_looksam_between_adds_alpha_times_the_norm_of_g():
    g, kept = pair()
    before = flat(g).clone()
    add_orthogonal_part(g, kept, 0.7, REDUCTIONS)
    assert (flat(g) - before).norm() == pytest.approx(0.7 * before.norm().item())


def test_zero_gradients_do_not_make_nan():
    zeros = [torch.zeros(3), torch.zeros(2)]
    assert torch.isfinite(flat(orthogonal_part(zeros, [torch.ones(3), torch.ones(2)], REDUCTIONS))).all()
    g = [torch.ones(3), torch.ones(2)]
    add_orthogonal_part(g, zeros, 0.7, REDUCTIONS)
    assert torch.equal(flat(g), torch.ones(5))
    surrogate_gap([torch.ones(3)], [torch.zeros(3)], 0.4, REDUCTIONS)


def test_hardest_hit_takes_the_largest_rise_and_at_least_one():
    before, after = torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.tensor([1.1, 2.0, 0.5, 1.6])
    assert hardest_hit(before, after, 0.5).tolist() == [1, 3]
    assert hardest_hit(before, after, 0.01).tolist() == [1]
    assert hardest_hit(before, after, 1.0).tolist() == [0, 1, 2, 3]


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
    loss = functional_loss(logits.square().sum(), logits, outer)
    assert loss.item() == pytest.approx(logits.square().sum().item(), rel=1e-6)
    assert torch.equal(torch.autograd.grad(loss, logits)[0], outer)
