"""Format numbers and findings for readers: rounding, units, and sentences that claim no more than was found."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from ..evaluation.metrics import metric_of
from ..experiments.plan import BUDGETS
from .results import Comparison, Overall, mean_and_spread

NOTHING = "-"


def number(value: float | None, digits: int = 3) -> str:
    """Format `value` with `digits` decimals; a dash if it is missing."""
    if value is None or not math.isfinite(value):
        return NOTHING
    return f"{value:,.{digits}f}" if digits == 0 or abs(value) >= 10**-digits or value == 0 else f"{value:.2g}"


def value_and_spread(values: Sequence[float], metric_name: str) -> str:
    """Format mean and standard deviation over runs in the metric's unit: `92.4 ± 0.6`."""
    if not values:
        return NOTHING
    metric = metric_of(metric_name)
    mean, spread = mean_and_spread(values)
    text = number(mean * metric.scale, metric.digits)
    return text if math.isnan(spread) else f"{text} ± {number(spread * metric.scale, metric.digits)}"


def signed(value: float, metric_name: str) -> str:
    """Format a difference with its sign in the metric's unit."""
    metric = metric_of(metric_name)
    return f"{round(value * metric.scale, metric.digits) + 0.0:+.{metric.digits}f}"  # never -0.0


def with_interval(value: float | None, low: float | None, high: float | None, metric_name: str) -> str:
    """Format a difference and its interval, `+1.2 [+0.3, +2.1]`; missing parts are left out."""
    parts = [] if value is None else [signed(value, metric_name)]
    if low is not None:
        parts.append(f"[{signed(low, metric_name)}, {signed(high, metric_name)}]")
    return " ".join(parts) or NOTHING


def p_value(p: float | None) -> str:
    """Format a p-value with as many digits as are meaningful."""
    if p is None:
        return NOTHING
    return "< 0.0001" if p < 1e-4 else f"{p:.4f}".rstrip("0").ljust(4, "0")


def p_equals(p: float) -> str:
    """Format a p-value as `p = 0.0625`, or `p < 0.0001`."""
    text = p_value(p)
    return f"p {text}" if text.startswith("<") else f"p = {text}"


def size(value: float, metric_name: str) -> str:
    """Format a difference without its sign and with its unit: `0.9 points`."""
    metric = metric_of(metric_name)
    amount = f"{abs(value) * metric.scale:.{metric.digits}f}"
    return f"{amount} point{'' if amount == '1.0' else 's'}" if metric.scale == 100 else amount


def labelled(metric_name: str) -> str:
    """Return the metric's label with its unit, as for a column: `accuracy (%)`."""
    metric = metric_of(metric_name)
    return f"{metric.label} ({metric.unit})" if metric.unit else metric.label


def budget_name(budget: str) -> str:
    return BUDGETS.get(budget, budget)


def where(entry: Comparison) -> str:
    """Format task, condition and budget."""
    return f"{entry.cell.title}, {budget_name(entry.cell.budget)}"


def answer(entry: Comparison) -> str:
    """Describe a comparison in a sentence: arms, task, difference and uncertainty."""
    paired, label = entry.paired, metric_of(entry.metric).label
    mean, seeds = paired.difference.value, len(paired.seeds)
    direction = "above" if mean > 0 else "below"
    gap = f"{size(mean, entry.metric)} {direction}" if mean else "level with"
    if seeds == 1:
        return (
            f"{where(entry)}: one seed only. With it, {label} of {entry.arm} is {gap} {entry.control}. One seed "
            f"gives no interval and says nothing about other seeds."
        )
    interval = f"95 % interval {signed(paired.t_low, entry.metric)} to {signed(paired.t_high, entry.metric)}"
    finding = f"The {label} of {entry.arm} is {gap} {entry.control} ({interval}, {seeds} seeds)"
    margin = None if entry.margin is None else f"±{size(entry.margin, entry.metric)}"
    if entry.verdict == "equivalent":
        return (
            f"{where(entry)}: equivalent. {entry.arm} and {entry.control} differ by less than {margin} "
            f"(two one-sided tests, {p_equals(entry.p_equivalent)}); the mean difference is "
            f"{signed(mean, entry.metric)} ({interval}, {seeds} seeds)."
        )
    if entry.verdict == "undecided":
        within = f" within ±{size(paired.within, entry.metric)}" if margin else ""
        return (
            f"{where(entry)}: undecided. {finding}: the runs show neither a difference nor equivalence. With this spread, "
            f"{seeds} seeds detect a difference of {size(paired.detectable, entry.metric)} four times in five"
            + (f", and show only that the difference is{within}." if within else ".")
        )
    word = "better" if entry.verdict.endswith("better") else "worse"
    if entry.verdict.startswith("leans"):
        return (
            f"{where(entry)}: {entry.arm} leans {word}. {finding}, but not after adjusting for {entry.family} comparisons "
            f"({p_equals(entry.p_holm)})."
        )
    small = f", though by less than the margin of {margin}" if entry.is_equivalent else ""
    return f"{where(entry)}: {entry.arm} is {word}{small}. {finding}."


def headline(entries: Sequence[Comparison]) -> str:
    """Summarize all comparisons of one arm in one or two sentences."""
    if len(entries) == 1:
        return answer(entries[0])
    first, count = entries[0], len(entries)
    everywhere = "both comparisons" if count == 2 else f"all {count} comparisons"
    arm, control, label = first.arm, first.control, metric_of(first.metric).label
    found = Counter(entry.verdict for entry in entries)
    settled = [entry for entry in entries if entry.verdict in ("better", "worse")]
    sizes = sorted(abs(entry.paired.difference.value) for entry in settled)
    by = f" by {size(sizes[0], first.metric)}" if sizes else ""
    if len(sizes) > 1 and size(sizes[0], first.metric) != size(sizes[-1], first.metric):
        by = f" by {size(sizes[0], first.metric).split()[0]} to {size(sizes[-1], first.metric)}"
    if found["one seed"] == count:
        return f"No verdict: one seed shows nothing about {arm} against {control}."
    if found["better"] == count:
        return f"Yes: {arm} is better than {control} in {everywhere}, in {label}{by}."
    if found["worse"] == count:
        return f"No: {arm} is worse than {control} in {everywhere}, in {label}{by}."
    if found["equivalent"] == count:
        margin = size(first.margin, first.metric)
        return f"Equivalent: in {everywhere} {arm} and {control} are within ±{margin} of each other in {label}."
    if found["undecided"] == count:
        return (
            f"Undecided: none of the {count} comparisons shows a difference in {label} between {arm} and {control}, and none "
            f"shows equivalence."
        )
    words = {
        "better": "better",
        "worse": "worse",
        "equivalent": "equivalent",
        "leans better": "leaning better",
        "leans worse": "leaning worse",
        "undecided": "undecided",
        "one seed": "without a verdict (one seed)",
    }
    parts = [f"{word} in {found[verdict]}" for verdict, word in words.items() if found[verdict]]
    worse, better = found["worse"] + found["leans worse"], found["better"] + found["leans better"]
    start = "It depends" if worse and better else "No" if worse else "Partly" if better else "No difference shown"
    return f"{start}: of {count} comparisons with {control} in {label}, {arm} is {', '.join(parts)}."


def overall_sentence(entry: Overall, metric_name: str) -> str:
    """Describe an arm across tasks in one sentence."""
    gain, probability = entry.gain, entry.probability
    chance = f"{100 * probability.value:.0f} %"
    if probability.low is not None:
        chance += f" [{100 * probability.low:.0f}, {100 * probability.high:.0f}]"
    return (
        f"Across {entry.tasks} tasks and conditions at {budget_name(entry.budget)}: interquartile mean gain of {entry.arm} "
        f"over {entry.control} in {metric_of(metric_name).label} "
        f"{with_interval(gain.value, gain.low, gain.high, metric_name)}; a run of {entry.arm} beats one of "
        f"{entry.control} with a probability of {chance} (stratified bootstrap over seeds)."
    )
