import pytest
import torch
from models import tiny_classifier
from torch import nn

from hf_sam.update.parameters import (
    Perturbation,
    gradients_only_for,
    put_gradients,
    round_stochastically,
    select,
    take_gradients,
)


def test_selectors():
    model = tiny_classifier()
    assert list(select(model, "all")) == [name for name, _ in model.named_parameters()]
    assert list(select(model, "norm")) == ["norm.weight", "norm.bias"]
    assert list(select(model, "no-norm-no-bias")) == ["unused", "first.weight", "second.weight"]
    assert list(select(model, "second.*")) == ["second.weight", "second.bias"]
    assert list(select(model, ["first.weight", "*.bias"])) == ["first.weight", "first.bias", "norm.bias", "second.bias"]


def test_frozen_parameters_are_never_selected():
    model = tiny_classifier()
    model.first.requires_grad_(False)
    assert not any("first" in name for name in select(model, "all"))
    with pytest.raises(ValueError, match="matches none"):
        select(model, "first.*")


def test_nothing_selected_is_an_error():
    with pytest.raises(ValueError, match="perturb='norm' selects none"):
        select(nn.Linear(2, 2), "norm")


def test_tied_parameters_are_perturbed_once():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    assert list(select(model, "all")) == ["a.weight", "a.bias", "b.bias"]


def test_gradients_are_moved_and_not_copied():
    model = tiny_classifier()
    model.first.weight.grad = gradient = torch.ones_like(model.first.weight)
    taken = take_gradients(model.parameters())
    assert model.first.weight.grad is None
    put_gradients(taken)
    assert model.first.weight.grad is gradient


def test_gradients_only_for_restores_requires_grad_after_an_error():
    model = tiny_classifier()
    with pytest.raises(RuntimeError), gradients_only_for([model.first.weight], list(model.parameters())):
        assert [name for name, p in model.named_parameters() if p.requires_grad] == ["first.weight"]
        raise RuntimeError
    assert all(p.requires_grad for p in model.parameters())


# Both ways of putting weights back: copying, and pointing to where they have stayed.
both_ways = pytest.mark.parametrize("swaps_memory", [False, True])


@both_ways
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_restored_bitwise_where_subtraction_would_not(dtype, swaps_memory):
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(10_000).to(dtype) * 0.02)
    before, step = p.detach().clone(), torch.randn(10_000).to(dtype)
    eps, address = step.clone(), p.data_ptr()
    with Perturbation(swaps_memory=swaps_memory) as perturbation:
        perturbation.add([p], [step], torch.tensor(0.01))
        assert not torch.equal(p, before)
        moved = p.detach().clone()
    assert torch.equal(p, before)
    assert p.data_ptr() == address
    assert not torch.equal(moved - eps * 0.01, before)


@both_ways
def test_restored_after_an_exception_and_after_several_moves(swaps_memory):
    p, q = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(5))
    before = [p.detach().clone(), q.detach().clone()]
    with pytest.raises(KeyboardInterrupt), Perturbation(swaps_memory=swaps_memory) as perturbation:
        perturbation.add([p], [torch.ones(5)], torch.tensor(0.1))
        perturbation.add([p, q], [torch.ones(5), torch.ones(5)], torch.tensor(0.1))
        torch.testing.assert_close(p.detach(), before[0] + 0.2)
        torch.testing.assert_close(q.detach(), before[1] + 0.1)
        raise KeyboardInterrupt
    assert torch.equal(p, before[0])
    assert torch.equal(q, before[1])


@pytest.mark.parametrize("fails_at", range(1, 8))
def test_restored_when_interrupted_inside_the_move(fails_at, monkeypatch):
    parameters = [nn.Parameter(torch.randn(5)) for _ in range(3)]
    before = [p.detach().clone() for p in parameters]
    calls, copy = 0, torch.Tensor.copy_

    def interrupted(self, *args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise KeyboardInterrupt
        return copy(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "copy_", interrupted)
    interrupted_inside = fails_at <= 6
    if interrupted_inside:
        with pytest.raises(KeyboardInterrupt), Perturbation() as perturbation:
            perturbation.add(parameters, [torch.ones(5) for _ in parameters], torch.tensor(0.1))
    else:
        monkeypatch.undo()
        with Perturbation() as perturbation:
            perturbation.add(parameters, [torch.ones(5) for _ in parameters], torch.tensor(0.1))
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))


@both_ways
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_scale_zero_moves_nothing_even_with_a_bad_direction(bad, swaps_memory):
    p = nn.Parameter(torch.randn(5))
    before = p.detach().clone()
    with Perturbation(swaps_memory=swaps_memory) as perturbation:
        perturbation.add([p], [torch.full((5,), bad)], torch.tensor(0.0))
        assert torch.equal(p, before)


@both_ways
def test_no_memory_beyond_the_weights_and_the_directions(swaps_memory):
    p, direction = nn.Parameter(torch.randn(5)), torch.ones(5)
    memories = {p.data_ptr(), direction.data_ptr()}
    with Perturbation(swaps_memory=swaps_memory) as perturbation:
        perturbation.add([p], [direction], torch.tensor(0.1))
        assert {p.data_ptr(), perturbation._saved[p].data_ptr()} == memories


@both_ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_borrowed_directions_stay_as_they_are(dtype, swaps_memory):
    p, direction = nn.Parameter(torch.randn(50).to(dtype)), torch.randn(50).to(dtype)
    before, kept = p.detach().clone(), direction.clone()
    with Perturbation(swaps_memory=swaps_memory) as perturbation:
        perturbation.add([p], [direction], torch.tensor(0.5), borrowed=True)
        assert p.dtype == dtype
        torch.testing.assert_close(p.detach(), (before.float() + 0.5 * kept.float()).to(dtype))
        assert torch.equal(direction, kept)
    assert torch.equal(p, before)
    assert torch.equal(direction, kept)


def test_displacement_is_what_rounding_left_of_eps():
    p = nn.Parameter(torch.full((4,), 0.02, dtype=torch.bfloat16))
    with Perturbation() as perturbation:
        perturbation.add([p], [torch.full((4,), 5e-6, dtype=torch.bfloat16)], torch.tensor(1.0))
        ((_, displacement),) = perturbation.displacement()
        assert displacement.dtype == torch.float32
        assert torch.equal(displacement, torch.zeros(4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_is_right_in_expectation_and_goes_to_a_neighbour(dtype):
    values = torch.linspace(-0.03, 0.03, 41) + 5e-6
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([round_stochastically(values, dtype, generator).float() for _ in range(4000)])
    nearest = values.to(dtype)
    gap = torch.nextafter(nearest.abs(), torch.tensor(torch.inf, dtype=dtype)).float() - nearest.abs().float()
    assert ((draws - values).abs() <= gap).all()
    standard_error = gap / 2 / 4000**0.5
    assert ((draws.mean(0) - values).abs() <= 5 * standard_error).all()


def test_stochastic_rounding_leaves_representable_values():
    values = torch.tensor([0.0, 1.0, -0.5, 2.0**-20])
    assert torch.equal(round_stochastically(values, torch.bfloat16, torch.Generator()).float(), values)
