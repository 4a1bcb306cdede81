"""Tables of zeros: the source without positions, the yardstick of every other initialisation."""

from __future__ import annotations

from rpb_retrofit.tables.place import Place, Start


def zeros(place: Place) -> Start:
    """A float32 table (heads, buckets) of zeros."""
    import torch  # late: `rpb retrofit` starts copying before it

    return Start(torch.zeros(place.heads, place.bucketing.num_buckets))
