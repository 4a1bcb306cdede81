"""Text that comes from outside, as Markdown that shows it and does nothing else: no heading, no link, no HTML.

Three filters for templates: ``plain`` for running text and cells, ``code`` for a name or a command, ``fenced`` for a
block. What is harmless stays as it is.
"""

from __future__ import annotations

import re
from typing import Any

from rpb_retrofit.files.printable import one_line, printable

_SPECIAL = re.compile(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])")
"""What begins or ends something; an underscore inside a word does not."""

_LEADING = re.compile(r"^(\s*)([#>+=-]|\d+[.)])")
"""What makes a line a heading, a quotation or an item of a list."""


def plain(text: Any) -> str:
    """Running text, of one line."""
    line = one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = _SPECIAL.sub(lambda match: f"\\{match[0]}", line)
    return _LEADING.sub(lambda match: f"{match[1]}{match[2][:-1]}\\{match[2][-1]}", line)


def code(text: Any) -> str:
    """A name or a command, of one line, in backticks; a bar is escaped, as tables want it."""
    line = one_line(text).replace("|", "\\|")
    ticks = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    room = " " if line.startswith("`") or line.endswith("`") or not line.strip() else ""
    return f"{ticks}{room}{line}{room}{ticks}"


def fenced(text: Any, language: str = "") -> str:
    """Several lines, between fences that are longer than any in them."""
    lines = printable(str(text))
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", lines)), default=0))
    return f"{fence}{language}\n{lines}\n{fence}"


FILTERS = {"plain": plain, "code": code, "fenced": fenced}
