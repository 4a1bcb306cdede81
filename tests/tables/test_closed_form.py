"""Initialisations that need no text, against other people's formulas."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from rpb_retrofit.runtime.buckets import Bucketing, bucket_of
from rpb_retrofit.tables import INITIALISATIONS
from rpb_retrofit.tables.table_spec import TableSpec

T5 = Bucketing(32, 128, False)


def spec(heads: int = 8, bucketing: Bucketing = T5, context: int = 512) -> TableSpec:
    return TableSpec(heads, bucketing, hidden_size=256, context=context, seed=3)


@pytest.mark.parametrize("heads", [1, 8, 9, 12, 16])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_alibi_is_the_mean_of_the_slopes(heads: int, bidirectional: bool) -> None:
    """Against Transformers' own ALiBi, averaged bucket by bucket over every pair of a context."""
    context, bucketing = 200, Bucketing(16, 60, bidirectional)
    slopes = build_alibi_tensor(torch.ones(1, 2), heads, torch.float64).view(heads, 2)[:, 1]  # one token's distance
    offset = torch.arange(context)[:, None] - torch.arange(context)
    offset = offset[torch.ones_like(offset, dtype=torch.bool) if bidirectional else offset >= 0]
    table = INITIALISATIONS["alibi"](spec(heads, bucketing, context)).table
    for bucket in range(16):
        inside = offset[bucket_of(offset, bucketing) == bucket]
        if len(inside):
            want = -slopes * inside.abs().double().mean()
            torch.testing.assert_close(table[:, bucket].double(), want, rtol=1e-5, atol=1e-6)
    assert table.isfinite().all()


def test_alibi_beyond_the_context() -> None:
    """Buckets that no pair of a short context falls into get the penalty where they begin."""
    table = INITIALISATIONS["alibi"](spec(8, Bucketing(32, 4096, False), context=20)).table
    assert (table.diff(dim=1) < 0).all()


def test_normal_is_t5s() -> None:
    """The spread that Transformers gives a T5 of that width; the same numbers for the same seed."""
    draw = INITIALISATIONS["normal"]
    config = T5Config(d_model=256, num_heads=512, num_layers=1, d_ff=8, d_kv=1, vocab_size=8)
    drawn_by_t5 = (
        T5ForConditionalGeneration(config).encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    )
    table = draw(spec(512)).table
    assert table.std().item() == pytest.approx(drawn_by_t5.std().item(), rel=0.05)
    assert abs(table.mean().item()) < 0.01 * math.sqrt(1 / 16)
    assert torch.equal(table, draw(spec(512)).table)
