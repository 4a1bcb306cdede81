"""What a table may have been meant to be, given that it became what it is by a mistake."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from rpb_retrofit.runtime.bias import RelativePositionBias
from rpb_retrofit.runtime.buckets import Bucketing

MADE_FOR = "made for the maximum distance"
"""A meaning that is not of the numbers, but of their buckets."""


def meanings_of(bias: RelativePositionBias, own: Tensor, width: int) -> dict[str, Tensor]:
    """What a table ``own`` (heads, buckets), or one with its tail beside it, may have been meant to be."""
    buckets, root = bias.bucketing.num_buckets, math.sqrt(width)
    half = bias.bucketing.per_direction

    def of_buckets(change: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.cat([change(own[:, :buckets]), own[:, buckets:]], 1)

    def each_direction(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda table: torch.cat([change(part) for part in table.split(half, 1)], 1)

    meanings = {
        "negated": -own,
        "halved": own * 2,
        "doubled": own / 2,
        "made smaller by a third": own * 1.5,
        "scaled by 1/sqrt(d)": own * root,
        "scaled by sqrt(d)": own / root,
        "shifted by one bucket": of_buckets(each_direction(lambda t: torch.cat([t[:, 1:], t[:, -1:]], 1))),
        "shifted by minus one bucket": of_buckets(each_direction(lambda t: torch.cat([t[:, :1], t[:, :-1]], 1))),
        "far and near exchanged": of_buckets(each_direction(lambda t: t.flip(1))),
    }
    if bias.bucketing.bidirectional:
        meanings["before and after exchanged"] = of_buckets(lambda t: torch.cat([t[:, half:], t[:, :half]], 1))
    return meanings


def continued(table: Tensor, start: int, bucketing: Bucketing) -> Tensor:
    """A table (heads, buckets) whose buckets from ``start`` on, in each direction, hold that of the one before."""
    parts = table.split(bucketing.per_direction, 1)
    return torch.cat(
        [torch.cat([p[:, :start], p[:, start - 1 : start].expand(-1, p.shape[1] - start)], 1) for p in parts], 1
    )
