import math

import pytest
import torch

from hf_sam.methods.geometry import adaptive_direction, add_weight_decay, dual_norm_direction, random_direction
from hf_sam.update.reductions import Reductions

REDUCTIONS = Reductions()


def tensors(scale=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [
        (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype) for shape in ((3, 4), (5,), ())
    ]


def eps(gradients, rho, p):
    directions, scale = dual_norm_direction([g.clone() for g in gradients], rho, p, REDUCTIONS)
    return torch.cat([(scale * d).flatten() for d in directions])


def p_norm(vector, p):
    return vector.abs().max() if p == math.inf else (vector.abs() ** p).sum() ** (1 / p)


def flat(gradients):
    return torch.cat([g.flatten() for g in gradients])


@pytest.mark.parametrize("p", [1, 1.25, 1.5, 2, 3, 7, math.inf])
def test_eps_attains_hoelders_bound(p):
    """The maximiser is characterised by ||eps||_p = rho and <g, eps> = rho ||g||_q, whatever formula gave it."""
    g, rho = flat(tensors()), 0.3
    found = eps(tensors(), rho, p)
    q = {1: math.inf, math.inf: 1}.get(p) or p / (p - 1)
    torch.testing.assert_close(p_norm(found, p), torch.tensor(rho, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(g @ found, rho * p_norm(g, q), rtol=1e-12, atol=0)


def test_p_one_shares_rho_among_equal_coordinates():
    found = eps([torch.tensor([2.0, -2.0]), torch.tensor([1.0, 2.0])], 0.3, 1)
    torch.testing.assert_close(found, torch.tensor([0.1, -0.1, 0.0, 0.1]))


@pytest.mark.parametrize("p", [1, 1.1, 1.5, 2, 3, math.inf])
@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_size_of_the_gradient_does_not_matter_in_float32(p, scale):
    expected = eps(tensors(), 0.3, p).float()
    torch.testing.assert_close(eps(tensors(scale, torch.float32), 0.3, p), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("p", [1, 1.5, 2, 3, math.inf])
@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_scale_is_exactly_zero_without_a_direction(p, bad):
    gradients = tensors()
    for g in gradients:
        g.zero_() if bad == 0.0 else g.view(-1)[:1].fill_(bad)
    _, scale = dual_norm_direction(gradients, 0.3, p, REDUCTIONS)
    assert scale == 0


@pytest.mark.parametrize("p", [1.5, 2, math.inf])
def test_adaptive_eps_attains_the_bound_in_scaled_coordinates(p):
    g, w, rho, eta = tensors(), tensors(0.7), 0.3, 0.01
    directions, scale = adaptive_direction([t.clone() for t in g], w, rho, p, eta, REDUCTIONS)
    t = flat(w).abs() + eta
    found = torch.cat([(scale * d).flatten() for d in directions])
    q = 1 if p == math.inf else p / (p - 1)
    torch.testing.assert_close(p_norm(found / t, p), torch.tensor(rho, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(flat(g) @ found, rho * p_norm(flat(g) * t, q), rtol=1e-12, atol=0)


def test_eta_moves_a_weight_at_zero():
    g, w = [torch.ones(2)], [torch.tensor([0.0, 1.0])]
    for eta, moves in ((0.01, True), (0.0, False)):
        directions, scale = adaptive_direction([g[0].clone()], w, 1.0, 2, eta, REDUCTIONS)
        assert bool((scale * directions[0])[0] != 0) == moves


def test_random_direction_is_on_the_sphere_and_repeats_with_its_seed():
    weights = [torch.zeros(3, 4), torch.zeros(5)]

    def draw(seed):
        directions, scale = random_direction(weights, 0.3, torch.Generator().manual_seed(seed), REDUCTIONS)
        return flat([scale * d for d in directions])

    assert draw(0).norm() == pytest.approx(0.3, rel=1e-6)
    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


def test_weight_decay_is_scaled_like_the_loss():
    g, w = [torch.ones(2), torch.ones(2)], [torch.full((2,), 3.0), torch.full((2,), 3.0)]
    add_weight_decay(g, w, [0.1, 0.0], loss_scale=4.0)
    torch.testing.assert_close(g[0], torch.full((2,), 1 + 0.1 * 3 * 4))
    assert torch.equal(g[1], torch.ones(2))


@pytest.mark.parametrize("order", [1, 1.5, 2, 5, math.inf])
def test_norm_is_that_of_the_concatenation(order):
    expected = torch.linalg.vector_norm(flat(tensors()), order)
    torch.testing.assert_close(REDUCTIONS.norm(tensors(), order), expected, rtol=1e-12, atol=0)


def test_norm_of_bfloat16_is_taken_in_float32():
    values = [torch.full((1000,), 0.01, dtype=torch.bfloat16)]
    found = REDUCTIONS.norm(values)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(values[0].double().norm().item(), rel=1e-6)
