"""Text that comes from outside (configs, columns, cards, error messages), fit to be shown.

None of it steers a terminal, and none of it looks like another line of the program's.
"""

from __future__ import annotations

import unicodedata

_DIRECTIONS = frozenset("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Marks that turn the order of what follows around."""

LONGEST = 2000
"""Characters of a message that is shown whole."""


def printable(text: str, kept: str = "\n\t") -> str:
    """With escapes for control characters other than those ``kept``: ``\\x1b`` in words for the one that steers."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c in kept or not _steers(c) else c.encode("unicode_escape").decode("ascii") for c in text)


def _steers(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Zl", "Zp", "Cs") or character in _DIRECTIONS


def one_line(text: object) -> str:
    """A name or a value from outside: `printable`, with escapes for newlines and tabs too."""
    return printable(str(text), kept="")


def shortened(message: str, longest: int = LONGEST) -> str:
    """A message as one line; of a very long one the beginning and the end."""
    line = one_line(" ".join(part.strip() for part in message.split("\n")))
    if len(line) <= longest:
        return line
    half = longest // 2
    return f"{line[:half]} ... ({len(line) - 2 * half:,} characters left out) ... {line[-half:]}"
