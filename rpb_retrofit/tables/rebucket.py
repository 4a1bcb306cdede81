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
from rpb_retrofit.runtime.buckets import Bucketing, bucket_of


class Rebucketed(NamedTuple):
    """The new table (heads, buckets), and by how much it errs: the largest difference of the bias (offsets,) over heads
    at the offsets ``offset`` (n,)."""

    table: Tensor
    offset: Tensor
    error: Tensor


def rebucket(table: Tensor, old: Bucketing, new: Bucketing, context: int) -> Rebucketed:
    """A float32 table (heads, old buckets) as one of ``new`` buckets, for texts of ``context`` tokens.

    Keys before the query keep their buckets where a bidirectional table becomes a causal one. ConfigError for the
    other way: a causal table knows nothing of the keys after the query.
    """
    if new.bidirectional and not old.bidirectional:
        raise ConfigError("a causal table says nothing of the keys after the query: it cannot become bidirectional")
    if old == new:
        return Rebucketed(table, torch.zeros(1, dtype=torch.long), torch.zeros(1))
    reach = max(context, old.max_distance + 1, new.max_distance + 1)
    offset = torch.arange(1 - reach if new.bidirectional else 0, reach)
    bias = table[:, bucket_of(offset, old)].double()
    bucket = bucket_of(offset, new)
    # Beyond the context nothing occurs; what is least far counts there.
    weight = (context - offset.abs()).clamp(min=0).double() + 1e-9 / (1 + offset.abs())
    buckets = new.num_buckets
    # The mean is taken around the bias of each bucket's offset nearest to the query: so equal biases stay equal.
    order = offset.abs().argsort(descending=True, stable=True)
    first = order[-1].repeat(buckets).index_copy_(0, bucket[order], order)  # an empty bucket: offset 0's
    around = bias[:, first]
    total = torch.zeros(buckets, dtype=torch.double).index_add_(0, bucket, weight)
    moved = torch.zeros(len(table), buckets, dtype=torch.double)
    moved.index_add_(1, bucket, (bias - around[:, bucket]) * weight)
    result = (around + moved / total.clamp(min=1e-300)).to(table.dtype)
    error = (result[:, bucket].double() - bias).abs().amax(0)
    return Rebucketed(result, offset, error)
