"""Counts of tokens as people write them."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation

_POWERS = {"k": 1, "m": 2, "g": 3}


def parse_count(text: str, thousand: int = 1000) -> int | None:
    """``5M``, ``32k`` or ``4096`` as a number that fits 63 bits; None for anything else. ``k`` is a ``thousand``."""
    digits, power = text.strip(), 0
    if digits[-1:].lower() in _POWERS:
        digits, power = digits[:-1], _POWERS[digits[-1].lower()]
    try:
        value = Decimal(digits)  # a float would round what has more than 15 digits
    except InvalidOperation:
        return None
    if not value.is_finite() or not 0 <= value < 2**63:
        return None
    whole = value * thousand**power
    return int(whole) if whole < 2**63 and whole == int(whole) else None


def written_count(number: int) -> str:
    """A count as people write it, the inverse of `parse_count`: ``5M``, ``32k`` or ``4096``; ``k`` is 1,000."""
    for letter, power in (("G", 3), ("M", 2), ("k", 1)):
        if number and number % 1000**power == 0:
            return f"{number // 1000**power}{letter}"
    return str(number)
