"""The report of checkpoints that exist already: how good, how sure, where they differ, and what they cost."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from sklearn.metrics import precision_recall_fscore_support

from ..evaluation.calibration import reliability
from ..evaluation.classification import CLASSIFICATION, Metric, confusion
from ..evaluation.metrics import metric_of
from ..evaluation.predictions import LanguagePredictions, Predictions
from . import plots
from .document import Block, Document, Figure, Listing, Section, Table, Text
from .formatting import NOTHING, number, p_equals, p_value, with_interval
from .sharpness import sharpness_section
from .statistics import Estimate, bootstrap_examples, holm, mcnemar_p, sign_flip_p

MAX_DISAGREEMENTS = 20
MAX_SHOWN = 120  # characters of an example
MAX_CLASSES = 30  # in a table per class or a confusion matrix


@dataclass
class Evaluated:
    """
    One checkpoint on the test split.

    Args:
        name (`str`): What it is called.
        path (`str`): Folder or hub id.
        predictions (`Predictions` or `LanguagePredictions`): On the test split.
        model (`dict`): See `describe_model`.
        size (`int`): Bytes of the weights in memory.
        seconds (`float`): Of the passes over the test split.
        corrupted (`dict[tuple[str, int], Predictions]`): The same on corrupted inputs, by corruption and level.
        corrupted_rows (`np.ndarray`, *optional*): Which examples those are; all where left out.
        data (`dict`): What its run record says of the splits, see `describe_data`; empty where there is none.
    """

    name: str
    path: str
    predictions: Predictions | LanguagePredictions
    model: dict = field(default_factory=dict)
    size: int = 0
    seconds: float = 0.0
    corrupted: dict[tuple[str, int], Predictions] = field(default_factory=dict)
    corrupted_rows: np.ndarray | None = None
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def uncorrupted_accuracy(self) -> float:
        """On the examples that are corrupted elsewhere, as they are."""
        right = self.predictions.correct
        return float((right if self.corrupted_rows is None else right[self.corrupted_rows]).mean())


def _on_part(metric: Metric, kept: Predictions, index: np.ndarray) -> float:
    """The metric over some examples."""
    return metric(Predictions(kept.labels[index], kept.probabilities[index]))


def make_checkpoint_document(
    checkpoints: Sequence[Evaluated],
    facts: dict[str, str],
    examples: Sequence[str],
    class_names: Sequence[str] | None = None,
    seed: int = 0,
    sharpness: Mapping[str, Any] | None = None,
    image_of: Callable[[int], Any] | None = None,
    survival: Section | None = None,
) -> Document:
    """
    The report of one or more checkpoints on one test split.

    Args:
        checkpoints (`Sequence[Evaluated]`): The first is what the others are compared with.
        facts (`dict[str, str]`): What was evaluated on, for the set-up.
        examples (`Sequence[str]`): What to show of each test example.
        class_names (`Sequence[str]`, *optional*): `None` for language models.
        seed (`int`, *optional*, defaults to 0): Of the bootstrap.
        sharpness (`dict`, *optional*): What `sharpness.json` of the same checkpoints holds.
        image_of (`Callable`, *optional*): From the number of a test example to its image, where examples are images.
        survival (`Section`, *optional*): See `survival_section`.
    """
    rng = np.random.default_rng(seed)
    is_classifier = class_names is not None
    metrics = metric_estimates(checkpoints, rng)
    pairs = compare_checkpoints(checkpoints, rng)
    sections = [
        Section("Question and answer", _answer(checkpoints, pairs)),
        Section(
            "Set-up", [Table(["what", "value"], [list(row) for row in facts.items()], "", 99), *_models(checkpoints)]
        ),
        Section("Metrics", _metric_table(checkpoints, metrics)),
        Section("Paired tests", _pair_table(pairs)),
    ]
    if is_classifier:
        sections += [
            Section("Per class", _per_class(checkpoints, class_names)),
            Section("Calibration", _calibration(checkpoints)),
            Section("Disagreements", _disagreements(checkpoints, examples, class_names, image_of)),
            Section("Robustness to input corruption", _robustness(checkpoints, rng)),
        ]
    sections += [
        survival or Section("What survives", [Text("Not measured; --survival true measures it.")]),
        sharpness_section(sharpness)
        if sharpness
        else Section("Sharpness", [Text("Not measured; --sharpness true measures it.")]),
        Section("Size and speed", _costs(checkpoints, len(examples))),
        Section("Threats to validity", _threats(checkpoints, len(examples))),
    ]
    table = pd.DataFrame(
        {"checkpoint": name, "metric": metric, **vars(estimate)}
        for name, row in metrics.items()
        for metric, estimate in row.items()
    )
    numbers = {"checkpoints": [entry.path for entry in checkpoints], "pairs": pairs}
    lead = f"{', '.join(entry.name for entry in checkpoints)} on {len(examples)} test examples. Intervals are at 95 %."
    return Document("Evaluation of checkpoints", lead, sections, {"metrics": table}, numbers)


# --- numbers ------------------------------------------------------------------------------------------------------


def metric_estimates(checkpoints: Sequence[Evaluated], rng: np.random.Generator) -> dict[str, dict[str, Estimate]]:
    """Each metric of each checkpoint with its bootstrap interval over test examples."""
    found: dict[str, dict[str, Estimate]] = {}
    for entry in checkpoints:
        kept = entry.predictions
        if isinstance(kept, LanguagePredictions):
            loss = bootstrap_examples(kept.per_token, len(kept.nll), rng)
            ends = [None if value is None else float(np.exp(value)) for value in (loss.low, loss.high)]
            found[entry.name] = {"loss": loss, "perplexity": Estimate(float(np.exp(loss.value)), *ends, loss.n)}
        else:
            found[entry.name] = {
                name: bootstrap_examples(partial(_on_part, metric, kept), len(kept.labels), rng)
                for name, metric in CLASSIFICATION.items()
            }
    return found


def compare_checkpoints(checkpoints: Sequence[Evaluated], rng: np.random.Generator) -> list[dict]:
    """Every pair of checkpoints: difference with its interval over examples, exact p, Holm over the pairs."""
    pairs = []
    for first, second in itertools.combinations(checkpoints, 2):
        a, b = first.predictions, second.predictions
        if isinstance(a, LanguagePredictions):
            gap = bootstrap_examples(lambda index, a=a, b=b: b.per_token(index) - a.per_token(index), len(a.nll), rng)
            metric, p = "loss", sign_flip_p(b.nll / b.tokens - a.nll / a.tokens, rng)
        else:
            gain = b.correct.astype(float) - a.correct
            gap = bootstrap_examples(lambda index, gain=gain: gain[index].mean(), len(gain), rng)
            metric, p = "accuracy", mcnemar_p(a.correct, b.correct)
        pairs.append({"first": first.name, "second": second.name, "metric": metric, **vars(gap), "p": p})
    for pair, p_holm in zip(pairs, holm([pair["p"] for pair in pairs]), strict=True):
        pair["p_holm"] = p_holm
    return pairs


# --- sections -----------------------------------------------------------------------------------------------------


def _answer(checkpoints: Sequence[Evaluated], pairs: Sequence[dict]) -> list[Block]:
    if not pairs:
        return [Text("One checkpoint: its metrics are below, with nothing to compare them with.")]
    first = checkpoints[0].name
    blocks: list[Block] = [Text(f"Which checkpoint is better than {first} on these test examples?")]
    for pair in pairs:
        if pair["first"] == first:
            size = with_interval(pair["value"], pair["low"], pair["high"], pair["metric"])
            unit = " points" if pair["metric"] == "accuracy" else " nats per token (less is better)"
            settled = "a difference on this test split" if pair["p_holm"] <= 0.05 else "no difference is established"
            several = f", {p_value(pair['p_holm'])} after Holm over {len(pairs)} pairs" if len(pairs) > 1 else ""
            sentence = (
                f"{pair['second']} minus {first}: {pair['metric']} {size}{unit}; {_test_name(pair)} "
                f"{p_equals(pair['p'])}{several}: {settled}."
            )
            blocks.append(Text(sentence, "answer"))
    return blocks


def _test_name(pair: dict) -> str:
    return "exact McNemar" if pair["metric"] == "accuracy" else "sign-flip"


def _models(checkpoints: Sequence[Evaluated]) -> list[Block]:
    def trained_on(entry: Evaluated, what: str) -> Any:
        return (entry.data.get("train") or {}).get(what)

    rows = [
        [
            entry.name,
            entry.path,
            str(entry.model.get("class")),
            number(trained_on(entry, "examples"), 0),
            trained_on(entry, "fingerprint") or NOTHING,
            entry.model.get("fingerprint") or NOTHING,
        ]
        for entry in checkpoints
    ]
    columns = ["checkpoint", "path", "class", "trained on", "training data", "weights"]
    blocks: list[Block] = [Table(columns, rows, "Checkpoints; data and weights by their fingerprints", 99)]
    prints = {entry.name: trained_on(entry, "fingerprint") for entry in checkpoints}
    told = {name: value for name, value in prints.items() if value is not None}
    if len(set(told.values())) > 1:
        listed = ", ".join(f"{entry.name} on {number(trained_on(entry, 'examples'), 0)}" for entry in checkpoints)
        blocks.append(
            Text(
                f"The checkpoints were trained on different data ({listed} examples): a difference between them may be one "
                f"of the data, not of the method.",
                "warning",
            )
        )
    return blocks


def _metric_table(checkpoints: Sequence[Evaluated], metrics: dict[str, dict[str, Estimate]]) -> list[Block]:
    names = list(next(iter(metrics.values())))
    rows = []
    for entry in checkpoints:
        cells = []
        for name in names:
            estimate, scale, digits = metrics[entry.name][name], metric_of(name).scale, metric_of(name).digits
            low, high = (None if end is None else end * scale for end in (estimate.low, estimate.high))
            ends = f" [{number(low, digits)}, {number(high, digits)}]" if low is not None else ""
            cells.append(number(estimate.value * scale, digits) + ends)
        rows.append([entry.name, *cells])
    labels = [metric_of(name).label + (f" ({metric_of(name).unit})" if metric_of(name).unit else "") for name in names]
    return [Table(["checkpoint", *labels], rows, "With bootstrap intervals over test examples")]


def _pair_table(pairs: Sequence[dict]) -> list[Block]:
    if not pairs:
        return [Text("There is no pair.")]
    rows = [
        [
            pair["first"],
            pair["second"],
            with_interval(pair["value"], pair["low"], pair["high"], pair["metric"]),
            _test_name(pair),
            p_value(pair["p"]),
            p_value(pair["p_holm"]),
        ]
        for pair in pairs
    ]
    unit = "points" if pairs[0]["metric"] == "accuracy" else "nats per token"
    columns = ["first", "second", f"{pairs[0]['metric']}, second minus first ({unit})", "test", "p", "Holm"]
    return [Table(columns, rows, "Over the same test examples", 2)]


def _per_class(checkpoints: Sequence[Evaluated], class_names: Sequence[str]) -> list[Block]:
    count = len(class_names)
    rows, frames = [], []
    for entry in checkpoints:
        kept = entry.predictions
        scores = precision_recall_fscore_support(kept.labels, kept.predicted, labels=range(count), zero_division=0)
        for index, (precision, recall, f1, support) in enumerate(zip(*scores, strict=True)):
            cells = [f"{100 * value:.1f}" for value in (precision, recall, f1)]
            rows.append([class_names[index], entry.name, *cells, str(support)])
        matrix = confusion(kept)
        frames.append(
            pd.DataFrame(matrix, columns=list(class_names)).assign(true=list(class_names), checkpoint=entry.name)
        )
    rows.sort(key=lambda row: list(class_names).index(row[0]))
    columns = ["class", "checkpoint", "precision (%)", "recall (%)", "F1 (%)", "examples"]
    blocks: list[Block] = [Table(columns, rows, "Per class", 2, folded=len(rows) > 2 * MAX_CLASSES)]
    if count <= MAX_CLASSES:
        matrices = {frame.checkpoint.iloc[0]: frame[list(class_names)].to_numpy() for frame in frames}
        canvas = plots.draw_confusion(matrices, class_names)
        caption = "Confusion: how many examples of each true class (row) were taken for each class (column)."
        blocks.append(Figure("confusion", canvas, caption, pd.concat(frames, ignore_index=True)))
    return blocks


def _calibration(checkpoints: Sequence[Evaluated]) -> list[Block]:
    tables = {entry.name: reliability(entry.predictions.confidence, entry.predictions.correct) for entry in checkpoints}
    canvas, data = plots.draw_reliability({"test split": tables}, list(tables))
    caption = "Reliability, 15 bins of confidence: below the diagonal is over-confident."
    return [Figure("reliability", canvas, caption, data)]


def _disagreements(
    checkpoints: Sequence[Evaluated],
    examples: Sequence[str],
    class_names: Sequence[str],
    image_of: Callable[[int], Any] | None = None,
) -> list[Block]:
    if len(checkpoints) < 2:
        return [Text("One checkpoint cannot disagree with another.")]
    first, second = checkpoints[0], checkpoints[1]
    a, b = first.predictions, second.predictions
    differ = np.flatnonzero(a.predicted != b.predicted)
    certainty = (a.confidence + b.confidence)[differ]
    shown = differ[np.argsort(-certainty, kind="stable")][:MAX_DISAGREEMENTS]
    rows = []
    for index in shown:
        text = examples[index]
        cells = [f"{class_names[kept.predicted[index]]} ({kept.confidence[index]:.2f})" for kept in (a, b)]
        cut = text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 1] + "…"
        rows.append([str(index), cut, class_names[a.labels[index]], *cells])
    only_a, only_b = int((a.correct & ~b.correct)[differ].sum()), int((b.correct & ~a.correct)[differ].sum())
    counted = f"{first.name} and {second.name} differ on {len(differ)} of {len(examples)} examples: {only_a} only {first.name} has right, {only_b} only {second.name}, and {len(differ) - only_a - only_b} neither."
    blocks: list[Block] = [Text(counted)]
    if rows:
        blocks.append(
            Table(
                ["index", "example", "true class", first.name, second.name], rows, "Those of which both are surest", 99
            )
        )
    if rows and image_of is not None:
        data = pd.DataFrame(rows, columns=["index", "example", "true class", first.name, second.name])
        titles = [f"{row[0]}: {row[2]}\n{row[3]}\n{row[4]}" for row in rows]
        canvas = plots.draw_images([image_of(int(index)) for index in shown], titles)
        caption = f"The same examples: number and true class, what {first.name} says, what {second.name} says."
        blocks.append(Figure("disagreements", canvas, caption, data))
    return blocks


def _robustness(checkpoints: Sequence[Evaluated], rng: np.random.Generator) -> list[Block]:
    kinds = list(dict.fromkeys(key for entry in checkpoints for key in entry.corrupted))
    if not kinds:
        return [Text("Not measured.")]
    rows, data = [], []
    for entry in checkpoints:
        for kind, level in kinds:
            kept = entry.corrupted[kind, level]
            estimate = bootstrap_examples(lambda index, right=kept.correct: right[index].mean(), len(kept.labels), rng)
            data.append((entry.name, kind, level, estimate.value, estimate.low, estimate.high, estimate.n))
    frame = pd.DataFrame(data, columns=["checkpoint", "corruption", "level", "accuracy", "low", "high", "examples"])
    clean = [f"{100 * entry.uncorrupted_accuracy:.1f}" for entry in checkpoints]
    rows.append(["none", "0", *clean])
    for (kind, level), group in frame.groupby(["corruption", "level"], sort=False):
        cells = [f"{100 * row.accuracy:.1f} [{100 * row.low:.1f}, {100 * row.high:.1f}]" for row in group.itertuples()]
        rows.append([kind, str(level), *cells])
    canvas = plots.draw_robustness(frame, {entry.name: entry.uncorrupted_accuracy for entry in checkpoints})
    caption = "Accuracy on corrupted inputs; level 0 are the same examples as they are."
    names = [entry.name for entry in checkpoints]
    return [
        Table(["corruption", "level", *names], rows, f"Accuracy (%) on the same {frame.examples.iloc[0]} examples", 2),
        Figure("robustness", canvas, caption, frame),
    ]


def _costs(checkpoints: Sequence[Evaluated], examples: int) -> list[Block]:
    rows = []
    for entry in checkpoints:
        rate = number(examples / entry.seconds, 1) if entry.seconds else NOTHING
        rows.append([entry.name, number(entry.model.get("parameters"), 0), number(entry.size / 2**20, 1), rate])
    columns = ["checkpoint", "parameters", "weights in memory (MiB)", "examples/s"]
    return [Table(columns, rows, "Measured once, in this order, on this machine")]


def _threats(checkpoints: Sequence[Evaluated], examples: int) -> list[Block]:
    found = [
        "Intervals and tests are over test examples. They say nothing about other seeds: each checkpoint is one run, "
        "and another run of the same recipe could differ by more than these intervals.",
        "If a checkpoint was chosen, or its recipe tuned, on this split, its numbers are too good.",
    ]
    if examples < 500:
        found.append(f"{examples} test examples: one example is {100 / examples:.1f} points.")
    if any(isinstance(entry.predictions, Predictions) for entry in checkpoints):
        found.append("ECE is biased upwards on few examples, and its bootstrap interval more so.")
    if any(entry.corrupted for entry in checkpoints):
        found.append("Corruptions are synthetic and few; they are no measure of robustness at large.")
    return [Listing(found)]
