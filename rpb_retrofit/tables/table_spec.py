"""What an initialisation may know about the table that it fills, and what it gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from rpb_retrofit.runtime.buckets import Bucketing


@dataclass(frozen=True)
class TableSpec:
    """A table's shape and surroundings: ``hidden_size`` of the model, ``context`` the tokens it was trained on at once,
    ``seed`` this table's own, ``tail`` whether a logarithmic tail goes on beyond the maximum distance."""

    heads: int
    bucketing: Bucketing
    hidden_size: int
    context: int
    seed: int
    tail: bool = False


class Start(NamedTuple):
    """A float32 table (heads, buckets), and the slopes (heads, directions) of its tail; None: zeros."""

    table: Tensor
    slopes: Tensor | None = None
