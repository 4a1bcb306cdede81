"""Buckets against Transformers' own, on every kind of table, and the way back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers.models.t5.modeling_t5 import T5Attention

from rpb_retrofit.errors import ConfigError
from rpb_retrofit.runtime.buckets import Bucketing, bucket_of, offsets_of

REACH = 70_000
OFFSETS = torch.arange(-REACH, REACH + 1)


@st.composite
def bucketings(draw: st.DrawFn) -> Bucketing:
    bidirectional = draw(st.booleans())
    buckets = draw(st.integers(2, 300)) * (2 if bidirectional else 1)
    bucketing = Bucketing(buckets, draw(st.integers(2, 60_000)), bidirectional)
    assume(bucketing.max_distance > bucketing.num_exact)
    return bucketing.validate()


@given(bucketings())
def test_equal_to_transformers_on_every_offset(bucketing: Bucketing) -> None:
    want = T5Attention._relative_position_bucket(
        -OFFSETS, bucketing.bidirectional, bucketing.num_buckets, bucketing.max_distance
    )
    assert torch.equal(bucket_of(OFFSETS, bucketing), want)


@given(bucketings(), st.data())
def test_offsets_of_is_the_inverse(bucketing: Bucketing, data: st.DataObject) -> None:
    bucket = data.draw(st.integers(0, bucketing.num_buckets - 1))
    visible = OFFSETS if bucketing.bidirectional else OFFSETS[OFFSETS >= 0]
    held = visible[bucket_of(visible, bucketing) == bucket]
    span = offsets_of(bucket, bucketing)
    if span is None:
        assert len(held) == 0
        return
    first, last = span
    assert held.min() == (-REACH if first is None else first)
    assert held.max() == (REACH if last is None else last)
    assert len(held) == held.max() - held.min() + 1


def test_the_sign() -> None:
    """Query at 5, key at 9: offset -4, the key lies after the query, in the second half of a bidirectional table."""
    offset = torch.tensor(5 - 9)
    assert bucket_of(offset, Bucketing(32, 128, bidirectional=True)) == 16 + 4
    assert bucket_of(offset, Bucketing(32, 128, bidirectional=False)) == 0
    assert bucket_of(-offset, Bucketing(32, 128, bidirectional=True)) == 4


@pytest.mark.parametrize(
    ("bucketing", "complaint"),
    [
        (Bucketing(1, 128, False), "num_buckets=1: a causal table needs at least 2"),
        (Bucketing(2, 128, True), "num_buckets=2: a bidirectional table needs at least 4"),
        (Bucketing(33, 128, True), "num_buckets=33.*use 32 or 34"),
        (Bucketing(32, 16, False), "max_distance=16.*at least 17"),
        (Bucketing(32, 8, True), "max_distance=8.*at least 9"),
    ],
)
def test_impossible_tables_are_refused(bucketing: Bucketing, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        bucketing.validate()


def test_a_bucket_outside_the_table_is_refused() -> None:
    with pytest.raises(ConfigError, match="bucket 32 is outside"):
        offsets_of(32, Bucketing(32, 128, False))
