"""Losses of users' own: under methods that look at the model's output, and divided into parts by m."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from integration import equivalence, tiny
from integration.equivalence import PLAIN_SGD, right_or_refused
from torch import nn
from torch.nn import functional as F

from hf_sam import SAMConfig, SAMTrainer, SAMTrainerMixin

RHO, LR = 0.3, 0.1


def batch_of(data, size: int = 4) -> dict[str, torch.Tensor]:
    return equivalence.batches(data, size)[0]


def one_step(trainer_class, model, data, folder, sam: SAMConfig, **options) -> dict[str, torch.Tensor]:
    """What the optimizer stepped along in one step of plain SGD, by the name of the parameter."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    args = tiny.arguments(folder, max_steps=1, remove_unused_columns=False, **PLAIN_SGD)
    tiny.set_seed(2)
    trainer_class(model=model, args=args, train_dataset=data, sam_config=sam, **options).train()
    return {name: (before[name] - p.detach()) / LR for name, p in model.named_parameters()}


def gradient(model, loss: torch.Tensor, retain: bool = False) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, retain_graph=retain, allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g for name, p, g in zip(names, parameters, gradients, strict=True)
    }


def at_w_plus_eps(model, g: dict[str, torch.Tensor], rho: float = RHO):
    norm = torch.stack([part.norm() for part in g.values()]).norm()
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in moved.named_parameters():
            p.add_(rho * g[name] / norm)
    return moved


def functional_by_hand(model, batch, loss_of, logits_of) -> dict[str, torch.Tensor]:
    """J(w + eps)^T grad_logits L(w) (Singh et al. 2025); `loss_of` is a function of the logits and the batch."""
    outer = logits_of(model, batch).detach().requires_grad_(True)
    (slope,) = torch.autograd.grad(loss_of(outer, batch), outer)
    g = gradient(model, loss_of(logits_of(model, batch), batch))
    moved = at_w_plus_eps(model, g)
    return gradient(moved, (logits_of(moved, batch) * slope).sum())


def esam_by_hand(model, batch, loss_of, logits_of, gamma: float = 0.5) -> dict[str, torch.Tensor]:
    """The gradient of the mean loss of those whose loss rises most (Du et al. 2022), every tensor perturbed."""
    g = gradient(model, loss_of(logits_of(model, batch), batch))
    moved = at_w_plus_eps(model, g)
    rises = []
    for i in range(len(batch["labels"])):
        one = {name: value[i : i + 1] for name, value in batch.items()}
        rises.append((loss_of(logits_of(moved, one), one) - loss_of(logits_of(model, one), one)).item())
    hit = torch.tensor(rises).topk(int(gamma * len(rises))).indices.sort().values
    chosen = {name: value[hit] for name, value in batch.items()}
    return gradient(moved, loss_of(logits_of(moved, chosen), chosen))


def assert_equal(ours, expected):
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-7, atol=1e-9)


# --- compute_loss without super -----------------------------------------------------------------------------------


def mlp_logits(model, batch):
    return model(x=batch["x"])["logits"]


def smoothed(logits, batch):
    return F.cross_entropy(logits, batch["labels"], label_smoothing=0.1)


def scaled(logits, batch):
    return 2 * F.cross_entropy(logits, batch["labels"])


def cosine(logits, batch):
    """Not of the usual kinds, though of the logits alone."""
    return 1 - F.cosine_similarity(logits, F.one_hot(batch["labels"], tiny.CLASSES).to(logits)).mean()


class WithoutSuper:
    """A loss of the user's own that never reaches the base's `compute_loss`."""

    loss_of = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        outputs = model(x=inputs["x"])
        loss = type(self).loss_of(outputs["logits"], inputs)
        return (loss, outputs) if return_outputs else loss


class WithoutReturnOutputs:
    """One that gives the loss alone, whatever it is asked for."""

    loss_of = None

    def compute_loss(self, model, inputs, *args, **kwargs):
        return type(self).loss_of(model(x=inputs["x"])["logits"], inputs)


class AttributeAccess:
    """Reads the output as an object, in float32 or above and with labels popped, as many recipes do."""

    loss_of = None

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        logits = outputs.get("logits")
        loss = type(self).loss_of(logits.view(-1, tiny.CLASSES), {"labels": labels.view(-1)})
        return (loss, outputs) if return_outputs else loss


ORDERS = {
    "subclass of SAMTrainer": lambda body: (body, SAMTrainer),
    "mixin first": lambda body: (SAMTrainerMixin, type("Theirs", (body, tiny.Trainer), {})),
}


def trainer_class(body, order, loss_of=None):
    return type(body.__name__, ORDERS[order](body), {"loss_of": staticmethod(loss_of)} if loss_of else {})


of_every_order = pytest.mark.parametrize("order", ORDERS)
of_every_body = pytest.mark.parametrize(
    "body", [WithoutSuper, WithoutReturnOutputs, AttributeAccess], ids=lambda body: body.__name__
)


@of_every_order
@of_every_body
@pytest.mark.parametrize("loss_of", [smoothed, scaled, cosine], ids=lambda f: f.__name__)
def test_functional_with_a_compute_loss_without_super(loss_of, body, order, tmp_path):
    data = tiny.vectors(dtype=torch.float64)
    expected = functional_by_hand(tiny.mlp(torch.float64), batch_of(data), loss_of, mlp_logits)
    cls = trainer_class(body, order, loss_of)
    with right_or_refused("functional") if body is WithoutReturnOutputs else contextlib.nullcontext():
        ours = one_step(cls, tiny.mlp(torch.float64), data, tmp_path, SAMConfig(method="functional", rho=RHO))
        assert_equal(ours, expected)


@of_every_order
@of_every_body
def test_esam_with_a_compute_loss_without_super(body, order, tmp_path):
    data = tiny.vectors(dtype=torch.float64)
    expected = esam_by_hand(tiny.mlp(torch.float64), batch_of(data), scaled, mlp_logits)
    cls = trainer_class(body, order, scaled)
    sam = SAMConfig(method="esam", rho=RHO, beta=1.0, gamma=0.5)
    with right_or_refused("esam") if body is WithoutReturnOutputs else contextlib.nullcontext():
        assert_equal(one_step(cls, tiny.mlp(torch.float64), data, tmp_path, sam), expected)


@pytest.mark.parametrize("sam", [{"method": "functional"}, {"method": "esam", "beta": 1.0, "gamma": 0.5}], ids=str)
def test_windows_with_a_compute_loss_without_super(sam, tmp_path):
    """Accumulated over two micro-batches; for `functional` that is one batch of both."""
    cls, runs = trainer_class(WithoutSuper, "subclass of SAMTrainer", scaled), []
    for batch, accumulation in ((8, 1), (4, 2)):
        args = tiny.arguments(
            tmp_path,
            max_steps=2,
            gradient_accumulation_steps=accumulation,
            per_device_train_batch_size=batch,
            **PLAIN_SGD,
        )
        data = tiny.vectors(dtype=torch.float64)
        trainer = cls(
            model=tiny.mlp(torch.float64), args=args, train_dataset=data, sam_config=SAMConfig(rho=RHO, **sam)
        )
        trainer.train()
        runs.append(tiny.flat(trainer.model))
    plain = tiny.trained(
        tiny.mlp(torch.float64), tiny.vectors(dtype=torch.float64), tmp_path, SAMConfig(rho=RHO), max_steps=2,
        per_device_train_batch_size=8, **PLAIN_SGD,
    )  # fmt: skip
    assert not torch.allclose(runs[0], tiny.flat(plain.model))
    if sam["method"] == "functional":
        torch.testing.assert_close(runs[0], runs[1], rtol=1e-8, atol=1e-10)


def test_functional_with_a_compute_loss_func(tmp_path):
    data = tiny.vectors(dtype=torch.float64)
    expected = functional_by_hand(tiny.mlp(torch.float64), batch_of(data), smoothed, mlp_logits)

    def compute_loss_func(outputs, labels, num_items_in_batch=None):
        return smoothed(outputs["logits"], {"labels": labels})

    sam = SAMConfig(method="functional", rho=RHO)
    ours = one_step(SAMTrainer, tiny.mlp(torch.float64), data, tmp_path, sam, compute_loss_func=compute_loss_func)
    assert_equal(ours, expected)


# --- losses that do not depend on the logits alone ----------------------------------------------------------------


class Penalised(WithoutSuper):
    """With a penalty on the weights."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(x=inputs["x"])
        penalty = sum(p.square().sum() for p in self.model.parameters())
        loss = F.cross_entropy(outputs["logits"], inputs["labels"]) + 0.1 * penalty
        return (loss, outputs) if return_outputs else loss


class Auxiliary(tiny.Mlp):
    """As the router loss of a mixture of experts, it is computed from what lies inside."""

    def forward(self, x, labels=None):
        out = super().forward(x, labels)
        if labels is not None:
            out["loss"] = out["loss"] + 0.5 * self.first(x).logsumexp(1).square().mean()
        return out


class Detector(nn.Module):
    """Classes and boxes, from labels that are a list of dicts."""

    def __init__(self):
        super().__init__()
        self.body, self.classes, self.boxes = nn.Linear(6, 8), nn.Linear(8, tiny.CLASSES), nn.Linear(8, 4)

    def forward(self, x, labels):
        hidden = torch.tanh(self.body(x))
        logits, boxes = self.classes(hidden), self.boxes(hidden)
        classes = torch.stack([target["class_labels"] for target in labels])
        targets = torch.stack([target["boxes"] for target in labels])
        loss = F.cross_entropy(logits, classes) + F.l1_loss(boxes, targets)
        return {"loss": loss, "logits": logits, "pred_boxes": boxes}


def detections(rows):
    batch = equivalence.batches(rows, len(rows))[0]
    labels = [
        {"class_labels": label, "boxes": x[:4].clone()} for x, label in zip(batch["x"], batch["labels"], strict=True)
    ]
    return {"x": batch["x"], "labels": labels}


class TwoHeads(tiny.Mlp):
    """Start and end of an answer: two logits, and none of the name."""

    def forward(self, x, labels):
        out = super().forward(x)["logits"]
        loss = F.cross_entropy(out, labels) + F.cross_entropy(-out, labels)
        return {"loss": loss, "start_logits": out, "end_logits": -out}


def seeded(cls, dtype=torch.float64):
    tiny.set_seed(0)
    return cls().to(dtype)


NOT_OF_THE_LOGITS_ALONE = {
    "a penalty on the weights": (tiny.Mlp, Penalised, None),
    "an auxiliary loss": (Auxiliary, None, None),
    "boxes": (Detector, None, detections),
    "two heads": (TwoHeads, None, None),
}


def refusal(method: str, model, body, collator, folder, **fields) -> str:
    cls = SAMTrainer if body is None else type(body.__name__, (body, SAMTrainer), {})
    options = {} if collator is None else {"data_collator": collator}
    data = tiny.vectors(dtype=torch.float64)
    with pytest.raises(ValueError, match=method) as error:
        one_step(cls, seeded(model), data, folder, SAMConfig(method=method, rho=RHO, **fields), **options)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) > 40, "says why, and what to do"
    return str(error.value)


@pytest.mark.parametrize(("model", "body", "collator"), NOT_OF_THE_LOGITS_ALONE.values(), ids=NOT_OF_THE_LOGITS_ALONE)
def test_functional_is_refused_where_the_loss_does_not_depend_on_the_logits_alone(model, body, collator, tmp_path):
    refusal("functional", model, body, collator, tmp_path)


@pytest.mark.parametrize("name", ["boxes", "two heads"])
def test_esam_is_refused_where_labels_are_no_classes(name, tmp_path):
    refusal("esam", *NOT_OF_THE_LOGITS_ALONE[name], tmp_path, beta=1.0)


def test_a_refused_loss_leaves_the_weights_alone(tmp_path):
    model = seeded(Auxiliary)
    before = tiny.flat(model)
    args = tiny.arguments(tmp_path, max_steps=1, **PLAIN_SGD)
    data = tiny.vectors(dtype=torch.float64)
    with pytest.raises(ValueError, match="functional"):
        SAMTrainer(
            model=model, args=args, train_dataset=data, sam_config=SAMConfig(method="functional", rho=RHO)
        ).train()
    assert torch.equal(tiny.flat(model), before)


# --- outputs and labels of other shapes ---------------------------------------------------------------------------


class Tuples(tiny.Mlp):
    """`return_dict=False`."""

    def forward(self, x, labels=None):
        out = super().forward(x, labels)
        return (out["loss"], out["logits"]) if labels is not None else (out["logits"],)


def tuple_logits(model, batch):
    return tiny.Mlp.forward(model, batch["x"])["logits"]


def cross_entropy(logits, batch):
    return F.cross_entropy(logits, batch["labels"])


@pytest.mark.parametrize("method", ["functional", "esam"])
def test_outputs_that_are_tuples(method, tmp_path):
    data = tiny.vectors(dtype=torch.float64)
    by_hand = functional_by_hand if method == "functional" else esam_by_hand
    fields = {"beta": 1.0, "gamma": 0.5} if method == "esam" else {}
    expected = by_hand(seeded(Tuples), batch_of(data), cross_entropy, tuple_logits)
    with right_or_refused(method):
        sam = SAMConfig(method=method, rho=RHO, **fields)
        assert_equal(one_step(SAMTrainer, seeded(Tuples), data, tmp_path, sam), expected)


class Speech(nn.Module):
    """CTC: more frames than labels."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(1, 8), nn.Linear(8, 5)

    def logits(self, x):
        return self.head(torch.tanh(self.body(x[:, :, None])))

    def forward(self, x, labels):
        logits = self.logits(x)
        return {"loss": ctc(logits, {"labels": labels}), "logits": logits}


def ctc(logits, batch):
    labels = torch.stack([batch["labels"] + 1, 4 - batch["labels"]], 1)
    lengths = [torch.full((len(labels),), n) for n in (logits.shape[1], 2)]
    return F.ctc_loss(logits.log_softmax(-1).transpose(0, 1), labels, *lengths, blank=0)


class SpeechWithLabelSequences(Speech):
    def forward(self, x, labels):
        logits = self.logits(x)
        lengths = [torch.full((len(labels),), n) for n in (logits.shape[1], labels.shape[1])]
        loss = F.ctc_loss(logits.log_softmax(-1).transpose(0, 1), labels, *lengths, blank=0)
        return {"loss": loss, "logits": logits}


class Segmenter(nn.Module):
    """Logits of a quarter of the labels' resolution, as SegFormer gives them."""

    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(1, tiny.CLASSES, 2)

    def logits(self, x):
        return self.head(x[:, None, :4].reshape(-1, 1, 2, 2).repeat(1, 1, 2, 2))

    def forward(self, x, labels):
        logits = self.logits(x)
        return {"loss": segmentation(logits, {"labels": labels}), "logits": logits}


def segmentation(logits, batch):
    return F.cross_entropy(F.interpolate(logits, size=(6, 6)), batch["labels"])


class Reconstructor(nn.Module):
    """No labels at all."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 6)

    def forward(self, x, labels=None):
        logits = self.body(torch.tanh(x))
        return {"loss": reconstruction(logits, {"x": x}), "logits": logits}


def reconstruction(logits, batch):
    return F.mse_loss(logits, batch["x"])


def sequences(rows):
    batch = equivalence.batches(rows, len(rows))[0]
    return {"x": batch["x"], "labels": torch.stack([batch["labels"] + 1, 4 - batch["labels"]], 1)}


def masks(rows):
    batch = equivalence.batches(rows, len(rows))[0]
    return {"x": batch["x"], "labels": batch["labels"][:, None, None].repeat(1, 6, 6)}


def without_labels(rows):
    return {"x": equivalence.batches(rows, len(rows))[0]["x"]}


@pytest.mark.parametrize(
    ("model", "collator"),
    [(SpeechWithLabelSequences, sequences), (Reconstructor, without_labels), (Segmenter, masks)],
    ids=["CTC", "without labels", "segmentation"],
)
def test_esam_is_refused_where_losses_of_examples_cannot_be_told(model, collator, tmp_path):
    refusal("esam", model, None, collator, tmp_path, beta=1.0)


@pytest.mark.parametrize(
    ("model", "collator", "loss_of", "logits_of"),
    [
        (Speech, None, ctc, lambda m, b: m.logits(b["x"])),
        (Reconstructor, without_labels, reconstruction, lambda m, b: m.body(torch.tanh(b["x"]))),
        (Segmenter, masks, segmentation, lambda m, b: m.logits(b["x"])),
    ],
    ids=["CTC", "without labels", "segmentation"],
)
def test_functional_with_other_losses_of_the_logits(model, collator, loss_of, logits_of, tmp_path):
    data = tiny.vectors(dtype=torch.float64)
    batch = batch_of(data) if collator is None else collator(data[:4])
    expected = functional_by_hand(seeded(model), batch, loss_of, logits_of)
    options = {} if collator is None else {"data_collator": collator}
    sam = SAMConfig(method="functional", rho=RHO)
    assert_equal(one_step(SAMTrainer, seeded(model), data, tmp_path, sam, **options), expected)


# --- means under m ------------------------------------------------------------------------------------------------


def mean_func(outputs, labels, num_items_in_batch=None):
    """Ignores what the Trainer counts, as most functions that users write."""
    return F.cross_entropy(outputs["logits"].flatten(0, -2), labels.flatten())


def smoothed_mean_func(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs["logits"].flatten(0, -2), labels.flatten(), label_smoothing=0.2)


def sum_func(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs["logits"].flatten(0, -2), labels.flatten(), reduction="sum") / num_items_in_batch


class MeanInComputeLoss:
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(x=inputs["x"])
        loss = mean_func(outputs, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


class SumInComputeLoss:
    """Normalised over the window by hand, and says so."""

    loss_is_scaled_for_ga = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(x=inputs["x"])
        loss = sum_func(outputs, inputs["labels"], self.items)
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(self, *args, **kwargs):
        samples, items = super().get_batch_samples(*args, **kwargs)
        self.items = sum(batch["labels"].ne(-100).sum() for batch in samples)
        return samples, items


class Tagger(nn.Module):
    """A class for every token; its own loss is a mean over those that are labelled."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(1, 8), nn.Linear(8, tiny.CLASSES)

    def forward(self, x, labels=None):
        logits = self.head(torch.tanh(self.body(x[:, :, None])))
        out = {"logits": logits}
        if labels is not None:
            out["loss"] = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return out


def tags(rows):
    """Six labels an example, of which the first ones are masked: 0 to 5 by the example."""
    batch = equivalence.batches(rows, len(rows))[0]
    labels = batch["labels"][:, None].repeat(1, 6)
    masked = (batch["x"][:, :1].abs() * 3).long().clamp(max=5)
    return {"x": batch["x"], "labels": labels.masked_fill(torch.arange(6) < masked, -100)}


def only_some_labelled(rows):
    """Two of the parts have no label at all, and would have a mean of nothing."""
    batch = equivalence.batches(rows, len(rows))[0]
    return {"x": batch["x"], "labels": torch.where(torch.arange(len(rows)) < 2, -100, batch["labels"])}


MEANS = {
    "the model's": (None, None),
    "compute_loss_func, a mean": (None, mean_func),
    "compute_loss_func, a smoothed mean": (None, smoothed_mean_func),
    "compute_loss_func, a sum over the window's": (None, sum_func),
    "compute_loss, a mean": (MeanInComputeLoss, None),
    "compute_loss, a sum over the window's": (SumInComputeLoss, None),
}
BATCHES = {
    "even": (tiny.Mlp, None, 4, 2),
    "one by one": (tiny.Mlp, None, 4, 1),
    "unequal last part": (tiny.Mlp, None, 5, 2),
    "part larger than half": (tiny.Mlp, None, 5, 4),
    "uneven masks": (Tagger, tags, 4, 2),
    "uneven masks, unequal last part": (Tagger, tags, 5, 3),
}


@pytest.mark.parametrize(("body", "func"), MEANS.values(), ids=MEANS)
@pytest.mark.parametrize(("model", "collator", "size", "m"), BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_parts_of_a_batch_have_the_loss_and_gradient_of_the_whole(
    body, func, model, collator, size, m, accumulation, tmp_path
):
    def extra(model):
        return {"compute_loss_func": func, **({} if collator is None else {"data_collator": collator})}

    data = tiny.vectors(40, dtype=torch.float64)
    options = {"body": body, "model": lambda: seeded(model), "data": data, "extra": extra}
    options |= {"per_device_train_batch_size": size, **PLAIN_SGD}
    sam = {"scope": "micro", "m": m}
    ours, stock = equivalence.both(tmp_path, accumulation=accumulation, sam=sam, **options)
    torch.testing.assert_close(tiny.flat(ours.model), tiny.flat(stock.model), rtol=1e-9, atol=1e-11)
    for key in ("loss", "grad_norm"):
        assert tiny.logged(ours, key) == pytest.approx(tiny.logged(stock, key), rel=1e-6), key
    assert max(map(abs, tiny.logged(ours, "sam_sharpness"))) < 1e-6
    assert len(tiny.logged(ours, "loss")) == 3


@pytest.mark.parametrize(("body", "func"), MEANS.values(), ids=MEANS)
@pytest.mark.parametrize("sam", [{"ascent_fraction": 0.5}, {"method": "esam", "beta": 1.0, "gamma": 1.0}], ids=str)
def test_other_methods_that_take_parts_step_as_the_whole(body, func, sam, tmp_path):
    """At a vanishing rho the descent is of the whole batch, whatever part the ascent has seen."""
    options = {"body": body, "extra": lambda model: {"compute_loss_func": func}, "model": lambda: seeded(tiny.Mlp)}
    options |= {"data": tiny.vectors(dtype=torch.float64), **PLAIN_SGD}
    ours, stock = equivalence.both(tmp_path, accumulation=2, sam=sam, **options)
    torch.testing.assert_close(tiny.flat(ours.model), tiny.flat(stock.model), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("body", "func"), MEANS.values(), ids=MEANS)
def test_the_hardest_hit_half_has_the_loss_of_a_batch(body, func, tmp_path):
    """ESAM's descent at a vanishing rho: the mean over those it chose, neither half nor twice of it."""
    data = [*tiny.vectors(1, dtype=torch.float64)] * 4  # all alike, so that any half has the gradient of the whole
    options = {"body": body, "extra": lambda model: {"compute_loss_func": func}, "model": lambda: seeded(tiny.Mlp)}
    options |= {"data": data * 4, **PLAIN_SGD}
    sam = {"method": "esam", "beta": 1.0, "gamma": 0.5}
    # A loss that divides by a count of its own may be refused.
    with right_or_refused("esam|gamma") if body is SumInComputeLoss else contextlib.nullcontext():
        ours, stock = equivalence.both(tmp_path, accumulation=2, sam=sam, **options)
        torch.testing.assert_close(tiny.flat(ours.model), tiny.flat(stock.model), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("body", "func"), MEANS.values(), ids=MEANS)
def test_a_part_without_any_label_adds_nothing(body, func, tmp_path):
    """The mean of no labels is no number; right, or refused in words, but never NaN."""

    def extra(model):
        return {"compute_loss_func": func, "data_collator": only_some_labelled}

    options = {"body": body, "extra": extra, "model": lambda: seeded(tiny.Mlp)}
    options |= {"data": tiny.vectors(dtype=torch.float64), **PLAIN_SGD}
    with right_or_refused("m"):
        ours, stock = equivalence.both(tmp_path, sam={"scope": "micro", "m": 2}, **options)
        torch.testing.assert_close(tiny.flat(ours.model), tiny.flat(stock.model), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("body", "func"), [MEANS["compute_loss_func, a mean"], MEANS["compute_loss, a mean"]])
def test_parts_at_an_ordinary_rho(body, func, tmp_path):
    """Each part is a micro-batch of its own: SAM by hand on micro-batches of m examples."""
    data = tiny.vectors(dtype=torch.float64)
    expected = equivalence.sgd_steps_by_hand(
        seeded(tiny.Mlp), equivalence.windows(equivalence.batches(data, 2), 2, 3), rho=RHO, lr=LR, scope="micro"
    )
    equivalence.assert_steps_as_by_hand(
        tmp_path,
        expected,
        SAMConfig(rho=RHO, scope="micro", m=2),
        model=lambda: seeded(tiny.Mlp),
        data=data,
        body=body,
        extra=lambda model: {"compute_loss_func": func},
    )
