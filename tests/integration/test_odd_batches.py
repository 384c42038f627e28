"""Batches that the stock Trainer takes: entries of any kind in any place, and batches that a pass changes in place."""

from __future__ import annotations

import copy
from collections import UserDict

import numpy as np
import pytest
import torch
from integration import equivalence, tiny
from integration.equivalence import FEWER_PASSES, SETTINGS, assert_like_stock, both
from torch import nn
from torch.nn import functional as F

from hf_sam import SAMConfig

# --- entries that are no tensors ----------------------------------------------------------------------------------


class TakesMore(tiny.Mlp):
    """Ignores what comes beside the tensors."""

    def forward(self, extra=None, x=None, labels=None, more=None):
        return super().forward(x, labels)


def takes_more() -> TakesMore:
    tiny.set_seed(0)
    return TakesMore()


FIRST_ENTRIES = {
    "string": lambda n: "nli",
    "empty string": lambda n: "",
    "number": lambda n: 0.5,
    "None": lambda n: None,
    "bool": lambda n: True,
    "array": lambda n: np.zeros((2, 3)),
    "numpy number": lambda n: np.float32(2),
    "empty list": lambda n: [],
    "empty dict": lambda n: {},
    "0-dim tensor": lambda n: torch.tensor(3.0),
    "sparse tensor": lambda n: torch.eye(n + 1).to_sparse(),
    "nested tensor": lambda n: torch.nested.as_nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    "strings": lambda n: ["a"] * n,
    "list that begins with None": lambda n: [None, torch.zeros(n, 1)],
    "nested list": lambda n: [[], ["a", {"b": None}]],
    "dict of strings": lambda n: {"task": "nli", "ids": ["a"] * n},
    "tuple": lambda n: ("a", torch.ones(n)),
    "set": lambda n: {"a"},
    "bytes": lambda n: b"a",
    "function": lambda n: len,
    "object": lambda n: Plain(),
}
OF_ANOTHER_LENGTH = {"longer": lambda n: torch.zeros(n + 3), "empty": lambda n: torch.zeros(0, 2)}


class Plain:
    """Nothing that a library knows."""


def with_first(entry):
    """A collator whose batches begin with `entry`, made from their size."""

    def collate(rows):
        tensors = equivalence.batches(rows, len(rows))[0]
        return {"extra": entry(len(rows)), **tensors}

    return collate


of_every_entry = pytest.mark.parametrize("entry", FIRST_ENTRIES.values(), ids=FIRST_ENTRIES)


@pytest.mark.parametrize(
    "entry", [*FIRST_ENTRIES.values(), *OF_ANOTHER_LENGTH.values()], ids=[*FIRST_ENTRIES, *OF_ANOTHER_LENGTH]
)
@pytest.mark.parametrize(("scope", "accumulation"), [("micro", 1), ("device", 2)])
def test_a_batch_may_begin_with_anything(entry, scope, accumulation, tmp_path):
    extra = {"data_collator": with_first(entry)}
    assert_like_stock(*both(tmp_path, scope, accumulation, model=takes_more, extra=lambda model: extra))


@pytest.mark.parametrize("method", FEWER_PASSES, ids=lambda method: method["method"])
@pytest.mark.parametrize("name", ["string", "None", "0-dim tensor", "empty list"])
def test_a_batch_may_begin_with_anything_where_there_are_fewer_passes(name, method, tmp_path):
    extra = {"data_collator": with_first(FIRST_ENTRIES[name])}
    runs = both(tmp_path, sam=method, model=takes_more, extra=lambda model: extra, max_steps=4)
    assert_like_stock(*runs, perturbs=False)


@of_every_entry
def test_m_finds_the_number_of_examples_behind_the_first_entry(entry, tmp_path):
    assert_splits_as_micro_batches(takes_more_in_float64, with_first(entry), lambda b: b, tmp_path)


@pytest.mark.parametrize("entry", OF_ANOTHER_LENGTH.values(), ids=OF_ANOTHER_LENGTH)
def test_m_beside_tensors_of_several_lengths_is_right_or_refused(entry, tmp_path):
    """Class weights, packed offsets: which length is that of the examples can be a guess."""
    with equivalence.right_or_refused("m"):
        assert_splits_as_micro_batches(takes_more_in_float64, with_first(entry), lambda b: b, tmp_path)


@pytest.mark.parametrize("name", ["string", "number", "None", "array", "empty list", "0-dim tensor"])
@pytest.mark.parametrize("sam", [{"ascent_fraction": 0.5}, {"method": "subset", "ascent_fraction": 0.5}], ids=str)
def test_a_fraction_finds_the_number_of_examples_behind_the_first_entry(name, sam, tmp_path):
    """The ascent sees the first half of each batch."""
    data, reference = tiny.vectors(dtype=torch.float64), takes_more_in_float64()
    seen: list[int] = []
    trainer = equivalence.trainer_for(
        SAMConfig(rho=0.5, **sam),
        tmp_path,
        model=takes_more_in_float64,
        data=data,
        extra=lambda model: {"data_collator": with_first(FIRST_ENTRIES[name])},
        max_steps=1,
        **equivalence.PLAIN_SGD,
    )
    trainer.model.first.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    trainer.train()
    assert seen == [2, 4]
    batch = equivalence.batches(data, 4)[0]
    parameters = [p for p in reference.parameters() if p.requires_grad]
    g = torch.autograd.grad(reference(x=batch["x"][:2], labels=batch["labels"][:2])["loss"], parameters)
    norm = torch.stack([part.norm() for part in g]).norm()
    moved = copy.deepcopy(reference)
    with torch.no_grad():
        for p, part in zip(moved.parameters(), g, strict=True):
            p.add_(0.5 * part / norm)
    g_s = torch.autograd.grad(moved(**batch)["loss"], list(moved.parameters()))
    for ours, w, part in zip(trainer.model.parameters(), parameters, g_s, strict=True):
        torch.testing.assert_close(ours, w - 0.1 * part, rtol=1e-9, atol=1e-11)


# --- examples anywhere in the batch -------------------------------------------------------------------------------


class Nested(tiny.Mlp):
    """Takes its examples from inside of other containers."""

    def forward(self, task=None, inputs=None, views=None, targets=None):
        if views is not None:
            x, other = views
            x = x + 0.5 * other
        else:
            x = inputs["deep"]["x"]
        labels = inputs["labels"] if targets is None else targets
        return super().forward(x, labels)


def nested(dtype=torch.float64) -> Nested:
    tiny.set_seed(0)
    return Nested().to(dtype)


def takes_more_in_float64() -> TakesMore:
    return takes_more().double()


class Features(UserDict):
    """A mapping that is no dict, as tokenizers return them."""


NESTINGS = {
    "in a dict": lambda x, y: {"task": "a", "inputs": {"deep": {"x": x}, "labels": y}},
    "in a list": lambda x, y: {"task": None, "views": [x, 2 * x], "targets": y},
    "in a tuple": lambda x, y: {"views": (x, x.flip(1)), "targets": y, "task": 1},
    "in a mapping": lambda x, y: {"task": "a", "inputs": Features({"deep": {"x": x}, "labels": y})},
    "the batch is a mapping": lambda x, y: Features({"task": 2, "inputs": {"deep": {"x": x}, "labels": y}}),
}


def assert_splits_as_micro_batches(model, collator, by_hand, folder):
    """`m=2` on batches of 4, against SAM by hand whose micro-batches have 2 examples each."""
    data = tiny.vectors(dtype=torch.float64)
    halves = [by_hand(batch) for batch in equivalence.batches(data, 2)]
    expected = equivalence.sgd_steps_by_hand(
        model(),
        equivalence.windows(halves, 2, 3),
        rho=0.5,
        lr=0.1,
        scope="micro",
        loss_of=lambda m, batch: m(**batch)["loss"],
    )
    sam = SAMConfig(rho=0.5, scope="micro", m=2)
    equivalence.assert_steps_as_by_hand(
        folder,
        expected,
        sam,
        model=model,
        data=data,
        extra=lambda model: {"data_collator": collator},
        remove_unused_columns=False,
    )


@pytest.mark.parametrize("nesting", NESTINGS.values(), ids=NESTINGS)
def test_m_splits_examples_anywhere_in_the_batch(nesting, tmp_path):
    def collate(rows):
        batch = equivalence.batches(rows, len(rows))[0]
        return nesting(batch["x"], batch["labels"])

    assert_splits_as_micro_batches(nested, collate, lambda batch: nesting(batch["x"], batch["labels"]), tmp_path)


@pytest.mark.parametrize("nesting", NESTINGS.values(), ids=NESTINGS)
@pytest.mark.parametrize(("scope", "accumulation"), [("micro", 1), ("device", 2)])
def test_examples_anywhere_in_the_batch(nesting, scope, accumulation, tmp_path):
    def collate(rows):
        batch = equivalence.batches(rows, len(rows))[0]
        return nesting(batch["x"], batch["labels"])

    runs = both(
        tmp_path,
        scope,
        accumulation,
        model=lambda: nested(torch.float32),
        extra=lambda model: {"data_collator": collate},
        remove_unused_columns=False,
    )
    assert_like_stock(*runs)


class FromASeed(tiny.Mlp):
    """Makes its examples of a number."""

    def forward(self, seed):
        generator = torch.Generator().manual_seed(int(seed))
        x = torch.randn(4, 6, generator=generator)
        return super().forward(x, torch.randint(tiny.CLASSES, (4,), generator=generator))


SIZELESS = {"a number": lambda rows: {"seed": 3}, "0-dim tensor": lambda rows: {"seed": torch.tensor(3)}}


@pytest.mark.parametrize("collate", SIZELESS.values(), ids=SIZELESS)
@pytest.mark.parametrize(
    ("field", "sam"),
    [
        ("m", {"scope": "micro", "m": 2}),
        ("ascent_fraction", {"ascent_fraction": 0.5}),
        ("ascent_fraction|subset", {"method": "subset"}),
    ],
)
def test_a_batch_without_a_size_is_refused_where_parts_are_wanted(field, sam, collate, tmp_path):
    with pytest.raises(ValueError, match=rf"\b({field})\b") as error:
        equivalence.trained(
            SAMConfig(rho=0.5, **sam), tmp_path, model=FromASeed, extra=lambda model: {"data_collator": collate}
        )
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("collate", SIZELESS.values(), ids=SIZELESS)
@pytest.mark.parametrize(("scope", "accumulation"), SETTINGS)
def test_a_batch_without_a_size_is_taken_whole(collate, scope, accumulation, tmp_path):
    def model():
        tiny.set_seed(0)
        return FromASeed()

    assert_like_stock(*both(tmp_path, scope, accumulation, model=model, extra=lambda model: {"data_collator": collate}))


# --- changed in place ---------------------------------------------------------------------------------------------


def collate(rows):
    batch = equivalence.batches(rows, len(rows))[0]
    return {
        "x": batch["x"],
        "labels": batch["labels"],
        "meta": {"scale": torch.full((len(rows), 1), 1.5).to(batch["x"]), "names": ["a", "b"]},
        "queue": [3.0, 2.0, 1.0],
        "array": np.ones(6),
    }


class TakesAll(tiny.Mlp):
    def forward(self, x, labels=None, meta=None, queue=None, array=None):
        return super().forward(x, labels)


class NormalisesPixels(TakesAll):
    def forward(self, x, labels, meta=None, queue=None, array=None):
        return super().forward(x.sub_(0.3).div_(0.5), labels)


class NormalisesThroughData(TakesAll):
    def forward(self, x, labels, meta=None, queue=None, array=None):
        x.data.mul_(2)
        return super().forward(x, labels)


class CountsInsideTheBatch(TakesAll):
    """Moves values inside of nested containers, and takes what it has used."""

    def forward(self, x, labels, meta=None, queue=None, array=None):
        meta["scale"].mul_(2)
        array += 1
        meta["names"].append("c")
        x = x * meta.pop("scale") * queue.pop() * torch.from_numpy(array).to(x) * len(meta["names"])
        return super().forward(x, labels)


class Masks:
    """Masks labels in place, one class at first and then another where it still finds one."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        labels = inputs["labels"]
        labels[labels == 0] = -100
        labels[labels > 0] -= 1
        return super().compute_loss(model, inputs, return_outputs, **kwargs)


class Pops:
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        labels, scale = inputs.pop("labels"), inputs["meta"].pop("scale")
        inputs["queue"].clear()
        del inputs["array"]
        outputs = model(inputs.pop("x") * scale)
        loss = F.cross_entropy(outputs["logits"], labels)
        return (loss, outputs) if return_outputs else loss


class AddsToTheBatch:
    """Puts intermediate results in, and takes another way where it finds some."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        first = "cached" not in inputs["meta"]
        inputs["meta"]["cached"] = inputs["x"].mean()
        inputs["x"] = inputs["x"] * (1.0 if first else 3.0)
        return super().compute_loss(model, inputs, return_outputs, **kwargs)


class PenalisesInputGradients:
    """Makes a leaf of the input; the stock Trainer never sees the same one twice."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        x = inputs["x"]
        assert x.is_leaf
        assert not x.requires_grad
        assert x.grad is None
        outputs = model(x.requires_grad_(True), inputs["labels"])
        (slope,) = torch.autograd.grad(outputs["loss"], x, create_graph=True)
        loss = outputs["loss"] + slope.square().sum()
        return (loss, outputs) if return_outputs else loss


class PreparesInPlace:
    """Normalises on the way to the device, before the loss sees the batch."""

    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        inputs["x"].sub_(0.3).div_(0.5)
        return inputs


IN_PLACE = {
    "pixels in forward": (NormalisesPixels, None),
    "pixels through data": (NormalisesThroughData, None),
    "inside of containers": (CountsInsideTheBatch, None),
    "labels in compute_loss": (TakesAll, Masks),
    "popped keys": (TakesAll, Pops),
    "added keys": (TakesAll, AddsToTheBatch),
    "gradients of inputs": (TakesAll, PenalisesInputGradients),
    "in _prepare_inputs": (TakesAll, PreparesInPlace),
}


def seeded(cls, dtype=torch.float32) -> nn.Module:
    tiny.set_seed(0)
    return cls().to(dtype)


@pytest.mark.parametrize(("model", "body"), IN_PLACE.values(), ids=IN_PLACE)
@pytest.mark.parametrize(("scope", "accumulation"), SETTINGS)
def test_a_batch_changed_in_place_is_whole_in_the_second_pass(model, body, scope, accumulation, tmp_path):
    runs = both(
        tmp_path,
        scope,
        accumulation,
        model=lambda: seeded(model),
        body=body,
        extra=lambda model: {"data_collator": collate},
    )
    assert_like_stock(*runs)


@pytest.mark.parametrize(("model", "body"), IN_PLACE.values(), ids=IN_PLACE)
@pytest.mark.parametrize(
    "sam", [{"ascent_steps": 2}, {"method": "random"}, {"method": "gsam", "rho_min": 0.0}], ids=str
)
def test_a_batch_changed_in_place_is_whole_in_every_pass(model, body, sam, tmp_path):
    options = {"model": lambda: seeded(model), "body": body, "extra": lambda model: {"data_collator": collate}}
    ours, stock = both(tmp_path, accumulation=2, sam=sam, optim="sgd", **options)
    for name, p in ours.model.named_parameters():
        torch.testing.assert_close(p, stock.model.get_parameter(name), rtol=1e-4, atol=1e-6)
    if sam.get("method") != "random":
        assert max(map(abs, tiny.logged(ours, "sam_sharpness"))) < 1e-5


def loss_by_hand(name):
    """What each model and `compute_loss` above computes of an untouched batch."""

    def loss_of(model, batch):
        x, labels, scale = batch["x"], batch["labels"], batch["meta"]["scale"]
        if name in ("pixels in forward", "in _prepare_inputs"):
            x = (x - 0.3) / 0.5
        elif name == "pixels through data":
            x = x * 2
        elif name == "inside of containers":
            x = x * scale * 2 * 1.0 * 2 * 3
        elif name == "labels in compute_loss":
            labels = torch.where(labels == 0, -100, labels - 1)
        elif name == "popped keys":
            x = x * scale
        x = x.clone().requires_grad_(name == "gradients of inputs")
        loss = F.cross_entropy(tiny.Mlp.forward(model, x)["logits"], labels)
        if name == "gradients of inputs":
            loss = loss + torch.autograd.grad(loss, x, create_graph=True)[0].square().sum()
        return loss

    return loss_of


@pytest.mark.parametrize("name", IN_PLACE)
@pytest.mark.parametrize(("scope", "accumulation"), [("device", 1), ("micro", 2), ("device", 2)])
def test_the_gradient_at_w_plus_eps_is_that_of_the_batch_as_it_was(name, scope, accumulation, tmp_path):
    model, body = IN_PLACE[name]
    data = tiny.vectors(dtype=torch.float64)
    parts = [collate(data[i : i + 4]) for i in range(0, len(data), 4)]
    expected = equivalence.sgd_steps_by_hand(
        seeded(model, torch.float64),
        equivalence.windows(parts, accumulation, 2),
        rho=0.5,
        lr=0.1,
        scope=scope,
        loss_of=loss_by_hand(name),
    )
    equivalence.assert_steps_as_by_hand(
        tmp_path,
        expected,
        SAMConfig(rho=0.5, scope=scope),
        model=lambda: seeded(model, torch.float64),
        body=body,
        data=data,
        extra=lambda model: {"data_collator": collate},
        gradient_accumulation_steps=accumulation,
    )


class SeesTheSameTensorTwice(tiny.Mlp):
    """Two entries of the batch are one tensor, so a change of one is a change of the other."""

    def forward(self, x, view, labels):
        x.mul_(2)
        return super().forward(x + view, labels)


@pytest.mark.parametrize("view", [lambda x: x, lambda x: x[:, :1]], ids=["the same", "a view"])
@pytest.mark.parametrize(("scope", "accumulation"), SETTINGS)
def test_entries_that_share_memory_share_it_in_the_second_pass(view, scope, accumulation, tmp_path):
    def collate_views(rows):
        batch = equivalence.batches(rows, len(rows))[0]
        return {"x": batch["x"], "view": view(batch["x"]), "labels": batch["labels"]}

    runs = both(
        tmp_path,
        scope,
        accumulation,
        model=lambda: seeded(SeesTheSameTensorTwice),
        extra=lambda model: {"data_collator": collate_views},
    )
    assert_like_stock(*runs)


@pytest.mark.parametrize(("scope", "accumulation"), SETTINGS)
def test_a_batch_that_the_collator_keeps_changes_once_a_step(scope, accumulation, tmp_path):
    """Full-batch training on tensors made once: what the model changes in them lasts, as with the stock Trainer."""

    class Grows(tiny.Mlp):
        def forward(self, x, labels):
            return super().forward(x.mul_(1.1), labels)

    def extra(model):
        kept = equivalence.batches(tiny.vectors(), 4)[0]
        return {"data_collator": lambda rows: kept}

    assert_like_stock(*both(tmp_path, scope, accumulation, model=lambda: seeded(Grows), extra=extra))
