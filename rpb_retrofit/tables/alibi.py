"""Tables that say what ALiBi says: a penalty that grows with the distance, at a slope of its own for each head.

Source: Press et al. 2022, arXiv:2108.12409; slopes as in its code for numbers of heads that are no power of two.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from rpb_retrofit.runtime.buckets import Bucketing

from rpb_retrofit.tables.table_spec import Start, TableSpec


def slopes(heads: int) -> list[float]:
    """ALiBi's slope of each head: a geometric sequence; what is left takes every second of the next longer one."""
    power = 2 ** math.floor(math.log2(heads))
    first = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    return first + [2 ** (-4 * (i + 1) / power) for i in range(0, 2 * (heads - power), 2)]


def mean_distances(bucketing: Bucketing, context: int) -> Tensor:
    """The mean distance of each bucket's offsets, float64 (buckets,), each as often as it occurs in ``context`` tokens.

    Two tokens at a distance of ``n`` occur ``context - n`` times. A bucket beyond the context gets its own beginning.
    """
    import torch

    from rpb_retrofit.runtime.buckets import bucket_of, first_distances

    offset = torch.arange(1 - context if bucketing.bidirectional else 0, context)
    distance = offset.abs().double()
    bucket, count = bucket_of(offset, bucketing), context - distance
    total = torch.zeros(bucketing.num_buckets, dtype=torch.double)
    seen = total.index_add(0, bucket, count)
    mean = total.index_add(0, bucket, count * distance) / seen
    begin = torch.tensor(first_distances(bucketing), dtype=torch.double)
    begin = begin.repeat(bucketing.num_buckets // bucketing.per_direction)
    return torch.where(seen > 0, mean, begin)


def alibi(spec: TableSpec) -> Start:
    """Minus the slope times the mean distance of each bucket's offsets.

    A logarithmic tail goes on from the maximum distance as steeply as ALiBi falls there; the last bucket, which it
    starts from, then stands for the offsets up to there.
    """
    import torch

    bucketing = spec.bucketing
    context = min(spec.context, bucketing.max_distance + 1) if spec.tail else spec.context
    slope = -torch.tensor(slopes(spec.heads), dtype=torch.double)[:, None]
    table = (slope * mean_distances(bucketing, context)).float()
    if not spec.tail:
        return Start(table)
    return Start(table, (slope * bucketing.max_distance).float().repeat(1, bucketing.directions))
