"""Hyperparameters with ranges: one check per kind of value; messages name the field and what is allowed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

from ..suggestions import did_you_mean

Check = Callable[[str, Any], Any]


def number(
    default: float, low: float = -math.inf, high: float = math.inf, *, above=False, below=False, inf=False
) -> Any:
    """A field of an `Ascent` or `Descent` that holds a finite number in [low, high].

        sigma: float = number(0.05, 0)              # [0, inf)
        decay: float = number(0.9, 0, 1, below=True)    # [0, 1)

    Args:
        default (`float`): The default value.
        low, high (`float`, *optional*): The bounds, both inclusive.
        above (`bool`, *optional*, defaults to `False`): Exclude `low`.
        below (`bool`, *optional*, defaults to `False`): Exclude `high`.
        inf (`bool`, *optional*, defaults to `False`): Allow infinity.
    """
    return _field(default, is_number(low, high, above=above, below=below, inf=inf))


def number_or_none(low: float = -math.inf, high: float = math.inf, *, above=False, below=False) -> Any:
    """A field that holds a number as in `number`, or None, its default."""
    check = is_number(low, high, above=above, below=below)
    return _field(None, lambda field, value: None if value is None else check(field, value))


def whole(default: int, low: int = 1) -> Any:
    """A field that holds an integer of at least `low`."""
    return _field(default, is_whole(low))


def flag(default: bool) -> Any:
    """A field that holds `True` or `False`."""
    return _field(default, is_flag)


def _field(default: Any, check: Check) -> Any:
    return dataclasses.field(default=default, metadata={"check": check})


def check_fields(instance: Any) -> None:
    """Check every field of a frozen dataclass and convert each value to its annotated type.

    Raises:
        ValueError: A value is out of range or does not have its annotated type.
    """
    for field in dataclasses.fields(instance):
        check = field.metadata.get("check") or _BY_ANNOTATION.get(str(getattr(field.type, "__name__", field.type)))
        if check is not None:
            value = check(field.name, getattr(instance, field.name))
            object.__setattr__(instance, field.name, value)


# --- one check per kind of value: returns the converted value, or raises ------------------------------------------


def is_number(
    low: float = -math.inf, high: float = math.inf, *, above: bool = False, below: bool = False, inf: bool = False
) -> Check:
    """A finite number (or infinity, if `inf`) in [low, high], without `low` if `above` and without `high` if `below`."""
    interval = (
        f"{'(' if above or low == -math.inf else '['}{low:g}, {high:g}"
        f"{']' if (high < math.inf and not below) or inf else ')'}"
    )

    def check(field: str, value: Any) -> float:
        try:
            result = float(value) if not isinstance(value, bool) else math.nan
        except (TypeError, ValueError):
            result = math.nan
        inside = (low < result if above else low <= result) and (result < high if below else result <= high)
        if not inside or (math.isinf(result) and not inf):  # a NaN is never inside
            raise ValueError(f"{field}={value!r} must be a number in {interval}.")
        return result

    return check


def is_whole(low: int) -> Check:
    """An integer of at least `low`."""

    def check(field: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, Integral) or value < low:
            raise ValueError(f"{field}={value!r} must be a whole number, at least {low}.")
        return int(value)

    return check


def is_choice(allowed: Sequence[str]) -> Check:
    """One of `allowed`."""

    def check(field: str, value: Any) -> str:
        if value not in allowed:
            raise ValueError(
                f"{field}={value!r} is unknown.{did_you_mean(value, allowed)} Allowed: {', '.join(allowed)}."
            )
        return value

    return check


def is_flag(field: str, value: Any) -> bool:
    """Exactly `True` or `False`, not a value that merely compares equal to one of them."""
    if not isinstance(value, bool):
        raise ValueError(f"{field}={value!r} must be True or False.")
    return value


def is_moment(field: str, value: Any) -> int | float:
    """A step (int) or a fraction of the run (float)."""
    is_step = isinstance(value, Integral) and not isinstance(value, bool) and value >= 0
    is_fraction = isinstance(value, float) and 0.0 <= value <= 1.0
    if not (is_step or is_fraction):
        raise ValueError(
            f"{field}={value!r} must be a step (a whole number, at least 0) or a fraction of the run (0.0 to 1.0)."
        )
    return int(value) if is_step else float(value)


def is_selector(named: Sequence[str]) -> Check:
    """One of the selectors `named`, a shell pattern over parameter names, or a list of patterns."""

    def check(field: str, value: Any) -> str | list[str]:
        patterns = [value] if isinstance(value, str) else value
        if not isinstance(patterns, Sequence) or not patterns or not all(isinstance(p, str) and p for p in patterns):
            raise ValueError(
                f"{field}={value!r} must be one of {', '.join(named)}, or shell patterns over parameter names."
            )
        return value if isinstance(value, str) else list(value)

    return check


# For fields of custom classes that have only a type annotation.
_BY_ANNOTATION: dict[str, Check] = {"float": is_number(inf=True), "int": is_whole(-(2**63)), "bool": is_flag}
