"""Offsets and buckets: the one place that knows the sign and the shape of T5's bucketing.

An *offset* is ``i - j``, query position minus key position: positive where the key lies before the query.
Transformers' T5 code counts the other way (``memory - query``); no other file has to care.

Source: Raffel et al. 2020, arXiv:1910.10683, section 2.1, and ``T5Attention._relative_position_bucket`` in
``transformers/models/t5/modeling_t5.py``, whose buckets these equal on every offset, so trained tables carry over.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import ConfigError

MAX_DISTANCE = 2**24
"""Float32 counts without gaps up to here, and T5's formula is evaluated in it."""


class Bucketing(NamedTuple):
    """How offsets fall into buckets.

    ``num_buckets`` is the length of a table row, ``max_distance`` the distance from which on all offsets share the
    last bucket, ``bidirectional`` whether keys after the query have buckets of their own (half of them) or none.
    """

    num_buckets: int
    max_distance: int
    bidirectional: bool

    @property
    def per_direction(self) -> int:
        """Buckets that serve one direction."""
        return self.num_buckets // 2 if self.bidirectional else self.num_buckets

    @property
    def directions(self) -> int:
        """Directions that have buckets of their own: keys before the query, and keys after it."""
        return 2 if self.bidirectional else 1

    @property
    def num_exact(self) -> int:
        """Distances 0 .. num_exact - 1 have a bucket of their own; larger ones share, ever more widely."""
        return self.per_direction // 2

    def validate(self) -> Bucketing:
        """Return self, or raise ConfigError naming the value that cannot be."""
        kind = "bidirectional" if self.bidirectional else "causal"
        least = 4 if self.bidirectional else 2
        if self.num_buckets < least:
            raise ConfigError(
                f"relative_attention_num_buckets={self.num_buckets}: a {kind} table needs at least {least} buckets"
            )
        if self.bidirectional and self.num_buckets % 2:
            raise ConfigError(
                f"relative_attention_num_buckets={self.num_buckets}: a bidirectional table splits its buckets evenly "
                f"between the two directions; use {self.num_buckets - 1} or {self.num_buckets + 1}"
            )
        if self.max_distance > MAX_DISTANCE:
            raise ConfigError(f"relative_attention_max_distance={self.max_distance}: it can be {MAX_DISTANCE} at most")
        if self.max_distance <= self.num_exact:
            raise ConfigError(
                f"relative_attention_max_distance={self.max_distance}: with {self.num_buckets} {kind} buckets, "
                f"distances below {self.num_exact} have a bucket each, so it must be at least {self.num_exact + 1}"
            )
        return self


@torch.compiler.assume_constant_result  # torch.compile runs it instead of tracing it
def first_distances(bucketing: Bucketing) -> tuple[int, ...]:
    """The smallest distance that each bucket of one direction holds, ascending.

    T5's logarithm is evaluated once, in float32 on the CPU, and only these integers are used from then on: a bucket
    never depends on how a device rounds. A bucket that rounding left empty repeats its successor's first distance.
    """
    return _first_distances(bucketing)


@cache
def _first_distances(bucketing: Bucketing) -> tuple[int, ...]:
    # A FakeTensorMode (torch.export's), a default device or a compiler of the caller's has no hold on a thread of its
    # own, and these few numbers must be real ones.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_evaluate, bucketing).result()


def _evaluate(bucketing: Bucketing) -> tuple[int, ...]:
    per_direction, exact, max_distance = bucketing.per_direction, bucketing.num_exact, bucketing.max_distance
    distance = torch.arange(exact, max_distance + 1, device="cpu")
    share = torch.log(distance.float() / exact) / math.log(max_distance / exact)
    bucket = (exact + (share * (per_direction - exact)).to(torch.long)).clamp(max=per_direction - 1).tolist()
    first = list(range(exact))
    position = 0
    for index in range(exact, per_direction):
        while position < len(bucket) and bucket[position] < index:
            position += 1
        # Past max_distance everything is in the last bucket, also where rounding put max_distance one below it.
        first.append(exact + position)
    return tuple(first)


def bucket_of(offset: Tensor, bucketing: Bucketing) -> Tensor:
    """Map offsets ``i - j`` (integer, any shape) to buckets (int64, same shape, in ``[0, num_buckets)``).

    Causal bucketings put every key after the query into bucket 0, as T5 does: such keys are masked anyway.
    """
    first = torch.tensor(first_distances(bucketing), device=offset.device)
    distance = offset.abs() if bucketing.bidirectional else offset.clamp(min=0)
    bucket = torch.bucketize(distance, first, right=True) - 1
    if bucketing.bidirectional:
        bucket = bucket + (offset < 0) * bucketing.per_direction
    return bucket


def log_beyond(offset: Tensor, bucketing: Bucketing) -> Tensor:
    """How far offsets (n,) lie beyond the maximum distance: the logarithm of their ratio, 0 inside; float32
    (directions, n): of keys before the query, and for a bidirectional table of keys after it."""
    signed = torch.stack([offset, -offset]) if bucketing.bidirectional else offset[None]
    return (signed.float() / bucketing.max_distance).clamp(min=1).log()


def descending_buckets(offsets: range, bucketing: Bucketing, device: torch.device) -> Tensor:
    """`bucket_of` consecutive descending offsets, (n,) int64: a slice of what was computed once."""
    assert offsets.step == -1
    reach = max(abs(offsets.start), abs(offsets.stop), 1)
    at = (1 << reach.bit_length()) - offsets.start
    return _buckets_around_zero(1 << reach.bit_length(), bucketing, device)[at : at + len(offsets)]


@lru_cache(maxsize=64)
def _buckets_around_zero(reach: int, bucketing: Bucketing, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # what is kept must serve training too
        return bucket_of(torch.arange(reach, -reach - 1, -1, device=device), bucketing)


class OffsetRange(NamedTuple):
    """Offsets ``first .. last`` inclusive; ``None`` on either side means without end."""

    first: int | None
    last: int | None


def offsets_of(bucket: int, bucketing: Bucketing) -> OffsetRange | None:
    """The offsets that a bucket holds, the inverse of `bucket_of`; None where it holds none.

    The buckets of a causal table hold offsets from 0 on (bucket 0 also takes what lies after the query, which is
    masked, and is not counted here). Raises ConfigError for a bucket outside the table.
    """
    if not 0 <= bucket < bucketing.num_buckets:
        raise ConfigError(f"bucket {bucket} is outside the table: it has buckets 0 to {bucketing.num_buckets - 1}")
    first = first_distances(bucketing)
    after, index = divmod(bucket, bucketing.per_direction)
    nearest = max(first[index], 1) if after else first[index]
    farthest = first[index + 1] - 1 if index + 1 < len(first) else None
    if farthest is not None and farthest < nearest:
        return None  # rounding left it empty, or it is distance 0 of the keys after the query
    if after:
        return OffsetRange(None if farthest is None else -farthest, -nearest)
    return OffsetRange(nearest, farthest)
