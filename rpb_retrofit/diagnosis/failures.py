"""Measurements that end in an error: each is noted, and costs nothing but itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from rpb_retrofit.files.printable import message_of

Result = TypeVar("Result")


class Failures(dict[str, str]):
    """What ended in an error, and in which."""

    def attempt(self, what: str, measure: Callable[[], Result], otherwise: Result) -> Result:
        """What ``measure`` gives; ``otherwise`` where it ends in an error, which is noted."""
        try:
            return measure()
        except Exception as error:  # whatever a model raises that is at fault
            self[what] = f"{type(error).__name__}: {message_of(error)}"
            return otherwise
