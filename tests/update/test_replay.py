import collections
import copy
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from hf_sam.update import contents
from hf_sam.update.random_states import RandomStates
from hf_sam.update.replay import PassState
from hf_sam.update.runner import PassRunner

CPU = torch.device("cpu")
WATCHED = 2  # steps, when a run begins


def test_every_generator_is_replayed():
    states = RandomStates([CPU])
    first = (torch.rand(3), np.random.rand(3), random.random())
    states.restore()
    again = (torch.rand(3), np.random.rand(3), random.random())
    assert torch.equal(first[0], again[0])
    assert (first[1] == again[1]).all()
    assert first[2] == again[2]


class Statistics(nn.Module):
    """BatchNorm, a constant buffer, and an average kept by hand and replaced rather than changed in place."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("constant", torch.ones(2))
        self.register_buffer("average", torch.zeros(3))

    def forward(self, x):
        self.average = 0.9 * self.average + 0.1 * x.mean(0)
        return self.norm(x) * self.constant[0]


def clean_pass(state, model, step, x=None):
    """A first pass of a step, and what it started from."""
    before = state.capture(RandomStates([CPU]), step)
    state.refresh_snapshot(before)  # after the trainer's `model.train()`
    model(torch.randn(8, 3) if x is None else x)
    state.detect_changes(before)
    return before


class Runner(SimpleNamespace):
    """As much of the runner of passes as its own context around repetitions looks at."""

    def __getattr__(self, name):
        return None


def preserving_state(state, step=0):
    return PassRunner.preserving_state(Runner(state=state, index=step, _random_states=lambda: None))


def buffers(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_same(now, then):
    assert now.keys() == then.keys()
    assert all(torch.equal(value, then[name]) for name, value in now.items())


def test_statistics_move_with_the_clean_pass_only():
    torch.manual_seed(0)
    model, x = Statistics(), torch.randn(8, 3)
    state, at_first = PassState([model]), buffers(model)
    before = clean_pass(state, model, 0, x)
    after_clean = buffers(model)
    with preserving_state(state):
        state.restore(before)
        assert_same(buffers(model), at_first)
        model(x + 1)
        assert model.norm.num_batches_tracked == 1
        assert not torch.equal(model.average, after_clean["average"])
    assert_same(buffers(model), after_clean)
    assert model.norm.num_batches_tracked == 1


def test_statistics_are_kept_when_the_pass_raises():
    model = Statistics()
    state = PassState([model])
    clean_pass(state, model, 0)
    before = buffers(model)
    with pytest.raises(RuntimeError), preserving_state(state):
        model(torch.randn(8, 3))
        raise RuntimeError
    assert_same(buffers(model), before)


def copied(snapshot):
    return {id(snapshot.tensors[i]) for i in snapshot.copies}


def test_constants_are_not_copied_once_passes_have_been_watched():
    model = Statistics()
    state = PassState([model])
    for step in range(WATCHED):
        clean_pass(state, model, step)
    snapshot = state.capture(None, WATCHED)
    assert not snapshot.is_watched
    assert id(model.constant) not in copied(snapshot)
    assert id(model.norm.running_mean) in copied(snapshot)
    assert any(t is model.constant for t in snapshot.tensors), "its version is still looked at"


def test_what_hangs_on_the_owner_goes_back_even_when_changed_in_place():
    class Host:
        _metrics = None

    host = Host()
    host._metrics, host.ignored = {"train": {"accuracy": [1.0]}}, 0
    state = PassState([], owner=host, ignored=("ignored",))
    for step in range(WATCHED + 2):
        before = state.capture(None, step)
        host._metrics["train"]["accuracy"].append(2.0)
        host._missing = 1
        host.ignored = step
        state.detect_changes(before)
        assert before.is_restorable
        state.restore(before)
        assert host._metrics == {"train": {"accuracy": [1.0]}}
        assert not hasattr(host, "_missing")
        assert host.ignored == step


# --- plain attributes of modules ------------------------------------------------------------------------------------


class Tally:
    """An object of the user's own, with what such objects hold."""

    def __init__(self):
        self.count, self.seen, self.total = 0, [], torch.zeros(2)


class Keeps(nn.Module):
    """A module whose forward changes its attribute `kept` by the function given."""

    def __init__(self, kept, change):
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.kept, self.change = kept, change

    def forward(self, x):
        self.change(self)


def replaced_number(module):
    module.kept += 1


def replaced_tensor(module):
    module.kept = module.kept + 1


def changed_tensor(module):
    module.kept += torch.ones(3)


def changed_data(module):
    module.kept.data.mul_(2).add_(1)


def changed_list(module):
    module.kept.append(len(module.kept))
    module.kept[0] = -len(module.kept)


def changed_deque(module):
    module.kept.append(module.kept[-1] + 1)


def changed_dict(module):
    module.kept["a"].append(1)
    module.kept.setdefault("b", []).append(2)
    module.kept["t"].add_(1)


def changed_set(module):
    module.kept.add(len(module.kept))


def changed_counter(module):
    module.kept["x"] += 1


def changed_array(module):
    module.kept *= 2


def changed_object(module):
    module.kept.count += 1
    module.kept.seen.append(module.kept.count)
    module.kept.total.add_(module.kept.count)
    module.kept.new = module.kept.count


def torch_draw(module):
    torch.rand(3, generator=module.kept)


def numpy_draw(module):
    module.kept.random(3)


def python_draw(module):
    module.kept.random()


def appeared_number(module):
    module.appeared = getattr(module, "appeared", 0) + 1


KEPT = {
    "number": (lambda: 3, replaced_number),
    "tensor replaced": (lambda: torch.zeros(3), replaced_tensor),
    "tensor changed": (lambda: torch.zeros(3), changed_tensor),
    "data of a tensor changed": (lambda: torch.zeros(3), changed_data),
    "list": (lambda: [1, 2], changed_list),
    "deque": (lambda: collections.deque([1, 2, 3], maxlen=3), changed_deque),
    "dict of lists": (lambda: {"a": [0], "t": torch.zeros(2)}, changed_dict),
    "set": (lambda: {0}, changed_set),
    "Counter": (lambda: collections.Counter(x=2), changed_counter),
    "array": (lambda: np.ones(3), changed_array),
    "object of the user's": (Tally, changed_object),
    "torch generator": (lambda: torch.Generator().manual_seed(0), torch_draw),
    "numpy generator": (lambda: np.random.default_rng(0), numpy_draw),
    "numpy RandomState": (lambda: np.random.RandomState(0), numpy_draw),
    "python generator": (lambda: random.Random(0), python_draw),
    "attribute that appears": (lambda: None, appeared_number),
}


def plain(value):
    """A copy of the value that can be compared."""
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, np.random.Generator):
        return copy.deepcopy(value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return [np.asarray(part).tolist() for part in value.get_state()]
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, torch.Tensor | np.ndarray):
        return value.tolist()
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, Tally):
        return plain(vars(value))
    return [plain(entry) for entry in value] if isinstance(value, list | collections.deque | set) else value


def picture(module):
    return plain(module.kept), getattr(module, "appeared", None)


@pytest.mark.parametrize("kind", KEPT)
def test_the_second_pass_starts_as_the_first_did_and_leaves_no_trace(kind):
    make, change = KEPT[kind]
    module = Keeps(make(), change)
    state = PassState([nn.ModuleDict({"inside": module})])
    value = module.kept
    for step in range(WATCHED + 3):
        at_first = picture(module)
        before = clean_pass(state, module, step)
        after_clean = picture(module)
        assert after_clean != at_first
        assert before.is_restorable
        with preserving_state(state, step):
            for _ in range(2):
                state.restore(before)
                assert picture(module) == at_first
                module(None)
                assert picture(module) == after_clean
        assert picture(module) == after_clean
    if "replaced" not in kind and kind != "number":
        assert module.kept is value, "whoever else holds it sees what became of it"


def test_what_no_pass_changes_costs_no_copies_later():
    module = Keeps({"table": torch.zeros(4), "list": [1]}, lambda module: None)
    module.array, module.tensor = np.zeros(3), torch.zeros(3)
    state = PassState([module])
    for step in range(WATCHED):
        assert clean_pass(state, module, step).is_restorable
    snapshot = state.capture(None, WATCHED)
    assert not copied(snapshot)
    assert not snapshot.contents
    assert {id(one.value) for one in snapshot.shallow.contents} == {id(module.kept), id(module.array)}


# --- parameters without gradient ------------------------------------------------------------------------------------

with_no_grad = torch.no_grad()
FROZEN_CHANGES = {
    "mul_": lambda p: p.mul_(2),
    "copy_": lambda p: p.copy_(p + 1),
    ".data.mul_": lambda p: p.data.mul_(2),
    ".data =": lambda p: setattr(p, "data", p.data * 2),
    ".data = of another shape": lambda p: setattr(p, "data", torch.cat([p.data.flatten()[:6], torch.ones(1)])),
    "grown": lambda p: setattr(p, "data", torch.cat([p.data.flatten(), torch.ones(1)])),
}


class Frozen(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.teacher, self.student = nn.Linear(3, 2), nn.Linear(3, 2)
        self.teacher.requires_grad_(False)
        self.change = change

    def forward(self, x):
        with torch.no_grad():
            self.change(self.teacher.weight)


@pytest.mark.parametrize("change", FROZEN_CHANGES)
def test_frozen_parameters_that_a_pass_changes_are_put_back(change):
    model = Frozen(FROZEN_CHANGES[change])
    state, p = PassState([model]), model.teacher.weight
    for step in range(WATCHED + 2):
        at_first = p.detach().clone()
        before = clean_pass(state, model, step)
        after_clean = p.detach().clone()
        assert before.is_restorable
        with preserving_state(state, step):
            state.restore(before)
            assert torch.equal(p, at_first)
            model(None)
        assert torch.equal(p, after_clean)
        assert model.teacher.weight is p
        assert at_first.shape != after_clean.shape or not torch.equal(at_first, after_clean) or change.endswith("shape")


def test_a_frozen_parameter_that_is_replaced_is_put_back():
    model = Frozen(lambda p: None)
    state, original = PassState([model]), model.teacher.weight
    before = state.capture(None, 0)
    model.teacher.weight = nn.Parameter(torch.zeros(2, 3), requires_grad=False)
    state.detect_changes(before)
    state.restore(before)
    assert model.teacher.weight is original


def test_trained_parameters_are_left_alone():
    """They are perturbed, and put back by the perturbation."""
    model = Frozen(lambda p: None)
    state = PassState([model])
    before = clean_pass(state, model, 0)
    with torch.no_grad():
        model.student.weight.fill_(7)
    state.restore(before)
    assert (model.student.weight == 7).all()


def test_parameters_thawed_within_the_step_are_left_alone():
    model = Frozen(lambda p: p.mul_(2))
    state = PassState([model])
    before = clean_pass(state, model, 0)
    model.teacher.requires_grad_(True)
    with torch.no_grad():
        model.teacher.weight.fill_(7)
    state.restore(before)
    assert (model.teacher.weight == 7).all()


def test_frozen_parameters_are_not_looked_at_where_the_engine_moves_them():
    model = Frozen(lambda p: p.mul_(2))
    state = PassState([model], watches_parameters=False)
    before = clean_pass(state, model, 0)
    assert before.is_restorable
    assert not before.tensors


def test_the_smallest_frozen_parameters_are_copied_within_the_budget():
    model = Frozen(lambda p: None)
    snapshot = PassState([model]).capture(None, 0, budget=model.teacher.bias.nbytes)
    assert copied(snapshot) == {id(model.teacher.bias)}
    changing = Frozen(lambda p: p.mul_(2))
    state = PassState([changing])
    before = state.capture(None, 0, budget=0)
    changing(None)
    state.detect_changes(before)
    assert not before.is_restorable, "told by its version"
    before = state.capture(None, 0, budget=0)
    assert id(changing.teacher.weight) in copied(before)


# --- what begins to change later ------------------------------------------------------------------------------------


@pytest.mark.parametrize("looks_again", [False, True])
def test_statistics_of_a_layer_that_is_released_later_are_put_back(looks_again):
    torch.manual_seed(0)
    model, x = Statistics(), torch.randn(8, 3)
    state = PassState([model])
    model.norm.eval()
    for step in range(WATCHED + 2):
        clean_pass(state, model, step, x)
    at_first = buffers(model)
    before = state.capture(None, WATCHED + 2)
    model.norm.train()  # by the trainer's `model.train()`
    if looks_again:
        state.refresh_snapshot(before)
    model(x)
    state.detect_changes(before)
    after_clean = buffers(model)
    assert before.is_restorable
    assert after_clean["norm.num_batches_tracked"] == at_first["norm.num_batches_tracked"] + 1
    with preserving_state(state, WATCHED + 2):
        state.restore(before)
        assert_same(buffers(model), at_first)
        assert model.norm.training, "the mode is the trainer's to set"
        model(x + 1)
    assert_same(buffers(model), after_clean)


LATER = {
    "buffer": lambda module: module.buffer.add_(1),
    "list": lambda module: module.list.append(1),
    "dict": lambda module: module.dict["a"].append(1),
    "tensor in a list": lambda module: module.list[0].add_(1),
    "object": lambda module: module.object.seen.append(1),
    "frozen parameter": lambda module: module.frozen.add_(1),
}


class Later(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.register_buffer("buffer", torch.zeros(2))
        self.list, self.dict, self.object = [torch.zeros(2)], {"a": []}, Tally()
        self.frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
        self.change, self.changes = change, False

    def forward(self, x):
        if self.changes:
            self.change(self)

    def picture(self):
        return plain([self.buffer, self.list, self.dict, self.object, self.frozen.detach()])


@pytest.mark.parametrize("what", LATER)
def test_what_begins_to_change_later_is_lost_once_and_kept_from_then_on(what):
    model = Later(LATER[what])
    state = PassState([model])
    outcomes = []
    for step in range(WATCHED + 4):
        model.changes = step > WATCHED
        at_first = model.picture()
        before = clean_pass(state, model, step)
        after_clean = model.picture()
        with preserving_state(state, step):
            state.restore(before)
            assert not before.is_restorable or model.picture() == at_first
        assert model.picture() == after_clean
        outcomes.append(before.is_restorable)
    assert outcomes == [True] * (WATCHED + 1) + [False] + [True] * 2


def test_a_module_that_appears_is_watched_from_then_on():
    model = nn.Module()
    model.kept = Keeps([0], changed_list)
    state = PassState([model])
    for step in range(WATCHED + 2):
        clean_pass(state, model.kept, step)
    model.other = other = Keeps(torch.zeros(3), changed_tensor)
    for step in range(WATCHED + 2, 2 * WATCHED + 6):
        at_first = picture(other)
        before = clean_pass(state, other, step)
        after_clean = picture(other)
        with preserving_state(state, step):
            state.restore(before)
            assert picture(other) == at_first
        assert before.is_restorable
        assert picture(other) == after_clean


def test_a_module_that_comes_before_the_forward_is_taken_in():
    """As the trainer's `model.train()` may make one."""
    model = nn.Module()
    model.kept = Keeps([0], changed_list)
    state = PassState([model])
    for step in range(WATCHED + 2):
        clean_pass(state, model.kept, step)
    before = state.capture(None, WATCHED + 2)
    model.kept.other = other = Keeps(torch.zeros(3), changed_tensor)
    state.refresh_snapshot(before)
    other(None)
    state.detect_changes(before)
    assert before.is_restorable
    state.restore(before)
    assert torch.equal(other.kept, torch.zeros(3))


def test_much_nested_data_is_not_counted_to_the_end():
    texts = [["word"] * 500 for _ in range(9000)]
    assert contents.is_data(texts)
    assert contents.entries(texts) < 11_000
    assert not contents.is_data(texts[:2])
