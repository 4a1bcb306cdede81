"""Checksums of tables as they were written: they tell whether anything happened to the numbers since.

What writes tables, a retrofit or `rpb finetune`, keeps them in the config under ``table_checksums``; a diagnosis reads
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from rpb_retrofit.files.digest import digest_of
from rpb_retrofit.runtime.anatomy import submodels
from rpb_retrofit.runtime.attach import table_names
from rpb_retrofit.runtime.buckets import Bucketing
from rpb_retrofit.runtime.families import TABLE
from rpb_retrofit.runtime.tracing import has_values

KEY = "table_checksums"
DIGITS = 16

NEAR = 1e-5
"""Share of a table's size by which its projections may differ where it was multiplied and divided again."""


class Checksums(NamedTuple):
    """Of one table. ``whole``: its numbers and its maximum distance; ``inner``: those without the first and the last
    bucket of each direction, since what was moved by a bucket has lost one; ``tail``: the tail's, empty without one;
    ``across`` and ``along``: two projections, by which a table is known again that rounding changed a little."""

    whole: str
    inner: str
    tail: str
    across: float
    along: float

    def __str__(self) -> str:
        return " ".join([self.whole, self.inner, self.tail or "none", f"{self.across:.9e}", f"{self.along:.9e}"])

    @classmethod
    def read(cls, text: str) -> Checksums:
        """From what `str` made. ValueError for any other text."""
        whole, inner, tail, across, along = text.split(" ")
        return cls(whole, inner, "" if tail == "none" else tail, float(across), float(along))

    def nearly(self, table: Tensor) -> bool:
        """Whether a table (heads, buckets) is the one that was written, but for rounding."""
        size = NEAR * float(table.double().norm())
        return all(abs(a - b) <= size for a, b in zip(_projections(table), (self.across, self.along), strict=True))


def checksum(numbers: Tensor, max_distance: int) -> str:
    """Of numbers as float32, wherever they lie, and of the maximum distance that their buckets were made for."""
    numbers = numbers.detach().to("cpu", torch.float32).contiguous()
    return digest_of([numbers.numpy().tobytes(), str(max_distance).encode()])[:DIGITS]


def inner(table: Tensor, bucketing: Bucketing, part: slice = slice(1, -1)) -> Tensor:
    """A ``part`` of the buckets of each direction of a table (heads, buckets)."""
    return torch.cat([half[:, part] for half in table.split(bucketing.per_direction, 1)], 1)


def checksums(table: Tensor, tail: Tensor | None, bucketing: Bucketing) -> Checksums:
    """Of a table (heads, buckets) and its tail (heads, directions), where it has one."""
    distance = bucketing.max_distance
    return Checksums(
        checksum(table, distance),
        checksum(inner(table, bucketing), distance),
        "" if tail is None else checksum(tail, distance),
        *_projections(table),
    )


def _projections(table: Tensor) -> tuple[float, float]:
    """A table's products with two fixed directions of unit length."""
    flat = table.detach().double().cpu().flatten()
    steps = torch.arange(1, len(flat) + 1, dtype=torch.double)
    first, second = ((steps * turn).cos() * (2 / len(flat)) ** 0.5 for turn in (1.0, 2.0**0.5))
    return float(flat @ first), float(flat @ second)


def record(model: PreTrainedModel, tables: Mapping[str, Tensor] | None = None) -> None:
    """Write into a retrofit's config what its tables are now, or what ``tables`` and tails, by name (of one on the meta
    device), will be; a plain model has none, and what has no values yet is left out."""
    if getattr(model.config, "rpb_retrofit", None) is None:
        return
    recorded = {}
    for name in table_names(model):
        bias: Any = model.get_submodule(name.removesuffix(".weight"))
        parts = (bias.weight, bias.tail)
        if tables is not None:
            parts = (tables[name], tables.get(name.replace(f"{TABLE}.weight", f"{TABLE}.tail")))
        if all(part is None or _is_whole(part) for part in parts):
            recorded[name] = str(checksums(*parts, bias.bucketing))
    before: Mapping[str, Any] = model.config.rpb_retrofit
    settings = {**before, KEY: recorded} if recorded else before
    for submodel in submodels(model):
        submodel.config.rpb_retrofit = settings


def _is_whole(table: Tensor) -> bool:
    return has_values(table) and not isinstance(table, DTensor)
