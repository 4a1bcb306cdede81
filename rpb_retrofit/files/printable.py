"""Text that comes from outside (configs, columns, cards, error messages), fit to be shown.

None of it steers a terminal, none of it looks like another line of the program's, and none of it fills the screen.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

_DIRECTIONS = frozenset("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Marks that turn the order of what follows around."""

LONGEST, LONGEST_REASON, LONGEST_NAME = 2000, 400, 200
"""Characters of a message, of the error that it quotes, and of a name, that are shown whole."""


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


def short_name(name: object) -> str:
    """A name; of a very long one the beginning, and how long it is."""
    text = str(name)
    return text if len(text) <= LONGEST_NAME else f"{text[: LONGEST_NAME // 2]}... ({len(text)} characters)"


def message_of(error: BaseException) -> str:
    """An error's message without its line breaks; of a very long one the beginning."""
    text = " ".join(str(error).split())
    return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]}..."


def reason_of(error: BaseException) -> str:
    """Why a file could not be read or written: the system's words alone, without its number and the file's name; of an
    error that is not the system's, `message_of`."""
    return getattr(error, "strerror", None) or message_of(error)


def first_line(error: BaseException) -> str:
    """The first line of an error's message; of an error without one, its class."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def first_of(names: Sequence[str]) -> str:
    """The first of some names, and whether there are more: ``lm_head.weight, ...``."""
    return names[0] + ", ..." * (len(names) > 1)
