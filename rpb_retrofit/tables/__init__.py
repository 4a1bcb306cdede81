"""Where the numbers in a table come from. One file per source of numbers.

Those of `INITIALISATIONS` need to know nothing but a TableSpec; `calibrate` reads text with the source.
"""

from __future__ import annotations

from collections.abc import Callable

from rpb_retrofit.tables.alibi import alibi
from rpb_retrofit.tables.normal import normal
from rpb_retrofit.tables.table_spec import Start, TableSpec
from rpb_retrofit.tables.zeros import zeros

CALIBRATED = "calibrated"
"""The initialisation that fits the tables to the source's attention on text."""

CONTENT = "tables+content"
"""What calibration fits where the content term gets factors, too."""

Initialisation = Callable[[TableSpec], Start]
"""A table's spec -> what it begins with."""

FROM = "from:"
"""What ``init`` begins with where tables are taken from the checkpoint named behind it."""

INITIALISATIONS: dict[str, Initialisation] = {"zeros": zeros, "normal": normal, "alibi": alibi}
"""Initialisations that need no forward pass of the source, by the name that ``--init`` takes."""
