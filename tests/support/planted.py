"""A layer whose best table, tail and factors are known, because its source's attention was made with them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from rpb_retrofit.runtime import factor
from rpb_retrofit.runtime.buckets import Bucketing, bucket_of
from rpb_retrofit.tables import attention_rows as rows_module
from rpb_retrofit.tables import loss as loss_module
from rpb_retrofit.tables.attention_rows import AttentionRows
from rpb_retrofit.tables.loss import RowPairs
from rpb_retrofit.tables.parameters import ParameterLayout

BUCKETINGS = st.sampled_from([Bucketing(8, 20, False), Bucketing(12, 300, False), Bucketing(8, 20, True)])
FORMS = st.builds(
    ParameterLayout,
    BUCKETINGS,
    st.booleans(),
    st.sampled_from(
        [
            None,
            factor.RotaryPairs("half", 0, 4),
            factor.RotaryPairs("half", 2, 3),
            factor.RotaryPairs("interleaved", 2, 3),
        ]
    ),
    st.sampled_from([0, 1]),
)

WIDTH = 8
"""Dimensions of a head."""


@dataclass
class Planted:
    """Random content, and a source whose attention is that content with a bucketed bias, a tail and factors."""

    layout: ParameterLayout
    heads: int = 4
    groups: int = 2
    keys: int = 90
    step: int = 3
    window: int | None = None
    sinks: bool = False
    softcap: float | None = None
    seed: int = 0
    dtype: torch.dtype = torch.float64

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        self.bucketing = self.layout.bucketing
        self.numbers = self.randn(self.heads, self.layout.size).clamp(-2, 2)
        self.numbers[:, self.layout.num_bias :] /= 2
        self.sink = self.randn(self.heads) if self.sinks else None

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=self.dtype)

    def student(self) -> AttentionRows:
        positions = range(self.keys - 2, -1, -self.step)
        at = torch.tensor(positions)
        first = torch.zeros_like(at) if self.window is None else (at - self.window + 1).clamp(min=0)
        last = torch.full_like(at, self.keys) if self.bucketing.bidirectional else at + 1
        return AttentionRows(
            positions, torch.stack([first, last], 1), self.keys,
            query=self.randn(self.heads, len(at), WIDTH), key=self.randn(self.heads // self.groups, self.keys, WIDTH),
            scale=0.3, softcap=self.softcap, sinks=self.sink,
        )  # fmt: skip

    def source(self, student: AttentionRows) -> AttentionRows:
        scores = explicit_scores(student, self.layout, self.numbers)
        return AttentionRows(student.positions, student.seen, self.keys, scores=scores, sinks=self.sink)

    def pairs(self, windows: int) -> RowPairs:
        students = [self.student() for _ in range(windows)]
        return [(self.source(student), student) for student in students]


def explicit_scores(student: AttentionRows, layout: ParameterLayout, numbers: Tensor) -> Tensor:
    """Scores by their definition: complex products and a bias for every pair of tokens, no views and no sums."""
    buckets, bias = layout.bucketing.num_buckets, layout.num_bias
    offset = torch.tensor(student.positions)[:, None] - torch.arange(student.keys)
    assert student.query is not None and student.key is not None
    query, key = student.query, student.key.repeat_interleave(len(student.query) // len(student.key), 0)
    content = query @ key.mT
    if layout.pairs is not None:
        count = layout.pairs.frequencies
        middle = slice(layout.pairs.start, layout.pairs.start + 2 * count)
        shape = (2, count) if layout.pairs.layout == "half" else (count, 2)
        q, k = (x[..., middle].unflatten(-1, shape) for x in (query, key))
        q, k = (torch.complex(*x.unbind(-2 if layout.pairs.layout == "half" else -1)) for x in (q, k))
        real, imaginary = numbers[:, bias:].chunk(2, -1)
        c = torch.complex(real, imaginary)[:, None]
        content = content + torch.einsum("hif,hjf->hij", c * q[..., layout.kept :], k[..., layout.kept :].conj()).real
    content = content * student.scale
    if student.softcap is not None:
        content = student.softcap * (content / student.softcap).tanh()
    scores = content + numbers[:, bucket_of(offset, layout.bucketing)]
    if layout.tail:
        beyond = (offset.abs() / layout.bucketing.max_distance).clamp(min=1).log().to(scores)
        scores = scores + numbers[:, buckets, None, None] * beyond * (offset > 0)
        if layout.bucketing.bidirectional:
            scores = scores + numbers[:, buckets + 1, None, None] * beyond * (offset < 0)
    at = torch.arange(student.keys)
    return scores.masked_fill((at < student.seen[:, :1]) | (at >= student.seen[:, 1:]), -torch.inf)


def exactly(patch: pytest.MonkeyPatch) -> None:
    """No pull, and several blocks."""
    patch.setattr(rows_module, "BLOCK", 4000)
    patch.setattr("rpb_retrofit.tables.parameters.CHUNK", 5000)
    for name in ("PULL", "GAUGE", "STIFFNESS"):
        patch.setattr(loss_module, name, 0.0)
