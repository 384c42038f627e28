"""Report on existing checkpoints: their metrics with intervals, where they differ, and what they cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from sklearn.metrics import precision_recall_fscore_support

from ..evaluation.calibration import reliability
from ..evaluation.classification import confusion
from ..evaluation.metrics import metric_of
from ..evaluation.predictions import Predictions
from . import checkpoint_plots as drawings
from . import plots
from .document import Block, Columns, Document, Figure, Listing, Section, Table, Text
from .evaluated import Evaluated, compare_checkpoints, differences_from_first, metric_estimates, verdict
from .formatting import NOTHING, number, p_equals, p_value, with_interval
from .results import POINTS_THAT_MATTER
from .sharpness import sharpness_sections
from .statistics import Estimate, bootstrap_examples

MAX_DISAGREEMENTS = 20
MAX_SHOWN = 120  # characters of an example
MAX_CLASSES = 30  # in a table per class or a confusion matrix


def make_checkpoint_document(
    checkpoints: Sequence[Evaluated],
    facts: dict[str, str],
    examples: Sequence[str],
    class_names: Sequence[str] | None = None,
    seed: int = 0,
    sharpness: Mapping[str, Any] | None = None,
    image_of: Callable[[int], Any] | None = None,
    survival: Section | None = None,
    command: str | None = None,
) -> Document:
    """
    Build the report of one or more checkpoints on one test split.

    Args:
        checkpoints (`Sequence[Evaluated]`): The others are compared with the first.
        facts (`dict[str, str]`): Facts about the evaluation data, for the set-up.
        examples (`Sequence[str]`): The text to show for each test example.
        class_names (`Sequence[str]`, *optional*): `None` for language models.
        seed (`int`, *optional*, defaults to 0): Seed of the bootstrap.
        sharpness (`dict`, *optional*): The content of `sharpness.json` of the same checkpoints.
        image_of (`Callable`, *optional*): From the index of a test example to its image, if examples are images.
        survival (`Section`, *optional*): See `survival_section`.
        command (`str`, *optional*): The command that writes this report again.
    """
    rng = np.random.default_rng(seed)
    is_classifier = class_names is not None
    metrics = metric_estimates(checkpoints, rng)
    pairs = compare_checkpoints(checkpoints, rng)
    beside = differences_from_first(checkpoints, pairs, rng) if is_classifier else []
    sections = [Section("Answer", [*_answer(checkpoints, pairs, beside), *_metric_table(checkpoints, metrics)])]
    sections.append(Section("What to do next", _next(pairs, bool(sharpness), survival is not None, command)))
    if is_classifier:
        sections += [
            Section("Calibration", _calibration(checkpoints)),
            Section("Disagreements", _disagreements(checkpoints, examples, class_names, image_of)),
            Section("Robustness to input corruption", _robustness(checkpoints, rng)),
        ]
    measured = sharpness_sections(sharpness) if sharpness else []
    sections += [
        *measured[:1],
        *([survival] if survival else []),
        Section("Size and speed", _costs(checkpoints, len(examples))),
        Section("Limits of this evaluation", _limits(checkpoints, len(examples))),
        *([Section("Per class", _per_class(checkpoints, class_names), folded=True)] if is_classifier else []),
        Section("Statistics", _pair_table(pairs), folded=True),
        *measured[1:],
        Section("Set-up and provenance", _setup(checkpoints, facts), folded=True),
    ]
    table = pd.DataFrame(
        {"checkpoint": name, "metric": metric, **vars(estimate)}
        for name, row in metrics.items()
        for metric, estimate in row.items()
    )
    numbers = {"checkpoints": [entry.path for entry in checkpoints], "pairs": pairs}
    lead = f"{', '.join(entry.name for entry in checkpoints)} on {len(examples)} test examples. Intervals are at 95 %."
    warnings = [*_different_data(checkpoints), *_few_examples(checkpoints, pairs)]
    return Document("Evaluation of checkpoints", lead, sections, {"metrics": table}, numbers, warnings)


# --- sections -----------------------------------------------------------------------------------------------------


def _answer(checkpoints: Sequence[Evaluated], pairs: Sequence[dict], beside: Sequence[dict]) -> list[Block]:
    if not pairs:
        return [Text("One checkpoint, so there is no comparison. Its metrics:", "verdict")]
    first = checkpoints[0].name
    blocks: list[Block] = [Text(_sentence(pair, len(pairs)), "verdict") for pair in pairs if pair["first"] == first]
    if not beside:
        return blocks
    rows = [
        [
            row["checkpoint"],
            _label(row["metric"]),
            with_interval(row["value"], row["low"], row["high"], row["metric"]),
            _favours(row),
        ]
        for row in beside
    ]
    table = Table(
        ["checkpoint", "metric", "difference [95 %]", "favours"], rows, f"Minus {first}, same examples", 2, stacked=True
    )
    caption = f"Accuracy minus that of {first} on the same examples, bootstrap interval."
    data = pd.DataFrame(beside)
    gains = data[data.metric == "accuracy"]
    figure = Figure("differences", plots.draw_gains(gains, f"accuracy minus that of {first} (points)"), caption, gains)
    return [*blocks, Columns([table], [figure])]


def _next(pairs: Sequence[dict], has_sharpness: bool, has_survival: bool, command: str | None) -> list[Block]:
    steps = []
    if pairs:
        steps.append(
            "To compare the recipes rather than single runs of them, repeat both over seeds: `hf-sam compare` does this and "
            "tests the paired differences."
        )
    if not has_sharpness:
        steps.append("Sharpness was not measured: --sharpness true measures it.")
    if not has_survival:
        steps.append("Scores after quantization, pruning and noise were not measured: --survival true measures them.")
    return ([Listing(steps)] if steps else []) + (
        [Text("This command writes this report again:"), Text(command, "command")] if command else []
    )


def _favours(row: dict) -> str:
    if row["low"] is None or row["low"] <= 0 <= row["high"]:
        return "neither"
    return row["checkpoint" if (row["value"] > 0) == metric_of(row["metric"]).higher_is_better else "minus"]


def _sentence(pair: dict, pairs: int) -> str:
    """Describe the difference of one checkpoint from the first in one sentence."""
    found = {
        "better": f"{pair['second']} is better than {pair['first']} on this test split",
        "worse": f"{pair['second']} is worse than {pair['first']} on this test split",
        "equivalent": f"{pair['second']} and {pair['first']} are equivalent: they differ by less than {POINTS_THAT_MATTER} points",
        "undecided": f"Undecided between {pair['second']} and {pair['first']}",
    }[verdict(pair)]
    size = with_interval(pair["value"], pair["low"], pair["high"], pair["metric"])
    unit = " points" if pair["metric"] == "accuracy" else " nats per token (lower is better)"
    several = f", {p_value(pair['p_holm'])} after Holm over {pairs} pairs" if pairs > 1 else ""
    return f"{found}: {pair['metric']} {size}{unit} ({_test_name(pair)} {p_equals(pair['p'])}{several})."


def _test_name(pair: dict) -> str:
    return "exact McNemar" if pair["metric"] == "accuracy" else "sign-flip"


def _label(name: str) -> str:
    metric = metric_of(name)
    return f"{metric.label} ({metric.unit})" if metric.unit else metric.label


def _trained_on(entry: Evaluated, what: str) -> Any:
    return (entry.data.get("train") or {}).get(what)


def _different_data(checkpoints: Sequence[Evaluated]) -> list[str]:
    prints = {_trained_on(entry, "fingerprint") for entry in checkpoints} - {None}
    if len(prints) < 2:
        return []
    listed = ", ".join(f"{entry.name} on {number(_trained_on(entry, 'examples'), 0)}" for entry in checkpoints)
    return [
        f"The checkpoints were trained on different data ({listed} examples): a difference between them may come from the "
        f"data rather than the method."
    ]


def _few_examples(checkpoints: Sequence[Evaluated], pairs: Sequence[dict]) -> list[str]:
    """Warn if there are too few test examples to detect one point, and say how many are needed."""
    found = []
    for pair in pairs:
        if pair["metric"] != "accuracy" or verdict(pair) != "undecided":
            continue
        chosen = {entry.name: entry.predictions for entry in checkpoints}
        gain = chosen[pair["second"]].correct.astype(float) - chosen[pair["first"]].correct
        needed = math.ceil((2.8 * gain.std() / 0.01) ** 2)  # 1.96 + 0.84 standard errors: four times in five at 5 %
        if needed > len(gain):
            found.append(
                f"Too few test examples to detect one point between {pair['first']} and {pair['second']}: {len(gain)} here, about "
                f"{needed:,} needed."
            )
    return found[:3]


def _setup(checkpoints: Sequence[Evaluated], facts: Mapping[str, str]) -> list[Block]:
    rows = [
        [
            entry.name,
            entry.path,
            str(entry.model.get("class")),
            number(_trained_on(entry, "examples"), 0),
            _trained_on(entry, "fingerprint") or NOTHING,
            entry.model.get("fingerprint") or NOTHING,
        ]
        for entry in checkpoints
    ]
    columns = ["checkpoint", "path", "class", "trained on", "training data", "weights"]
    return [
        Table(["what", "value"], [list(row) for row in facts.items()], "Evaluation data", 99),
        Table(columns, rows, "Checkpoints, with fingerprints of data and weights", 99),
    ]


def _metric_table(checkpoints: Sequence[Evaluated], metrics: dict[str, dict[str, Estimate]]) -> list[Block]:
    names = list(next(iter(metrics.values())))
    rows = []
    for entry in checkpoints:
        rows.append([entry.name, *(_estimated(metrics[entry.name][name], name) for name in names)])
    return [
        Table(
            ["checkpoint", *map(_label, names)],
            rows,
            "Metrics with bootstrap intervals over test examples",
            stacked=True,
        )
    ]


def _estimated(estimate: Estimate, name: str) -> str:
    """Format the estimate of a metric in its unit, with its interval if there is one."""
    metric = metric_of(name)
    value, *ends = (
        NOTHING if part is None else number(part * metric.scale, metric.digits)
        for part in (estimate.value, estimate.low, estimate.high)
    )
    return value if estimate.low is None else f"{value} [{', '.join(ends)}]"


def _pair_table(pairs: Sequence[dict]) -> list[Block]:
    if not pairs:
        return []
    rows = [
        [
            pair["first"],
            pair["second"],
            with_interval(pair["value"], pair["low"], pair["high"], pair["metric"]),
            _test_name(pair),
            p_value(pair["p"]),
            p_value(pair["p_holm"]),
            p_value(pair["p_equivalent"]),
            verdict(pair),
        ]
        for pair in pairs
    ]
    unit = "points" if pairs[0]["metric"] == "accuracy" else "nats per token"
    columns = ["first", "second", f"{pairs[0]['metric']}, second minus first ({unit})", "test", "p", "Holm"]
    columns += [f"within ±{POINTS_THAT_MATTER} points: p", "verdict"]
    return [Table(columns, rows, "Every pair, over the same test examples; the last p is from two one-sided tests", 2)]


def _per_class(checkpoints: Sequence[Evaluated], class_names: Sequence[str]) -> list[Block]:
    count = len(class_names)
    rows, frames, matrices = [], [], {}
    for entry in checkpoints:
        kept = entry.predictions
        scores = precision_recall_fscore_support(kept.labels, kept.predicted, labels=range(count), zero_division=0)
        for index, (precision, recall, f1, support) in enumerate(zip(*scores, strict=True)):
            cells = [f"{100 * value:.1f}" for value in (precision, recall, f1)]
            rows.append([class_names[index], entry.name, *cells, str(support)])
        matrices[entry.name] = confusion(kept)
        counts = pd.DataFrame(matrices[entry.name], columns=list(class_names))
        names = pd.DataFrame({"true": list(class_names), "checkpoint": entry.name})
        frames.append(pd.concat([counts, names], axis=1))  # a class may be named "true"
    rows.sort(key=lambda row: list(class_names).index(row[0]))
    columns = ["class", "checkpoint", "precision (%)", "recall (%)", "F1 (%)", "examples"]
    blocks: list[Block] = [Table(columns, rows, "Per class", 2, folded=len(rows) > 2 * MAX_CLASSES)]
    if count <= MAX_CLASSES:
        caption = "Confusion: how many examples of each true class (row) were predicted as each class (column)."
        data = pd.concat(frames, ignore_index=True)
        blocks.append(plots.figure("confusion", caption, drawings.draw_confusion, matrices, class_names, data=data))
    return blocks


def _calibration(checkpoints: Sequence[Evaluated]) -> list[Block]:
    tables = {entry.name: reliability(entry.predictions.confidence, entry.predictions.correct) for entry in checkpoints}
    caption = "Reliability, 15 bins of confidence: below the diagonal is overconfident."
    return [plots.figure("reliability", caption, plots.draw_reliability, {"test split": tables}, list(tables))]


def _disagreements(
    checkpoints: Sequence[Evaluated],
    examples: Sequence[str],
    class_names: Sequence[str],
    image_of: Callable[[int], Any] | None = None,
) -> list[Block]:
    if len(checkpoints) < 2:
        return []
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
    counted = f"{first.name} and {second.name} differ on {len(differ)} of {len(examples)} examples: only {first.name} is right on {only_a}, only {second.name} on {only_b}, neither on {len(differ) - only_a - only_b}."
    blocks: list[Block] = [Text(counted)]
    if rows:
        blocks.append(
            Table(
                ["index", "example", "true class", first.name, second.name],
                rows,
                "The examples on which both are most confident",
                99,
            )
        )
    if rows and image_of is not None:
        data = pd.DataFrame(rows, columns=["index", "example", "true class", first.name, second.name])
        titles = [f"{row[0]}: {row[2]}\n{row[3]}\n{row[4]}" for row in rows]
        caption = f"The same examples: index and true class, prediction of {first.name}, prediction of {second.name}."
        images = [image_of(int(index)) for index in shown]
        blocks.append(plots.figure("disagreements", caption, drawings.draw_images, images, titles, data=data))
    return blocks


def _robustness(checkpoints: Sequence[Evaluated], rng: np.random.Generator) -> list[Block]:
    kinds = list(dict.fromkeys(key for entry in checkpoints for key in entry.corrupted))
    if not kinds:
        return []
    estimates: dict[tuple[str, int], list[Estimate]] = {}
    data = []
    for entry in checkpoints:
        for kind, level in kinds:
            kept = entry.corrupted[kind, level]
            estimate = bootstrap_examples(lambda index, right=kept.correct: right[index].mean(), len(kept.labels), rng)
            estimates.setdefault((kind, level), []).append(estimate)
            data.append((entry.name, kind, level, estimate.value, estimate.low, estimate.high, estimate.n))
    frame = pd.DataFrame(data, columns=["checkpoint", "corruption", "level", "accuracy", "low", "high", "examples"])
    clean = [f"{100 * entry.uncorrupted_accuracy:.1f}" for entry in checkpoints]
    rows = [["none", "0", *clean]]
    for (kind, level), found in estimates.items():
        rows.append([kind, str(level), *(_estimated(estimate, "accuracy") for estimate in found)])
    uncorrupted = {entry.name: entry.uncorrupted_accuracy for entry in checkpoints}
    caption = "Accuracy on corrupted inputs; level 0 is the same examples without corruption."
    names = [entry.name for entry in checkpoints]
    return [
        Table(["corruption", "level", *names], rows, f"Accuracy (%) on the same {frame.examples.iloc[0]} examples", 2),
        plots.figure("robustness", caption, drawings.draw_robustness, frame, uncorrupted, data=frame),
    ]


def _costs(checkpoints: Sequence[Evaluated], examples: int) -> list[Block]:
    rows = []
    for entry in checkpoints:
        rate = number(examples / entry.seconds, 1) if entry.seconds else NOTHING
        rows.append([entry.name, number(entry.model.get("parameters"), 0), number(entry.size / 2**20, 1), rate])
    columns = ["checkpoint", "parameters", "weights in memory (MiB)", "examples/s"]
    return [Table(columns, rows, "Measured once, in this order, on one machine")]


def _limits(checkpoints: Sequence[Evaluated], examples: int) -> list[Block]:
    found = [
        "Intervals and tests are over test examples. They say nothing about other seeds: each checkpoint is one run, "
        "and another run of the same recipe could differ by more than these intervals.",
        "If a checkpoint was chosen or its recipe tuned on this split, its numbers are too optimistic.",
    ]
    if examples < 500:
        found.append(f"{examples} test examples: one example is {100 / examples:.1f} points.")
    if any(isinstance(entry.predictions, Predictions) for entry in checkpoints):
        found.append("ECE is biased upwards with few examples, and its bootstrap interval even more so.")
    if any(entry.corrupted for entry in checkpoints):
        found.append("The corruptions are few and synthetic; they do not measure robustness in general.")
    return [Listing(found)]
