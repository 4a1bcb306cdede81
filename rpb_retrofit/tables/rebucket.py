"""A table for other buckets: the bias function that it was, read off anew.

A new bucket that lies inside an old one keeps its value bit for bit, so offsets that are exact in both do, and going to
finer nested buckets and back gives the same table. Any other new bucket gets the mean of the old function over its
offsets, each as often as it occurs in a context: two tokens at a distance of ``n`` occur ``context - n`` times.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rpb_retrofit.errors import ConfigError
from rpb_retrofit.runtime.buckets import Bucketing, bucket_of, log_beyond


class Rebucketed(NamedTuple):
    """The new table (heads, buckets), and by how much it errs: the largest difference of the bias (offsets,) over heads
    at the offsets ``offset`` (n,). The slopes of its tail, (heads, directions), or None."""

    table: Tensor
    offset: Tensor
    error: Tensor
    slopes: Tensor | None = None


def rebucket(
    table: Tensor,
    old: Bucketing,
    new: Bucketing,
    context: int,
    slopes: Tensor | None = None,
    tail: bool = False,
) -> Rebucketed:
    """A float32 table (heads, old buckets) as one of ``new`` buckets, for texts of ``context`` tokens.

    ``slopes`` (heads, old directions) are those of its logarithmic tail; with ``tail`` the new one has one, too, as
    steep. Keys before the query keep their buckets where a bidirectional table becomes a causal one. ConfigError for
    the other way: a causal table knows nothing of the keys after the query.
    """
    if new.bidirectional and not old.bidirectional:
        raise ConfigError("a causal table says nothing of the keys after the query: it cannot become bidirectional")
    slopes = None if slopes is None else slopes.clamp(max=0)  # as they act: see `RelativePositionBias`
    kept = None
    if tail:
        kept = table.new_zeros(len(table), new.directions) if slopes is None else slopes[:, : new.directions]
    if old == new and (tail or slopes is None):
        return Rebucketed(table, torch.zeros(1, dtype=torch.long), torch.zeros(1), kept)
    reach = max(context, old.max_distance + 1, new.max_distance + 1)
    offset = torch.arange(1 - reach if new.bidirectional else 0, reach)
    bias = _bias(table, slopes, offset, old)
    bucket = bucket_of(offset, new)
    # Beyond the context nothing occurs; what is least far counts there.
    weight = (context - offset.abs()).clamp(min=0).double() + 1e-9 / (1 + offset.abs())
    buckets = new.num_buckets
    # The mean is taken around the bias of each bucket's offset nearest to the query: so equal biases stay equal.
    order = offset.abs().argsort(descending=True, stable=True)
    first = order[-1].repeat(buckets).index_copy_(0, bucket[order], order)  # an empty bucket: offset 0's
    level = bias if kept is None else bias - _tail(kept, offset, new)
    around = level[:, first]
    total = torch.zeros(buckets, dtype=torch.double).index_add_(0, bucket, weight)
    moved = torch.zeros(len(table), buckets, dtype=torch.double)
    moved.index_add_(1, bucket, (level - around[:, bucket]) * weight)
    result = (around + moved / total.clamp(min=1e-300)).to(table.dtype)
    return Rebucketed(result, offset, (_bias(result, kept, offset, new) - bias).abs().amax(0), kept)


def _bias(table: Tensor, slopes: Tensor | None, offset: Tensor, bucketing: Bucketing) -> Tensor:
    level = table[:, bucket_of(offset, bucketing)].double()
    return level if slopes is None else level + _tail(slopes, offset, bucketing)


def _tail(slopes: Tensor, offset: Tensor, bucketing: Bucketing) -> Tensor:
    return slopes.double() @ log_beyond(offset, bucketing).double()
