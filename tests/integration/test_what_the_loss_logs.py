"""What a user's `compute_loss` logs, counts and collects comes from the clean pass alone."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict, deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from integration import equivalence, tiny
from integration.equivalence import FEWER_PASSES, SETTINGS, assert_like_stock, both
from torch.nn import functional as F
from transformers import TrainerCallback

from hf_sam import SAMConfig, SAMTrainerMixin


class Noting:
    """Hands the values of each pass to `note`, after the base's loss."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.build()

    def build(self): ...

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        labels = inputs["labels"].clone()
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if self.model.training:
            self.note(loss.detach(), outputs["logits"].detach(), labels)
        return (loss, outputs) if return_outputs else loss


class LogsItself(Noting):
    """`self.log` in every pass."""

    def note(self, loss, logits, labels):
        self.log({"accuracy": (logits.argmax(1) == labels).float().mean().item(), "part": loss.item()})


class LogsNowAndThen(Noting):
    """With a counter of its own that says when."""

    calls = 0

    def note(self, loss, logits, labels):
        self.calls += 1
        if self.calls % 3 == 0:
            self.log({"part": loss.item(), "calls": self.calls})


class StoredLosses(Noting):
    """A dict on the trainer, which its `log` adds to the Trainer's entry."""

    def build(self):
        self.losses = {}

    def note(self, loss, logits, labels):
        self.losses = {
            "part": loss.item(),
            "entropy": torch.distributions.Categorical(logits=logits).entropy().mean().item(),
        }

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            logs.update(self.losses)
        super().log(logs, *args, **kwargs)


class StoredMetrics(Noting):
    """As TRL's preference trainers: a defaultdict of defaultdicts of lists, averaged and deleted in `log`."""

    def build(self):
        self._stored_metrics = defaultdict(lambda: defaultdict(list))

    def note(self, loss, logits, labels):
        for key, value in {"part": loss.item(), "margin": logits.max(1).values.mean().item()}.items():
            self._stored_metrics["train"][key].append(value)

    def log(self, logs, *args, **kwargs):
        for key, values in self._stored_metrics["train"].items():
            logs[key] = torch.tensor(values).mean().item()
            logs[f"{key} count"] = len(values)
        self._stored_metrics.pop("train", None)
        super().log(logs, *args, **kwargs)


class RunningSum(Noting):
    """Tensors added up in place, as the Trainer does with its own loss, and reset when logged."""

    def build(self):
        self.total, self.confusion, self.count = torch.tensor(0.0), torch.zeros(tiny.CLASSES, tiny.CLASSES), 0

    def note(self, loss, logits, labels):
        self.total += loss
        self.confusion.index_put_((labels, logits.argmax(1)), torch.ones(len(labels)), accumulate=True)
        self.count += 1

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            logs.update(total=self.total.item() / self.count, count=self.count, confused=self.confusion.sum().item())
            self.total.zero_()
            self.count = 0
        super().log(logs, *args, **kwargs)


class Collections(Noting):
    def build(self):
        self.recent = deque(maxlen=3)
        self.labels_seen = Counter()
        self.passes = []
        self.best = np.full(2, np.inf)
        self.kinds = set()

    def note(self, loss, logits, labels):
        self.recent.append(loss.item())
        self.labels_seen.update(labels.tolist())
        self.passes.append({"step": self.state.global_step, "loss": loss.item()})
        self.best[:] = np.sort([*self.best, loss.item()])[:2]
        self.kinds.add(len(self.passes))


@dataclasses.dataclass
class Meter:
    """A plain object with a running mean."""

    mean: float = 0.0
    count: int = 0
    history: list = dataclasses.field(default_factory=list)

    def update(self, value):
        self.count += 1
        self.mean += (value - self.mean) / self.count
        self.history.append(value)


class Meters(Noting):
    def build(self):
        self.meter = Meter()
        self.stats = SimpleNamespace(meters={"loss": Meter()})

    def note(self, loss, logits, labels):
        self.meter.update(loss.item())
        self.stats.meters["loss"].update(logits.mean().item())


class MetricModule(torch.nn.Module):
    """As torchmetrics: a module with buffers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("correct", torch.tensor(0))
        self.register_buffer("count", torch.tensor(0), persistent=False)

    def forward(self, logits, labels):
        self.correct += (logits.argmax(1) == labels).sum()
        self.count = self.count + len(labels)


class MetricModules(Noting):
    def build(self):
        self.accuracy = MetricModule()

    def note(self, loss, logits, labels):
        self.accuracy(logits, labels)


KEPT = {
    LogsItself: (),
    LogsNowAndThen: ("calls",),
    StoredLosses: ("losses",),
    StoredMetrics: (),
    RunningSum: ("total", "confusion", "count"),
    Collections: ("recent", "labels_seen", "passes", "best", "kinds"),
    Meters: ("meter", "stats"),
    MetricModules: (),
}
of_every_kind = pytest.mark.parametrize("body", KEPT, ids=lambda body: body.__name__)


def state_of(trainer):
    body = next(body for body in KEPT if isinstance(trainer, body))
    state = {name: getattr(trainer, name) for name in KEPT[body]}
    if body is MetricModules:
        state.update(trainer.accuracy.named_buffers())
    return state


@of_every_kind
@pytest.mark.parametrize(("scope", "accumulation"), SETTINGS)
def test_what_is_noted_is_what_the_stock_trainer_notes(body, scope, accumulation, tmp_path):
    assert_like_stock(*both(tmp_path, scope, accumulation, body=body, max_steps=4), state_of)


@of_every_kind
@pytest.mark.parametrize("method", FEWER_PASSES, ids=lambda method: method["method"])
def test_nothing_is_noted_twice_where_there_are_fewer_passes(body, method, tmp_path):
    runs = both(tmp_path, sam=method, accumulation=2, body=body, max_steps=4)
    assert_like_stock(*runs, state_of, perturbs=False)


@of_every_kind
@pytest.mark.parametrize(
    "sam",
    [
        {"ascent_steps": 2},
        {"method": "esam", "beta": 1.0},
        {"method": "functional"},
        {"method": "gsam", "rho_min": 0.0},
        {"second_order": True},
    ],
    ids=str,
)
def test_nothing_is_noted_twice_where_there_are_more_passes(body, sam, tmp_path):
    """The first step, whose clean pass is the stock Trainer's whatever rho is."""
    ours = equivalence.trained(
        SAMConfig(rho=0.3, **sam), tmp_path, body=body, max_steps=1, gradient_accumulation_steps=2
    )
    stock = equivalence.trained(None, tmp_path, body=body, max_steps=1, gradient_accumulation_steps=2)
    equivalence.assert_same(state_of(ours), state_of(stock), "state")
    for mine, theirs in zip(equivalence.entries(ours), equivalence.entries(stock), strict=True):
        assert mine.keys() == theirs.keys()
        for key in theirs.keys() - {"grad_norm"}:
            assert mine[key] == pytest.approx(theirs[key], rel=1e-6), key


@of_every_kind
@pytest.mark.parametrize(("scope", "accumulation"), SETTINGS)
def test_what_is_noted_at_an_ordinary_rho_is_of_the_clean_pass(body, scope, accumulation, tmp_path):
    """A run whose weights do not move: everything noted is the stock Trainer's, at any rho."""
    options = {"body": body, "max_steps": 4, "gradient_accumulation_steps": accumulation, "learning_rate": 0.0}
    ours = equivalence.trained(SAMConfig(rho=0.5, scope=scope), tmp_path, **options)
    stock = equivalence.trained(None, tmp_path, **options)
    equivalence.assert_same(state_of(ours), state_of(stock), "state")
    for mine, theirs in zip(equivalence.entries(ours), equivalence.entries(stock), strict=True):
        assert mine.keys() == theirs.keys()
        assert all(mine[key] == theirs[key] for key in theirs.keys() - {"grad_norm"})
    assert min(map(abs, tiny.logged(ours, "sam_sharpness"))) > 1e-3


def test_callbacks_hear_of_the_clean_pass_alone(tmp_path):
    class Hears(TrainerCallback):
        def __init__(self):
            self.heard = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.heard.append({key: value for key, value in logs.items() if not key.startswith("sam_")})

    heard = []
    for sam in (SAMConfig(rho=1e-30), None):
        callback = Hears()
        equivalence.trained(
            sam, tmp_path, body=LogsItself, callbacks=lambda c=callback: [c], gradient_accumulation_steps=2
        )
        heard.append([entry for entry in callback.heard if "train_runtime" not in entry])
    assert heard[0] == heard[1]
    assert len([entry for entry in heard[0] if "part" in entry]) == 6


@pytest.mark.parametrize("body", [LogsItself, StoredMetrics, Collections, Meters], ids=lambda body: body.__name__)
def test_the_mixin_before_a_trainer_that_notes(body, tmp_path):
    """`class SAMTheirs(SAMTrainerMixin, Theirs)`, the order for trainers that exist."""
    theirs = type("Theirs", (body, tiny.Trainer), {})
    sam_theirs = type("SAMTheirs", (SAMTrainerMixin, theirs), {})

    def run(cls, **kwargs):
        tiny.set_seed(2)
        args = tiny.arguments(tmp_path, gradient_accumulation_steps=2)
        trainer = cls(model=tiny.mlp(), args=args, train_dataset=tiny.vectors(), **kwargs)
        trainer.train()
        return trainer

    ours, stock = run(sam_theirs, sam_config=SAMConfig(rho=1e-30)), run(theirs)
    equivalence.assert_same(state_of(ours), state_of(stock), "state")
    equivalence.assert_same(equivalence.entries(ours), equivalence.entries(stock), "logged entries")


def test_what_evaluation_notes_is_kept(tmp_path):
    """Only passes of the training step are undone."""

    class NotesEvaluation(Noting):
        def build(self):
            self.losses = []

        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            self.losses.append(("train" if model.training else "eval", loss.item()))
            return (loss, outputs) if return_outputs else loss

        def note(self, loss, logits, labels): ...

    options = {"extra": lambda model: {"eval_dataset": tiny.vectors(8)}, "eval_strategy": "steps", "eval_steps": 1}
    assert_like_stock(*both(tmp_path, accumulation=2, body=NotesEvaluation, **options), lambda t: t.losses)


def test_what_a_step_outside_of_training_notes(tmp_path):
    """`training_step` called by hand."""
    trainer = equivalence.trainer_for(SAMConfig(rho=0.5), tmp_path, body=Collections)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.current_gradient_accumulation_steps = 1
    trainer.training_step(trainer.model, batch)
    assert sum(trainer.labels_seen.values()) == 4
    assert len(trainer.passes) == 1


def test_a_loss_that_is_weighted_by_what_it_has_noted(tmp_path):
    """The store decides about the loss, too: focal weights from the losses of the last passes."""

    class Weighs:
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.recent = defaultdict(list)

        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            outputs = model(x=inputs["x"])
            losses = F.cross_entropy(outputs["logits"], inputs["labels"], reduction="none")
            weights = torch.tensor([1.0 + sum(self.recent[int(label)][-3:]) for label in inputs["labels"]])
            for label, loss in zip(inputs["labels"].tolist(), losses.tolist(), strict=True):
                self.recent[label].append(loss)
            loss = (losses * weights).mean()
            return (loss, outputs) if return_outputs else loss

    for scope in ("micro", "device"):
        assert_like_stock(*both(tmp_path, scope, 2, body=Weighs), lambda t: dict(t.recent))
