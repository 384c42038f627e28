import pytest
import torch
from torch import nn

from hf_sam.update.memory import Memory
from hf_sam.update.vector import Space, Vector

PARAMETERS = {name: nn.Parameter(torch.zeros(shape)) for name, shape in (("a", (2, 3)), ("b", (4,)), ("c", ()))}
NAMES = {p: name for name, p in PARAMETERS.items()}


def space():
    return Space(order=list(PARAMETERS.values()))


def vector(seed=0, names="abc", **kwargs):
    generator = torch.Generator().manual_seed(seed)
    parameters = [PARAMETERS[name] for name in names]
    return Vector(parameters, [torch.randn(p.shape, generator=generator) for p in parameters], space(), **kwargs)


def memory(*names, **kwargs):
    return Memory(names or ("mean",), "method='mine'", **kwargs)


def flat(v):
    return torch.cat([t.flatten() for t in v.numbers()])


def test_a_name_that_is_not_declared_is_refused_with_the_line_to_write():
    mine = memory("mean", "square")
    for use in (
        lambda: mine["means"],
        lambda: mine.__setitem__("means", vector()),
        lambda: mine.__delitem__("means"),
        lambda: mine.get("means"),
    ):
        with pytest.raises(
            ValueError, match=r"method='mine' uses step\.memory\['means'\] without declaring it"
        ) as error:
            use()
        assert "memory = ('mean', 'square', 'means')" in str(error.value)
    assert "means" not in mine


@pytest.mark.parametrize("value", [torch.ones(3), 1.0, None, [vector()]])
def test_what_is_no_vector_is_refused(value):
    with pytest.raises(ValueError, match=rf"must be a Vector, not {type(value).__name__}"):
        memory()["mean"] = value
    assert len(memory()) == 0


def test_an_empty_memory_has_nothing():
    mine = memory("mean", "square")
    assert mine.get("mean") is None
    with pytest.raises(KeyError):
        mine["mean"]
    assert list(mine) == []
    assert not mine.is_complete
    mine["mean"] = vector()
    assert list(mine) == ["mean"]
    assert not mine.is_complete
    mine["square"] = vector()
    assert mine.is_complete
    assert len(mine) == 2
    del mine["mean"]
    assert "mean" not in mine
    assert list(mine) == ["square"]


def test_what_is_kept_is_not_changed_by_whoever_wrote_or_read_it():
    mine, g = memory(), vector()
    before = flat(g).clone()
    mine["mean"] = g
    g *= 2
    g += 1
    assert torch.equal(flat(mine["mean"]), before)
    read = mine["mean"]
    read *= 3
    assert torch.equal(flat(mine["mean"]), before)
    read.map_(torch.Tensor.zero_)
    assert torch.equal(flat(mine["mean"]), before)


def test_what_is_kept_does_not_change_with_what_it_was_read_from():
    weights = [torch.ones(2, 3), torch.ones(4), torch.ones(())]
    mine = memory("anchor", "again", scalars=("norm", "size"))
    mine["anchor"] = Vector(list(PARAMETERS.values()), weights, space(), is_shared=True)
    mine["again"] = mine["anchor"]
    mine["norm"] = mine["size"] = torch.tensor(2.0)
    for w in weights:
        w.mul_(5)  # the optimizer steps
    assert torch.equal(flat(mine["anchor"]), torch.ones(11))
    addresses = [t.data_ptr() for t in mine.state_dict(NAMES).values()]
    assert len(set(addresses)) == len(addresses) == 8  # safetensors refuses tensors that share memory


def test_a_scalar_is_a_tensor_without_a_history():
    mine = memory("mean", scalars=("norm",))
    weight = nn.Parameter(torch.tensor(2.0))
    mine["norm"] = weight * 3
    assert not mine["norm"].requires_grad
    mine["norm"] = 4.0
    assert torch.equal(mine["norm"], torch.tensor(4.0))


@pytest.mark.parametrize("was_skipped", [False, True])
def test_what_is_written_counts_once_the_step_was_not_skipped(was_skipped):
    mine = memory("mean", "square", defers_commit=True)
    first, second = vector(0), vector(1)
    mine["mean"] = first
    assert torch.equal(flat(mine["mean"]), flat(first)), "within its step it can be read"
    mine.commit(was_skipped=False)
    mine["mean"] = second
    mine["square"] = second
    assert torch.equal(flat(mine["mean"]), flat(second))
    mine.commit(was_skipped)
    assert torch.equal(flat(mine["mean"]), flat(first if was_skipped else second))
    assert ("square" in mine) == (not was_skipped)
    mine.commit(was_skipped=True)  # of a step that wrote nothing
    assert torch.equal(flat(mine["mean"]), flat(first if was_skipped else second))


@pytest.mark.parametrize("was_skipped", [False, True])
def test_scalars_wait_as_vectors_do(was_skipped):
    mine = memory(defers_commit=True, scalars=("norm",))
    mine["norm"] = 1.0
    mine.commit(was_skipped=False)
    mine["norm"] = 2.0
    mine.commit(was_skipped)
    assert mine["norm"] == (1.0 if was_skipped else 2.0)


def test_without_waiting_a_skipped_step_changes_nothing():
    mine = memory()
    mine["mean"] = vector()
    mine.commit(was_skipped=True)
    assert "mean" in mine


@pytest.mark.parametrize("defers_commit", [False, True])
@pytest.mark.parametrize("factor", [None, 2.0, torch.tensor(0.5)])
def test_a_checkpoint_holds_all_of_it(defers_commit, factor):
    mine = memory("mean", "square", defers_commit=defers_commit, scalars=("norm",))
    mine["mean"], mine["square"], mine["norm"] = vector(0, factor=factor), vector(1, "ac"), 3.0
    mine.commit(was_skipped=False)
    state = mine.state_dict(NAMES)
    assert set(state) == {"mean/a", "mean/b", "mean/c", "square/a", "square/c", "norm/"}
    assert all(isinstance(t, torch.Tensor) for t in state.values())

    other = memory("mean", "square", defers_commit=defers_commit, scalars=("norm",))
    shuffled = {name: state[name].clone() for name in sorted(state, reverse=True)}
    other.load_state_dict(shuffled, PARAMETERS, space())
    assert other.is_complete
    for name in ("mean", "square"):
        assert torch.equal(flat(other[name]), flat(mine[name]))
        assert [id(p) for p in other[name].parameters] == [id(p) for p in mine[name].parameters], "norms alike"
        assert torch.equal(other[name].norm(), Vector(other[name].parameters, mine[name].numbers()).norm())
    assert other["norm"] == 3.0
    other.commit(was_skipped=True)
    assert other.is_complete, "what was loaded does not wait"


def test_what_was_loaded_is_not_changed_by_whoever_reads_it():
    mine = memory()
    mine.load_state_dict({"mean/b": torch.ones(4)}, PARAMETERS, space())
    read = mine["mean"]
    read += 1
    assert torch.equal(flat(mine["mean"]), torch.ones(4))


def test_checkpoints_of_an_older_format_name_the_parameters_alone():
    mine = memory("orthogonal")
    expected = vector()
    mine.load_state_dict(dict(zip("abc", expected.numbers(), strict=True)), PARAMETERS, space())
    assert torch.equal(flat(mine["orthogonal"]), flat(expected))


def test_a_parameter_that_is_gone_is_left_out():
    mine = memory()
    mine.load_state_dict({"mean/b": torch.ones(4), "mean/gone": torch.ones(7)}, PARAMETERS, space())
    assert mine["mean"].parameters == (PARAMETERS["b"],)
    assert set(mine.state_dict({})) == set()


def test_a_part_of_another_shape_is_refused():
    with pytest.raises(
        ValueError, match=r"a shard of b of shape \[5\], but this process has one of shape \[4\]\. Resume"
    ):
        memory().load_state_dict({"mean/b": torch.ones(5)}, PARAMETERS, space())
