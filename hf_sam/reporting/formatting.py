"""Numbers and findings as a reader meets them: rounding, units, and sentences that promise no more than was seen."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..evaluation.metrics import metric_of
from ..experiments.plan import BUDGETS
from .results import Comparison, Overall, mean_and_spread

NOTHING = "-"


def number(value: float | None, digits: int = 3) -> str:
    """`value` with so many decimals; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return NOTHING
    return f"{value:,.{digits}f}" if digits == 0 or abs(value) >= 10**-digits or value == 0 else f"{value:.2g}"


def value_and_spread(values: Sequence[float], metric_name: str) -> str:
    """Mean and standard deviation over runs, in the metric's unit: `92.4 ± 0.6`."""
    if not values:
        return NOTHING
    metric = metric_of(metric_name)
    mean, spread = mean_and_spread(values)
    text = number(mean * metric.scale, metric.digits)
    return text if math.isnan(spread) else f"{text} ± {number(spread * metric.scale, metric.digits)}"


def signed(value: float, metric_name: str) -> str:
    """A difference with its sign, in the metric's unit."""
    metric = metric_of(metric_name)
    return f"{value * metric.scale:+.{metric.digits}f}"


def with_interval(value: float | None, low: float | None, high: float | None, metric_name: str) -> str:
    """`+1.2 [+0.3, +2.1]`, without what there is not."""
    parts = [] if value is None else [signed(value, metric_name)]
    if low is not None:
        parts.append(f"[{signed(low, metric_name)}, {signed(high, metric_name)}]")
    return " ".join(parts) or NOTHING


def p_value(p: float | None) -> str:
    """A p-value with as many digits as say something."""
    if p is None:
        return NOTHING
    return "< 0.0001" if p < 1e-4 else f"{p:.4f}".rstrip("0").ljust(4, "0")


def p_equals(p: float) -> str:
    """`p = 0.0625`, or `p < 0.0001`."""
    text = p_value(p)
    return f"p {text}" if text.startswith("<") else f"p = {text}"


def answer(entry: Comparison) -> str:
    """One sentence: who against whom, on what, by how much, how sure."""
    metric, paired = metric_of(entry.metric), entry.paired
    points = "points" if metric.scale == 100 else ""
    size = f"{abs(paired.difference.value) * metric.scale:.{metric.digits}f}"
    direction = "above" if paired.difference.value > 0 else "below" if paired.difference.value < 0 else "level with"
    gap = " ".join(word for word in (size, points, direction) if word) if direction != "level with" else direction
    where = f"{entry.cell.title}, {BUDGETS.get(entry.cell.budget, entry.cell.budget)}"
    finding = f"{where}: {metric.label} under {entry.arm} is {gap} {entry.control}"
    if len(paired.seeds) == 1:
        return f"{finding} with the one seed that was run; one seed gives no interval and says nothing about others."
    t_low, t_high = (signed(value, entry.metric) for value in (paired.t_low, paired.t_high))
    at_floor = paired.p_value <= paired.p_floor * (1 + 1e-9)
    floor = f", the least that {len(paired.seeds)} seeds can give" if at_floor else ""
    holm = f", {p_value(entry.p_holm)} after Holm over {entry.family} tasks" if entry.family > 1 else ""
    unit = f" {points}" if points else ""
    seen = f"{paired.detectable * metric.scale:.{metric.digits}f}{unit}"
    conclusion = {
        "no difference seen": (
            f"no difference is established, which is not to say that there is none: below {t_low} and above {t_high}"
            f"{unit} it is ruled out, and these seeds would find one of {seen} four times in five"
        ),
        "better": f"{entry.arm} is better here",
        "worse": f"{entry.arm} is worse here",
        "leans better": f"the interval favours {entry.arm}, but not after adjusting for the number of tasks",
        "leans worse": f"the interval is against {entry.arm}, but not after adjusting for the number of tasks",
    }[entry.verdict]
    return (
        f"{finding} ({len(paired.seeds)} seeds; Student's interval {t_low} to {t_high}, {p_equals(paired.t_p)}{holm}; "
        f"exact sign-flip {p_equals(paired.p_value)}{floor}): {conclusion}."
    )


def overall_sentence(entry: Overall, metric_name: str) -> str:
    """The same across tasks."""
    gain, probability = entry.gain, entry.probability
    return (
        f"Across {entry.tasks} tasks and conditions at {BUDGETS.get(entry.budget, entry.budget)}, {entry.arm} against "
        f"{entry.control}: interquartile mean gain in {metric_of(metric_name).label} "
        f"{with_interval(gain.value, gain.low, gain.high, metric_name)}, probability of improvement "
        f"{number(probability.value, 2)}"
        + (f" [{number(probability.low, 2)}, {number(probability.high, 2)}]" if probability.low is not None else "")
        + " (stratified bootstrap over seeds)."
    )
