"""How findings name layers and numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable

SHOWN = 6
"""Names that a sentence lists before it says how many more there are."""


def name_layers(names: Iterable[str]) -> str:
    """Module names as their layers' numbers, runs joined, and not too many: ``layers 0-3, 7``."""
    numbers = []
    for name in names:
        match = re.search(r"\.(\d+)\.", f".{name}.")
        if match is None:
            return _cut(list(names))
        numbers.append(int(match[1]))
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    words = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    return f"layer{'s' if len(set(numbers)) > 1 else ''} {_cut(words)}"


def _cut(words: list[str]) -> str:
    more = len(words) - SHOWN
    return ", ".join(words[:SHOWN]) + (f" and {more} more" if more > 0 else "")
