import contextlib
import functools
import math
import sys

import pytest
import torch
from torch import nn

from hf_sam.update import buckets, perturbation
from hf_sam.update.perturbation import Perturbation, round_stochastically
from hf_sam.update.vector import Vector

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=["pointing", "copying", "in one bucket", "in many buckets"])
def perturbed(request, monkeypatch):
    """Perturbations that are put back by pointing to where weights have stayed, by copying each, or by copying lists."""
    if request.param == "in many buckets":
        monkeypatch.setattr(buckets, "BUCKET_BYTES", 32)
    return functools.partial(
        Perturbation, swaps_memory=request.param == "pointing", in_buckets="bucket" in request.param
    )


def moves_in_place(perturbed):
    return not perturbed.keywords["swaps_memory"]


def parameters(*dtypes):
    """Of five numbers each, one of them tiny, which use all digits of their type."""
    generator = torch.Generator().manual_seed(0)
    numbers = [torch.randn(5, generator=generator, dtype=torch.float64) for _ in dtypes or range(3)]
    for t in numbers:
        t[-1] *= 1e-9
    return [nn.Parameter(t.to(dtype)) for t, dtype in zip(numbers, dtypes or [torch.float32] * 3, strict=True)]


def ones(weights, factor=None, **kwargs):
    return Vector(weights, [torch.ones_like(p) for p in weights], factor=factor, **kwargs)


def copies(weights):
    return [p.detach().clone() for p in weights]


def assert_restored(weights, before):
    for p, original in zip(weights, before, strict=True):
        assert torch.equal(p, original)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [0.01, torch.tensor(0.01)])
def test_restored_bitwise_where_subtraction_would_not(perturbed, dtype, factor):
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(10_000).to(dtype) * 0.02)
    before, direction = p.detach().clone(), torch.randn(10_000).to(dtype)
    eps, address = direction.clone(), p.data_ptr()
    with perturbed() as weights:
        weights.add(Vector([p], [direction], factor=factor))
        assert weights.is_applied
        assert not torch.equal(p, before)
        moved = p.detach().clone()
    exact = before.double() + 0.01 * eps.double()
    torch.testing.assert_close(moved, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-8)
    assert torch.equal(p, before)
    assert p.data_ptr() == address
    assert not torch.equal(moved - eps * 0.01, before)


def test_restored_after_an_exception_and_after_several_moves(perturbed):
    p, q = weights = parameters(torch.float32, torch.float32)
    before = copies(weights)
    with pytest.raises(KeyboardInterrupt), perturbed() as moved:
        moved.add(ones([p], torch.tensor(0.1)))
        moved.add(ones([p, q], torch.tensor(0.1)))
        torch.testing.assert_close(p.detach(), before[0] + 0.2)
        torch.testing.assert_close(q.detach(), before[1] + 0.1)
        raise KeyboardInterrupt
    assert_restored(weights, before)


def test_a_second_move_of_the_same_weights_needs_no_memory_and_adds_up(perturbed):
    weights = parameters()
    before = copies(weights)
    with perturbed() as moved:
        for _ in range(3):
            moved.add(ones(weights, 0.25))
        for p, original in zip(weights, before, strict=True):
            torch.testing.assert_close(p.detach(), original + 0.75)
        assert sum(len(originals) for _, _, originals in moved._saved) == len(weights)
    assert_restored(weights, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_restored_when_a_pass_has_pointed_the_weight_elsewhere(perturbed, dtype):
    """Adversarial training of weights saves `p.data` and puts it back: the parameter then has other memory."""
    p, q = weights = parameters(dtype, dtype)
    before = copies(weights)
    with perturbed() as moved:
        moved.add(ones(weights, torch.tensor(0.1)))
        p.data = p.data.clone()
        (displacement,) = [d for owner, d in moved.displacement() if owner is p]
        torch.testing.assert_close(displacement.float(), torch.full((5,), 0.1), rtol=0, atol=0.02)
        q.data = torch.zeros_like(q)
    assert_restored(weights, before)


def test_a_context_can_be_entered_again(perturbed):
    weights = parameters()
    before, moved = copies(weights), perturbed()
    for _ in range(2):
        with moved:
            assert not moved.is_applied
            moved.add(ones(weights, 0.1))
        assert_restored(weights, before)
        assert not moved.is_applied


# --- interruptions --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def interrupted_at(line: int, inside: str):
    """A Ctrl-C before the `line`-th line that runs in the module while `inside` is on the stack; yields the count."""
    count, depth = [0], [0]

    def trace(frame, event, argument):
        if frame.f_code.co_filename != perturbation.__file__ or (depth[0] == 0 and frame.f_code.co_name != inside):
            return None
        if frame.f_code.co_name == inside:
            depth[0] += 1

        def trace_lines(frame, event, argument):
            if event == "line":
                count[0] += 1
                if count[0] == line:
                    sys.settrace(None)
                    raise KeyboardInterrupt
            if event == "return" and frame.f_code.co_name == inside:
                depth[0] -= 1
            return trace_lines

        return trace_lines

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield count
    finally:
        sys.settrace(before)


@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("inside", ["add", "_restore"])
def test_restored_when_interrupted_at_any_line(perturbed, inside, is_shared):
    weights = parameters(torch.float32, torch.bfloat16, torch.float32)
    before = copies(weights)

    def run(line):
        with interrupted_at(line, inside) as count, perturbed() as moved:
            moved.add(ones(weights, torch.tensor(0.1), is_shared=is_shared))
            moved.add(ones(weights, torch.tensor(0.1), is_shared=is_shared))
        assert_restored(weights, before)
        return count[0]

    lines = run(0)
    assert lines > 3
    for line in range(1, lines + 1):
        with pytest.raises(KeyboardInterrupt):
            run(line)
        assert_restored(weights, before)


@pytest.mark.parametrize("name", ["copy_", "_foreach_copy_", "_foreach_mul"])
def test_restored_when_interrupted_inside_a_copy(perturbed, monkeypatch, name):
    """Before and after each copy of weights, half of a list of them included."""
    weights = parameters()
    before, holder = copies(weights), torch.Tensor if name == "copy_" else torch
    original, calls = getattr(holder, name), [0]

    def count_and_maybe_stop(*args, **kwargs):
        calls[0] += 1
        if calls[0] == stops_at[0]:
            if isinstance(args[0], list):
                original(*[a[:1] if isinstance(a, list | tuple) else a for a in args], **kwargs)
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    stops_at = [0]

    def run():
        calls[0] = 0
        with perturbed() as moved:
            moved.add(ones(weights, torch.tensor(0.1), is_shared=name == "_foreach_mul"))

    monkeypatch.setattr(holder, name, count_and_maybe_stop)
    run()
    total = calls[0]
    for stops_at[0] in range(1, total + 1):
        with pytest.raises(KeyboardInterrupt):
            run()
        assert_restored(weights, before)
    if name == "copy_" and moves_in_place(perturbed) and not perturbed.keywords["in_buckets"]:
        assert total == 9, "one to save, one to move and one to restore each weight"


# --- bad numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("zero", [0.0, 0], ids=["0.0", "0"])
def test_scale_zero_moves_nothing_even_with_a_bad_direction(perturbed, dtype, bad, zero):
    weights = parameters(dtype, dtype)
    before = copies(weights)
    with perturbed() as moved:
        moved.add(Vector(weights, [torch.full_like(p, bad) for p in weights], factor=zero))
        assert_restored(weights, before)
    assert_restored(weights, before)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_come_back(perturbed, bad):
    (p,) = parameters(torch.float32)
    with torch.no_grad():
        p[2] = bad
    before = p.detach().clone()
    with perturbed() as moved:
        moved.add(ones([p], 0.1))
        assert not torch.isfinite(p[2])
    torch.testing.assert_close(p.detach(), before, rtol=0, atol=0, equal_nan=True)


# --- memory ---------------------------------------------------------------------------------------------------------


def test_no_memory_beyond_the_weights_and_the_directions(perturbed):
    weights = parameters()
    eps = ones(weights, torch.tensor(0.1))
    memories = {t.data_ptr() for t in [*weights, *eps.tensors]}
    with perturbed() as moved:
        moved.add(eps)
        originals = [t for _, _, originals in moved._saved for t in originals]
        assert {t.data_ptr() for t in [*weights, *originals]} == memories


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [None, 0.5, torch.tensor(0.5)])
def test_shared_directions_stay_as_they_are(perturbed, dtype, factor):
    p, direction = nn.Parameter(torch.randn(50).to(dtype)), torch.randn(50).to(dtype)
    before, kept, scale = p.detach().clone(), direction.clone(), 1.0 if factor is None else float(factor)
    with perturbed() as moved:
        moved.add(Vector([p], [direction], factor=factor, is_shared=True))
        assert p.dtype == dtype
        torch.testing.assert_close(p.detach(), (before.float() + scale * kept.float()).to(dtype))
        assert torch.equal(direction, kept)
    assert torch.equal(p, before)
    assert torch.equal(direction, kept)


@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("of_directions", DTYPES)
@pytest.mark.parametrize("of_weights", DTYPES)
def test_directions_of_another_type_move_weights_that_come_back_bitwise(
    perturbed, of_weights, of_directions, is_shared
):
    weights = parameters(of_weights, of_weights)
    before = copies(weights)
    directions = [torch.linspace(-1, 1, 5).to(of_directions) for _ in weights]
    with perturbed() as moved:
        moved.add(Vector(weights, directions, factor=0.5, is_shared=is_shared))
        for p, original in zip(weights, before, strict=True):
            assert p.dtype == of_weights
            expected = original.double() + 0.5 * torch.linspace(-1, 1, 5).to(of_directions).double()
            coarsest = max(torch.finfo(t).eps for t in (of_weights, torch.float32))
            torch.testing.assert_close(p.detach().double(), expected, rtol=coarsest, atol=1e-6)
    assert all(p.dtype == of_weights for p in weights)
    assert_restored(weights, before)


def test_weights_of_several_types_come_back(perturbed):
    weights = parameters(torch.float32, torch.bfloat16, torch.float64, torch.float32, torch.bfloat16)
    before = copies(weights)
    with perturbed() as moved:
        moved.add(ones(weights, torch.tensor(0.5)))
        for p, original in zip(weights, before, strict=True):
            torch.testing.assert_close(p.detach(), (original.double() + 0.5).to(p.dtype))
    assert_restored(weights, before)


def test_weights_that_are_not_contiguous_empty_or_single_numbers_come_back(perturbed):
    whole = torch.randn(4, 6)
    weights = [nn.Parameter(t) for t in (whole.t(), whole[:, ::2].clone(), torch.randn(0, 3), torch.randn(()))]
    before = copies(weights)
    with perturbed() as moved:
        moved.add(ones(weights, 0.5))
        for p, original in zip(weights, before, strict=True):
            torch.testing.assert_close(p.detach(), original + 0.5)
    assert_restored(weights, before)


def sharing(in_one_move: bool, is_shared: bool = False):
    """Two parameters that are views of one storage, one of them transposed, and another one; the moves to make."""
    storage = torch.randn(3, 4)
    weights = [nn.Parameter(storage), nn.Parameter(torch.randn(40)), nn.Parameter(storage.t())]
    moves = [weights] if in_one_move else [[p] for p in weights]
    return weights, [ones(move, torch.tensor(0.1), is_shared=is_shared) for move in moves]


@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("in_one_move", [True, False], ids=["one move", "a move each"])
def test_transposed_views_of_one_storage_come_back(perturbed, in_one_move, is_shared):
    weights, moves = sharing(in_one_move, is_shared)
    before = copies(weights)
    with perturbed() as moved:
        for eps in moves:
            moved.add(eps)
    assert_restored(weights, before)
    assert weights[0].data_ptr() == weights[2].data_ptr()


# --- what is told of it ---------------------------------------------------------------------------------------------


def test_displacement_is_what_was_added(perturbed):
    weights = parameters(torch.float32, torch.float64)
    with perturbed() as moved:
        moved.add(ones(weights[:1], 0.25))
        moved.add(ones(weights, 0.25))
        found = dict(moved.displacement())
        assert len(list(moved.displacement())) == 2
        torch.testing.assert_close(found[weights[0]], torch.full((5,), 0.5))
        torch.testing.assert_close(found[weights[1]], torch.full((5,), 0.25, dtype=torch.float64))


def test_displacement_is_what_rounding_left_of_eps(perturbed):
    p = nn.Parameter(torch.full((4,), 0.02, dtype=torch.bfloat16))
    with perturbed() as moved:
        moved.add(Vector([p], [torch.full((4,), 5e-6, dtype=torch.bfloat16)], factor=torch.tensor(1.0)))
        ((_, displacement),) = moved.displacement()
        assert displacement.dtype == torch.float32
        assert torch.equal(displacement, torch.zeros(4))


def test_copies_of_the_weights_are_renewed_whenever_they_have_moved(perturbed):
    weights, seen = parameters(), []
    before = copies(weights)

    def look():
        seen.append(torch.equal(weights[0], before[0]))

    with perturbed(renew_copies=look) as moved:
        moved.add(ones(weights, 0.1))
        moved.add(ones(weights, 0.1))
    assert seen == [False, False, True]
    with pytest.raises(KeyboardInterrupt), perturbed(renew_copies=look) as moved:
        moved.add(ones(weights, 0.1))
        raise KeyboardInterrupt
    assert seen == [False, False, True, False, True]


# --- stochastic rounding --------------------------------------------------------------------------------------------


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


def test_a_perturbation_that_rounding_would_lose_is_kept_in_expectation(perturbed):
    weights = [nn.Parameter(torch.full((20_000,), 0.02, dtype=torch.bfloat16)) for _ in range(2)]
    before, eps = copies(weights), 5e-6
    with perturbed(torch.Generator().manual_seed(0)) as moved:
        moved.add(ones(weights, torch.tensor(eps)))
        parts = list(moved.displacement())
        displacements = [torch.cat([d for owner, d in parts if owner is p]) for p in weights]
        assert all(d.mean().item() == pytest.approx(eps, rel=0.1) for d in displacements)
        assert not torch.equal(*displacements)
    assert_restored(weights, before)
