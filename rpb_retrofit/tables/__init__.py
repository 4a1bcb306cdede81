"""Where the numbers in a table come from. One file per source of numbers, each one function of a table's shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

from rpb_retrofit.tables.zeros import zeros

Initialisation = Callable[[int, int], "Tensor"]
"""(heads, buckets) -> the table, float32 of that shape."""

INITIALISATIONS: dict[str, Initialisation] = {"zeros": zeros}
"""Initialisations that need no forward pass of the source, by the name that ``--init`` takes."""
