"""Tables of zeros: the source without positions, the yardstick of every other initialisation."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

from rpb_retrofit.tables.place import Place


def zeros(place: Place) -> Tensor:
    """A float32 table (heads, buckets) of zeros."""
    import torch  # late: `rpb retrofit` starts copying before it

    return torch.zeros(place.heads, place.bucketing.num_buckets)
