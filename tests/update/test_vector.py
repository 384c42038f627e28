"""Vectors against the same expression on one flat vector of float64."""

import math
import operator
import random

import numpy as np
import pytest
import torch
from torch import nn

from hf_sam.update import buckets
from hf_sam.update.vector import Space, Vector

SHAPES = ((3, 4), (5,), (), (2, 1, 3), (7,))
PARAMETERS = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
TYPES = {
    "float64": [torch.float64] * 5,
    "float32": [torch.float32] * 5,
    "mixed": [torch.float32, torch.bfloat16, torch.float32, torch.bfloat16, torch.float32],
}


@pytest.fixture(params=[False, True], ids=["tensor by tensor", "in buckets"])
def space(request, monkeypatch):
    monkeypatch.setattr(buckets, "BUCKET_BYTES", 32)
    return Space(order=PARAMETERS, in_buckets=request.param)


def tensors(seed=0, types=TYPES["float64"]):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape, dtype in zip(SHAPES, types, strict=True)
    ]


def vector(space, seed=0, types=TYPES["float64"], **kwargs):
    return Vector(PARAMETERS, tensors(seed, types), space, **kwargs)


def part(space, indices, seed=0, **kwargs):
    """Over some parameters, in this order."""
    values = tensors(seed)
    return Vector([PARAMETERS[i] for i in indices], [values[i] for i in indices], space, **kwargs)


def flat(v):
    """What a Vector stands for, as one vector."""
    scale = 1.0 if v.factor is None else float(v.factor)
    return torch.cat([t.detach().double().flatten() for t in v.tensors]) * scale


def expanded(v, over=PARAMETERS):
    """The same with zeros for other parameters, in canonical order."""
    there = dict(zip(v.parameters, v.numbers(), strict=True))
    return torch.cat([there.get(p, torch.zeros(p.shape)).double().flatten() for p in over])


def assert_is(actual, expected, tolerance=1e-12):
    values = actual if isinstance(actual, torch.Tensor) else torch.cat([t.double().flatten() for t in actual.numbers()])
    torch.testing.assert_close(values.double(), torch.as_tensor(expected).double(), rtol=tolerance, atol=tolerance)


def lasting(v):
    """The numbers in memory of the test's own."""
    return flat(v).clone()


# --- looking --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [None, 2, -0.5, torch.tensor(-0.5)])
@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("p", [1, 1.5, 2, 3, math.inf])
def test_norm_is_that_of_the_concatenation(space, p, types, factor):
    v = vector(space, types=TYPES[types], factor=factor)
    expected = torch.linalg.vector_norm(flat(v), p)
    for _ in range(2):  # computed, then remembered
        assert v.norm(p).dim() == 0
        assert_is(v.norm(p), expected, 1e-12 if types == "float64" else 1e-6)


@pytest.mark.parametrize("types", TYPES)
def test_dot_is_that_of_the_concatenation(space, types):
    tolerance = 1e-12 if types == "float64" else 1e-6
    v, u = vector(space, 0, TYPES[types]), vector(space, 1, TYPES[types])
    for a, b in ((v, u), (v, v), (v * 3, u), (v, torch.tensor(-0.5) * u), (2 * v, u * torch.tensor(0.25))):
        assert a.dot(b).dim() == 0
        assert_is(a.dot(b), flat(a) @ flat(b), tolerance)


def test_sums_of_sixteen_bits_are_taken_in_float32(space):
    values = [torch.full((1000,), 0.01, dtype=torch.bfloat16) for _ in range(2)]
    v = Vector(PARAMETERS[:2], values, space)
    exact = torch.cat(values).double()
    for found, expected in ((v.norm(), exact.norm()), (v.norm(1), exact.sum()), (v.dot(v), exact @ exact)):
        assert found.dtype == torch.float32
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_dot_of_different_parameters_counts_those_that_both_have(space):
    v, u = part(space, [0, 1, 3], 0), part(space, [3, 4, 0], 1)
    assert_is(v.dot(u), expanded(v) @ expanded(u))
    assert_is(u.dot(v), expanded(v) @ expanded(u))


def test_dot_of_vectors_that_have_no_parameter_in_common_is_zero(space):
    assert part(space, [0, 1]).dot(part(space, [2, 3])) == 0


def test_size_and_length(space):
    v = vector(space)
    assert v.size() == sum(math.prod(shape) for shape in SHAPES)
    assert v.size() == v.size()
    assert len(v) == len(SHAPES)
    assert part(space, [1, 2]).size() == 6
    assert repr(v) == f"Vector of {v.size()} numbers in 5 tensors"


def test_tensors_without_elements_count_as_nothing(space):
    v = Vector(PARAMETERS[:2], [torch.ones(3), torch.ones(0, 2)], space)
    assert v.norm() == pytest.approx(3**0.5)
    assert v.norm(math.inf) == 1
    assert v.dot(v) == 3
    assert (v + v).norm(1) == 6


# --- arithmetic -----------------------------------------------------------------------------------------------------

NUMBERS = {
    "int": 3,
    "float": -0.7,
    "tensor": torch.tensor(1.3, dtype=torch.float64),
    "numpy": np.float64(0.3),
}


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("factor", [None, 2.0, torch.tensor(-0.5, dtype=torch.float64)])
@pytest.mark.parametrize(
    "expression",
    [
        lambda v, a: v * a,
        lambda v, a: a * v,
        lambda v, a: v / a,
        lambda v, a: v + a,
        lambda v, a: a + v,
        lambda v, a: v - a,
        lambda v, a: a - v,
        lambda v, a: -v,
        lambda v, a: (a * v + 1) / a - v * 2,
    ],
)
def test_arithmetic_with_numbers_on_either_side(space, expression, factor, number):
    v, a = vector(space, factor=factor), NUMBERS[number]
    before = lasting(v)
    found = expression(v, a)
    assert isinstance(found, Vector)
    assert_is(found, expression(before, float(a)))
    assert_is(v, before)


@pytest.mark.parametrize("operation", [operator.add, operator.sub, operator.mul, operator.truediv])
@pytest.mark.parametrize("left", [None, 2.0, torch.tensor(-0.5, dtype=torch.float64)])
@pytest.mark.parametrize("right", [None, -3.0, torch.tensor(0.25, dtype=torch.float64)])
def test_arithmetic_with_vectors(space, operation, left, right):
    v, u = vector(space, 0, factor=left), vector(space, 1, factor=right)
    before = lasting(v), lasting(u)
    assert_is(operation(v, u), operation(*before))
    assert_is(v, before[0])
    assert_is(u, before[1])


IN_PLACE = {operator.iadd: operator.add, operator.isub: operator.sub}
IN_PLACE |= {operator.imul: operator.mul, operator.itruediv: operator.truediv}


@pytest.mark.parametrize("in_place", IN_PLACE)
@pytest.mark.parametrize("left", [None, 2.0, torch.tensor(-0.5, dtype=torch.float64)])
@pytest.mark.parametrize("right", [None, -3.0, torch.tensor(0.25, dtype=torch.float64)])
def test_in_place_forms_with_vectors(space, in_place, left, right):
    v, u = vector(space, 0, factor=left), vector(space, 1, factor=right)
    before, addresses = (lasting(v), lasting(u)), [t.data_ptr() for t in v.tensors]
    result = in_place(v, u)
    assert result is v
    assert [t.data_ptr() for t in v.tensors] == addresses, "no new memory"
    assert_is(v, IN_PLACE[in_place](*before))
    assert_is(u, before[1])


@pytest.mark.parametrize("in_place", IN_PLACE)
@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("factor", [None, 2.0, torch.tensor(-0.5, dtype=torch.float64)])
def test_in_place_forms_with_numbers(space, in_place, number, factor):
    v, a = vector(space, factor=factor), NUMBERS[number]
    before, addresses = lasting(v), [t.data_ptr() for t in v.tensors]
    assert in_place(v, a) is v
    assert [t.data_ptr() for t in v.tensors] == addresses
    assert_is(v, IN_PLACE[in_place](before, float(a)))


@pytest.mark.parametrize("in_place", IN_PLACE)
@pytest.mark.parametrize("factor", [None, 2.0, torch.tensor(-0.5, dtype=torch.float64)])
@pytest.mark.parametrize("multiple", [None, 0.3, torch.tensor(0.3, dtype=torch.float64)])
def test_in_place_forms_with_a_multiple_of_the_vector_itself(space, in_place, factor, multiple):
    """`g -= g * 0.3` is what the formula says, whatever factor is pending, such as the loss scale's."""
    v = vector(space, factor=factor)
    before = lasting(v)
    in_place(v, v if multiple is None else v * multiple)
    assert_is(v, IN_PLACE[in_place](before, before * (1.0 if multiple is None else float(multiple))))


def test_abs_sqrt_sign_map(space):
    for factor in (None, -2.0, torch.tensor(-2.0, dtype=torch.float64)):
        v = vector(space, factor=factor)
        before = lasting(v)
        assert_is(v.abs(), before.abs())
        assert_is(v.sign(), before.sign())
        assert_is(v.abs().sqrt(), before.abs().sqrt())
        assert_is(v.map(lambda t: t**2 + 1), before**2 + 1)
        assert_is(v, before)
        assert v.map_(lambda t: t.mul_(3).add_(1)) is v
        assert_is(v, 3 * before + 1)


def test_in_place_function_sees_the_numbers_and_not_what_is_yet_to_be_multiplied(space):
    seen = []
    v = vector(space, factor=2.0)
    before = lasting(v)
    v.map_(lambda t: seen.append(t.clone()))
    assert_is(torch.cat([t.flatten() for t in seen]), before)


# --- different parameters -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("factors", [(None, None), (2.0, -3.0), (torch.tensor(2.0), torch.tensor(0.5))])
def test_a_sum_is_over_the_parameters_of_both_in_canonical_order(space, in_place, sign, factors):
    v, u = part(space, [3, 0], 0, factor=factors[0]), part(space, [4, 1, 3], 1, factor=factors[1])
    before, other = expanded(v), expanded(u)
    if in_place:
        if sign > 0:
            v += u
        else:
            v -= u
        found = v
    else:
        found = v + u if sign > 0 else v - u
        assert_is(expanded(v), before)
    assert list(map(id, found.parameters)) == [id(PARAMETERS[i]) for i in (0, 1, 3, 4)]
    assert_is(expanded(found), before + sign * other)
    assert_is(expanded(u), other)
    assert_is(found.norm(), (before + sign * other).norm())


def test_products_and_quotients_are_over_the_left_ones_parameters(space):
    v, u = part(space, [1, 0], 0), part(space, [0, 1, 2], 1)
    assert v.__mul__(u).parameters == v.parameters
    assert_is(expanded(v * u), expanded(v) * expanded(u))
    assert_is(expanded(u * v), expanded(v) * expanded(u)), "what the right one lacks is 0"
    assert_is(expanded(v / u, PARAMETERS[:2]), expanded(v, PARAMETERS[:2]) / expanded(u, PARAMETERS[:2]))


def test_the_same_parameters_in_another_order_are_matched(space):
    order = [2, 0, 4, 1, 3]
    v, u = vector(space, 0), part(space, order, 1)
    assert_is(v + u, expanded(v) + expanded(u))
    assert_is(v * u, expanded(v) * expanded(u))
    assert_is(v / u, expanded(v) / expanded(u))
    assert_is(v.dot(u), expanded(v) @ expanded(u))


def test_over_is_a_part_that_shares_memory(space):
    v = vector(space, factor=2.0)
    chosen = v.over(PARAMETERS[1:3])
    assert chosen.parameters == tuple(PARAMETERS[1:3])
    assert_is(chosen, torch.cat([t.flatten() for t in v.numbers()[1:3]]))
    assert [a is b for a, b in zip(chosen.tensors, v.tensors[1:3], strict=True)] == [True, True]
    assert_is(chosen.norm(), flat(chosen).norm())
    assert v.over(PARAMETERS).shares_memory_with(v)
    assert v.over(part(space, [4, 2])).parameters == (PARAMETERS[2], PARAMETERS[4])
    assert len(v.over([])) == 0


def test_widened_adds_zeros(space):
    v = part(space, [2], factor=3.0)
    before = expanded(v)
    wide = v.widened(vector(space, 1))
    assert list(map(id, wide.parameters)) == list(map(id, PARAMETERS))
    assert_is(wide, before)
    assert wide.widened(v) is wide


def test_widened_leaves_a_shared_vector_as_it_is(space):
    kept = part(space, [2]).share()
    wide = kept.view().widened(vector(space, 1))
    wide += 1
    assert len(kept) == 1
    assert_is(kept, tensors()[2].flatten())


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scaled", [lambda g: g * 2, lambda g: 2 * g, lambda g: -g, lambda g: g / torch.tensor(3.0).double()]
)
def test_scaling_allocates_nothing_and_shares_memory(space, scaled):
    g = vector(space)
    found = scaled(scaled(g))
    assert found.shares_memory_with(g)
    assert all(a is b for a, b in zip(found.tensors, g.tensors, strict=True))
    assert g.factor is None, "the one that was scaled is what it was"
    assert_is(found, scaled(scaled(lasting(g))))


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.__iadd__(1),
        lambda v: v.__isub__(v.clone()),
        lambda v: v.__imul__(3.0),
        lambda v: v.__imul__(v.clone()),
        lambda v: v.__itruediv__(3.0),
        lambda v: v.__itruediv__(v.clone() + 10),
        lambda v: v.map_(lambda t: t.fill_(7)),
        lambda v: v.map_(torch.Tensor.sign_),
        lambda v: v.materialise(),
    ],
)
@pytest.mark.parametrize("factor", [None, 2.0])
def test_in_place_forms_leave_the_numbers_of_another_holder_alone(space, change, factor):
    g = vector(space, factor=factor).share()
    before, kept = lasting(g), g.view()
    norms = g.norm().clone(), g.norm(1).clone()
    for other in (g.view(), g * 0.5, g.view()):
        change(other)
        for holder in (g, kept):
            assert_is(holder, before)
            assert_is(holder.norm(), norms[0])
            assert_is(holder.norm(1), norms[1])


def test_tensors_of_somebody_elses_are_never_overwritten(space):
    values = tensors()
    v = Vector(PARAMETERS, values, space, is_shared=True)
    v *= 2
    v += 1
    assert_is(v, 2 * torch.cat([t.flatten() for t in tensors()]) + 1)
    assert all(torch.equal(a, b) for a, b in zip(values, tensors(), strict=True))
    assert not v.is_shared, "its own from now on"
    addresses = [t.data_ptr() for t in v.tensors]
    v += 1
    assert [t.data_ptr() for t in v.tensors] == addresses


def test_a_part_of_a_vector_that_is_shared_stays_what_it_is(space):
    g = vector(space)
    kept = g.over(PARAMETERS[:2]).share()
    before = lasting(kept)
    g += 1
    assert_is(kept, before)


def test_a_vector_that_is_shared_stays_what_it_is_when_a_part_of_it_is_changed(space):
    g = vector(space)
    chosen = g.over(PARAMETERS[:2])
    kept = g.share()
    before = lasting(kept)
    chosen += 1
    assert_is(kept, before)


def test_a_clone_has_memory_of_its_own(space):
    for factor in (None, 2.0, torch.tensor(0.5)):
        v = vector(space, factor=factor)
        before, norm = lasting(v), v.norm()
        copy = v.clone()
        assert copy.factor is None
        assert_is(copy.norm(), norm)
        copy += 1
        assert_is(v, before)
        assert_is(copy, before + 1)
        assert_is(copy.norm(), (before + 1).norm())


def test_materialised_numbers_are_its_own_memory(space):
    v = vector(space, factor=2.0)
    before, addresses = lasting(v), [t.data_ptr() for t in v.tensors]
    found = v.materialise()
    assert [t.data_ptr() for t in found] == addresses
    assert_is(torch.cat([t.flatten() for t in found]), before)
    assert_is(v, before)


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.__iadd__(1),
        lambda v: v.__iadd__(v.clone()),
        lambda v: v.__isub__(v * torch.tensor(0.5, dtype=torch.float64)),
        lambda v: v.__imul__(-3.0),
        lambda v: v.__imul__(v.clone()),
        lambda v: v.__itruediv__(v.clone() + 10),
        lambda v: v.__itruediv__(torch.tensor(0.3, dtype=torch.float64)),
        lambda v: v.map_(torch.Tensor.sign_),
        lambda v: v.materialise(),
    ],
)
def test_norms_are_those_of_the_numbers_after_they_have_changed(space, change):
    v = vector(space)
    for _ in range(2):
        for p in (1, 2, math.inf):
            assert_is(v.norm(p), torch.linalg.vector_norm(flat(v), p))
        change(v)
    assert_is(v.norm(), flat(v).norm())
    wide = part(space, [0])
    wide.norm()
    wide += v
    assert_is(wide.norm(), flat(wide).norm())


@pytest.mark.parametrize("factor", [None, 2.0, torch.tensor(2.0, dtype=torch.float64)])
def test_where_keeps_all_or_has_a_factor_of_exactly_zero(space, factor):
    v = vector(space, factor=factor)
    before = lasting(v)
    assert_is(v.where(torch.tensor(True)), before)
    none = v.where(torch.tensor(False))
    assert none.factor == 0
    assert_is(none, torch.zeros_like(before))
    assert_is(v, before)


# --- fewer bits -----------------------------------------------------------------------------------------------------

NOT_IN_BFLOAT16 = 1 + 2**-7 + 2**-9


@pytest.mark.parametrize(
    "expression",
    [
        lambda v, a: v * a,
        lambda v, a: (v * a).map_(lambda t: None),
        lambda v, a: v / a,
        lambda v, a: v.__itruediv__(a),
        lambda v, a: (v * a).clone(),
        lambda v, a: (v * a).abs(),
    ],
)
def test_factors_of_float32_are_not_rounded_to_the_sixteen_bits_of_the_vector(space, expression):
    """One operation in float32, rounded once."""
    values = [torch.linspace(1, 2, 64).bfloat16() for _ in range(2)]
    v = Vector(PARAMETERS[:2], [t.clone() for t in values], space)
    exact = expression(Vector(PARAMETERS[:2], [t.double() for t in values], space), NOT_IN_BFLOAT16)
    for t, e in zip(expression(v, torch.tensor(NOT_IN_BFLOAT16)).numbers(), exact.numbers(), strict=True):
        assert t.dtype == torch.bfloat16
        assert torch.equal(t, e.float().bfloat16())


def test_a_multiple_that_is_added_in_sixteen_bits_is_not_one_by_a_rounded_factor(space):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(20_000, generator=generator).bfloat16() for _ in range(2)]
    v = Vector(PARAMETERS[:2], [torch.zeros_like(t) for t in values], space)
    u = Vector(PARAMETERS[:2], values, space)
    v += u * torch.tensor(NOT_IN_BFLOAT16)
    along = flat(u)
    assert abs(flat(v) @ along / (along @ along) - NOT_IN_BFLOAT16) < 1e-3  # 2e-3 with a rounded factor


@pytest.mark.parametrize("types", ["mixed", "float32"])
def test_types_stay_what_they_are(space, types):
    v, u = vector(space, 0, TYPES[types]), vector(space, 1, TYPES[types])
    a = torch.tensor(0.3)
    for found in (v + u * a, v - u, v * u, v / (u.abs() + 1), a * v + 1, v.abs().sqrt(), v.sign(), (v * a).clone()):
        assert [t.dtype for t in found.numbers()] == TYPES[types]
    v += u * a
    assert [t.dtype for t in v.tensors] == TYPES[types]


def test_vectors_of_different_types_are_added_in_the_left_ones(space):
    v, u = vector(space, 0, TYPES["float32"]), vector(space, 1, [torch.bfloat16] * 5)
    expected = lasting(v) + 0.5 * lasting(u)
    for factor in (0.5, torch.tensor(0.5)):
        found = v + u * factor
        assert [t.dtype for t in found.tensors] == TYPES["float32"]
        assert_is(found, expected, 1e-6)
    assert_is(v.dot(u), flat(v) @ flat(u), 1e-5)
    assert_is(u.dot(v), flat(v) @ flat(u), 1e-5)


# --- any expression -------------------------------------------------------------------------------------------------


def random_step(dice, pool):
    """One random operation on Vectors and on their flat counterparts; returns what is new, or has changed."""
    (v, x), (u, y) = dice.choice(pool), dice.choice(pool)
    a = dice.uniform(0.5, 2) * dice.choice([-1, 1])
    b = torch.tensor(a, dtype=torch.float64) if dice.random() < 0.5 else a
    in_place = dice.random() < 0.4
    if in_place:
        w = v.clone() if dice.random() < 0.5 else v.share().view() * dice.choice([1, 0.5])
        x = flat(w).clone()
    operations = [
        (lambda: v + u, lambda: x + y),
        (lambda: v - u * b, lambda: x - y * a),
        (lambda: v * u, lambda: x * y),
        (lambda: v / (u.abs() + 1), lambda: x / (y.abs() + 1)),
        (lambda: b * v, lambda: a * x),
        (lambda: v / b, lambda: x / a),
        (lambda: b - v, lambda: a - x),
        (lambda: v + b, lambda: x + a),
        (lambda: -v, lambda: -x),
        (lambda: v.abs().sqrt(), lambda: x.abs().sqrt()),
        (lambda: v * (u.dot(v) / (v.dot(v) + 1)), lambda: x * (y @ x / (x @ x + 1))),
        (lambda: v / (1 + v.norm(3)), lambda: x / (1 + torch.linalg.vector_norm(x, 3))),
        (lambda: u + v.sign() * b, lambda: y + x.sign() * a),
        (lambda: v.where(u.norm() > v.norm()), lambda: x if y.norm() > x.norm() else 0 * x),
    ]
    in_place_operations = [
        (lambda: w.__iadd__(u * b), lambda: x + y * a),
        (lambda: w.__isub__(u), lambda: x - y),
        (lambda: w.__imul__(u), lambda: x * y),
        (lambda: w.__imul__(b), lambda: x * a),
        (lambda: w.__itruediv__(u.abs() + 1), lambda: x / (y.abs() + 1)),
        (lambda: w.__itruediv__(b), lambda: x / a),
        (lambda: w.__iadd__(b), lambda: x + a),
        (lambda: w.map_(torch.Tensor.tanh_), lambda: x.tanh()),
    ]
    ours, flat_one = dice.choice(in_place_operations if in_place else operations)
    return ours(), flat_one()


@pytest.mark.parametrize("seed", range(12))
def test_any_expression_is_the_one_on_the_flat_vector_and_changes_nothing_else(space, seed):
    dice = random.Random(seed)
    pool = [(v, lasting(v)) for v in (vector(space, i) for i in range(3))]
    for _ in range(40):
        v, x = random_step(dice, pool)
        scale = 1 + x.norm()  # kept of moderate size
        pool.append((v / scale, x / scale))
        pool = pool[-8:]
        for u, y in pool:
            assert_is(u, y, 1e-9)
            assert_is(u.norm(), y.norm(), 1e-9)
            assert_is(u.norm(1), y.norm(1), 1e-9)
            assert_is(u.norm(math.inf), y.norm(math.inf), 1e-9)
