"""An attribute that is set for a while."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any


def set_attribute(undo: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an instance attribute until ``undo``, past what classes do when an attribute is set."""
    before = vars(owner)
    if name in before:
        undo.callback(before.__setitem__, name, before[name])
    else:
        undo.callback(before.pop, name)
    before[name] = value
