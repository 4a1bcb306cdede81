"""What an initialisation may know about the table that it fills."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rpb_retrofit.runtime.buckets import Bucketing


@dataclass(frozen=True)
class Place:
    """A table's shape and surroundings: ``hidden_size`` of the model, ``context`` the tokens it was trained on at once,
    ``seed`` this table's own."""

    heads: int
    bucketing: Bucketing
    hidden_size: int
    context: int
    seed: int
