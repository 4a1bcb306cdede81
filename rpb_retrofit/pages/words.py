"""Numbers and differences in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def number(value: Any, form: str = ".3f") -> str:
    """A number in words where figures cannot say it; what is no number at all as it is."""
    if value is None:
        return "not measured"
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {number(item, form)}" for key, item in value.items())
    if isinstance(value, Sequence):
        return ", ".join(number(item, form) for item in value)
    if isinstance(value, int):
        return str(value)
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "infinite" if value > 0 else "minus infinity"
    return f"{value:{form}}"


def begun(sentence: str) -> str:
    """With a capital letter in front; what comes after keeps its own."""
    return f"{sentence[:1].upper()}{sentence[1:]}"


def interval(difference: Mapping[str, Any]) -> str:
    """A mean with its interval."""
    mean = number(difference["mean"], "+.3f")
    if not (math.isfinite(difference["low"]) and math.isfinite(difference["high"])):
        return f"{mean} (no interval: it takes two clusters of text to know the spread)"
    return f"{mean} (95% interval {difference['low']:+.3f} to {difference['high']:+.3f})"


def detected(difference: Mapping[str, Any]) -> str:
    """Whether a difference was found, and if none was, from what size on it would have been."""
    if difference["real"]:
        return "a difference"
    if not math.isfinite(difference["detectable"]):
        return "no difference found; none of any size could have been"
    return f"no difference found; one of {difference['detectable']:.3f} or more would have been, 4 times in 5"


def effect(difference: Mapping[str, Any]) -> list[str]:
    """The cells of a difference in a table, below `EFFECT`."""
    return [*(number(difference[key], "+.3f") for key in ("mean", "low", "high")), detected(difference)]


EFFECT = ("mean", "low (95%)", "high (95%)", "found")
