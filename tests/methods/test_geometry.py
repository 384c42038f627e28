import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_sam.methods import Geometry, Noise, Steepest, steepest
from hf_sam.update.ascent_step import AscentStep
from hf_sam.update.reductions import Reductions
from hf_sam.update.vector import Vector

REDUCTIONS = Reductions()
SHAPES = ((3, 4), (5,), ())
PARAMETERS = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]


def tensors(scale=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [(scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype) for shape in SHAPES]


def vector(values, **kwargs):
    return Vector(PARAMETERS[: len(values)], values, **kwargs)


def eps(gradients, rho, p):
    return flat(steepest(vector([g.clone() for g in gradients]), rho, p).numbers())


def adaptive_eps(gradients, weights, rho, p, eta):
    step = SimpleNamespace(weights=vector(weights, is_shared=True), rho=rho)
    return flat(Geometry(p, adaptive=True, eta=eta).steepest(vector([g.clone() for g in gradients]), step).numbers())


def p_norm(values, p):
    return values.abs().max() if p == math.inf else (values.abs() ** p).sum() ** (1 / p)


def flat(values):
    return torch.cat([t.flatten() for t in values])


@pytest.mark.parametrize("p", [1, 1.25, 1.5, 2, 3, 7, math.inf])
def test_eps_attains_hoelders_bound(p):
    """The maximiser is characterised by ||eps||_p = rho and <g, eps> = rho ||g||_q, whatever formula gave it."""
    g, rho = flat(tensors()), 0.3
    found = eps(tensors(), rho, p)
    q = {1: math.inf, math.inf: 1}.get(p) or p / (p - 1)
    torch.testing.assert_close(p_norm(found, p), torch.tensor(rho, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(g @ found, rho * p_norm(g, q), rtol=1e-12, atol=0)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("p", [1, 1.25, 2, 3, math.inf])
def test_the_linearised_rise_of_the_loss_is_at_most_sigma(p, adaptive):
    """Where it would be higher, `eps` is shorter, in the same direction; elsewhere it is the same."""
    g, step = flat(tensors()), SimpleNamespace(weights=vector(tensors(2.0), is_shared=True), rho=0.3)

    def found(sigma):
        made = Geometry(p, adaptive=adaptive).steepest(vector(tensors()), step, sigma=sigma)
        return flat(made.numbers())

    free = found(None)
    rise = float(g @ free)
    torch.testing.assert_close(found(rise / 4), free / 4, rtol=1e-11, atol=0)
    torch.testing.assert_close(found(rise * 4), free, rtol=1e-15, atol=0)


def test_inner_steps_share_the_bound():
    """Each of K steps has rho / K and sigma / K, so that the rise of all of them is at most sigma."""
    step = SimpleNamespace(rho=0.1, share=1.0)
    whole = Steepest(sigma=0.01).eps(vector(tensors()), step)
    half = Steepest(sigma=0.01, ascent_steps=2).eps(vector(tensors()), step)
    torch.testing.assert_close(flat(half.numbers()) * 2, flat(whole.numbers()), rtol=1e-12, atol=0)


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_no_gradient_is_no_perturbation_also_under_a_bound(bad):
    values = [torch.full(shape, bad, dtype=torch.float64) for shape in SHAPES]
    assert Steepest(sigma=0.01).eps(vector(values), SimpleNamespace(rho=0.1, share=1.0)).factor == 0


def test_p_one_shares_rho_among_equal_coordinates():
    found = eps([torch.tensor([2.0, -2.0]), torch.tensor([1.0, 2.0])], 0.3, 1)
    torch.testing.assert_close(found, torch.tensor([0.1, -0.1, 0.0, 0.1]))


@pytest.mark.parametrize("p", [1, 1.1, 1.5, 2, 3, math.inf])
@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_size_of_the_gradient_does_not_matter_in_float32(p, scale):
    expected = eps(tensors(), 0.3, p).float()
    torch.testing.assert_close(eps(tensors(scale, torch.float32), 0.3, p), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("p", [1, 1.5, 2, 3, math.inf])
@pytest.mark.parametrize("factor", [None, 0.5, torch.tensor(-2.0)])
def test_a_pending_factor_of_the_gradient_changes_at_most_the_sign(p, factor):
    sign = -1 if factor is not None and factor < 0 else 1
    found = steepest(vector(tensors(), factor=factor), 0.3, p)
    torch.testing.assert_close(flat(found.numbers()), sign * eps(tensors(), 0.3, p), rtol=1e-12, atol=0)


@pytest.mark.parametrize("p", [1, 1.5, 2, 3, math.inf])
@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_scale_is_exactly_zero_without_a_direction(p, bad):
    gradients = tensors()
    for g in gradients:
        g.zero_() if bad == 0.0 else g.view(-1)[:1].fill_(bad)
    assert steepest(vector(gradients), 0.3, p).factor == 0


@pytest.mark.parametrize("p", [1.5, 2, math.inf])
def test_adaptive_eps_attains_the_bound_in_scaled_coordinates(p):
    g, w, rho, eta = tensors(), tensors(0.7), 0.3, 0.01
    found, t = adaptive_eps(g, w, rho, p, eta), flat(w).abs() + eta
    q = 1 if p == math.inf else p / (p - 1)
    torch.testing.assert_close(p_norm(found / t, p), torch.tensor(rho, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(flat(g) @ found, rho * p_norm(flat(g) * t, q), rtol=1e-12, atol=0)
    assert torch.equal(flat(w), flat(tensors(0.7))), "the weights are read only"


def test_eta_moves_a_weight_at_zero():
    g, w = [torch.ones(2)], [torch.tensor([0.0, 1.0])]
    for eta, moves in ((0.01, True), (0.0, False)):
        assert bool(adaptive_eps(g, w, 1.0, 2, eta)[0] != 0) == moves


def test_random_direction_is_on_the_sphere_and_repeats_with_its_seed():
    weights = [torch.zeros(3, 4), torch.zeros(5)]

    def draw(seed):
        step = SimpleNamespace(weights=vector(weights), rho=0.3, generator=torch.Generator().manual_seed(seed))
        return flat(Noise().eps(None, step).numbers())

    assert draw(0).norm() == pytest.approx(0.3, rel=1e-6)
    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


def test_weight_decay_is_scaled_like_the_loss():
    """Gradients of a loss that is scaled by 4 are added to the decay as those of the loss itself."""
    decaying, other = PARAMETERS[:2]
    g = Vector([decaying, other], [torch.full((2,), 4.0), torch.full((2,), 4.0)], factor=torch.tensor(1 / 4))
    weights = Vector([decaying, other], [torch.full((2,), 3.0), torch.full((2,), 3.0)], is_shared=True)
    groups = [{"params": [decaying], "weight_decay": 0.1}, {"params": [other]}]
    update = SimpleNamespace(
        _optimizer=SimpleNamespace(param_groups=groups), _step=lambda: SimpleNamespace(weights=weights)
    )
    AscentStep._add_weight_decay(update, g, SimpleNamespace(weights=weights))
    first, second = g.numbers()
    torch.testing.assert_close(first, torch.full((2,), 1 + 0.1 * 3))
    assert torch.equal(second, torch.ones(2))
    assert torch.equal(weights.tensors[0], torch.full((2,), 3.0))


@pytest.mark.parametrize("order", [1, 1.5, 2, 5, math.inf])
def test_norm_is_that_of_the_concatenation(order):
    expected = torch.linalg.vector_norm(flat(tensors()), order)
    torch.testing.assert_close(REDUCTIONS.norm(tensors(), order), expected, rtol=1e-12, atol=0)


def test_norm_of_bfloat16_is_taken_in_float32():
    values = [torch.full((1000,), 0.01, dtype=torch.bfloat16)]
    found = REDUCTIONS.norm(values)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(values[0].double().norm().item(), rel=1e-6)
