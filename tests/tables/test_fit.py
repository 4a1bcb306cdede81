"""The fit of one layer: its derivatives, a planted answer, and what it does where the data say nothing."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rpb_retrofit.runtime.buckets import Bucketing, bucket_of
from rpb_retrofit.tables import rows as rows_module
from rpb_retrofit.tables.fit import Pairs, fit, loss, target_of
from rpb_retrofit.tables.rows import Rows


@dataclass
class Planted:
    """Random content, and a source whose attention is that content with a bucketed bias."""

    bucketing: Bucketing
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
        self.table = self.randn(self.heads, self.bucketing.num_buckets).clamp(-2, 2)
        self.sink = self.randn(self.heads) if self.sinks else None

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=self.dtype)

    def student(self) -> Rows:
        positions = range(self.keys - 2, -1, -self.step)
        at = torch.tensor(positions)
        first = torch.zeros_like(at) if self.window is None else (at - self.window + 1).clamp(min=0)
        last = torch.full_like(at, self.keys) if self.bucketing.bidirectional else at + 1
        return Rows(
            positions, torch.stack([first, last], 1), self.keys,
            query=self.randn(self.heads, len(at), 8), key=self.randn(self.heads // self.groups, self.keys, 8),
            scale=0.3, softcap=self.softcap, sinks=self.sink,
        )  # fmt: skip

    def source(self, student: Rows) -> Rows:
        """Its scores, made here without the strided view and the sums by bucket that are under test."""
        offset = torch.tensor(student.positions)[:, None] - torch.arange(self.keys)
        scores = student.content(self.dtype) + self.table[:, bucket_of(offset, self.bucketing)]
        return Rows(student.positions, student.seen, self.keys, scores=scores, sinks=self.sink)

    def pairs(self, windows: int) -> Pairs:
        students = [self.student() for _ in range(windows)]
        return [(self.source(student), student) for student in students]


def explicit_loss(table: Tensor, pairs: Pairs, bucketing: Bucketing) -> Tensor:
    """The mean KL per head by its definition, with no pull and no blocks."""
    total, count = torch.zeros(len(table), dtype=torch.double), 0
    for source, student in pairs:
        offset = torch.tensor(student.positions)[:, None] - torch.arange(student.keys)
        log_p, log_q = (
            torch.cat([s] if rows.sinks is None else [s, rows.sinks.view(-1, 1, 1).expand(-1, s.shape[1], 1)], -1)
            .log_softmax(-1)
            for rows, s in ((source, source.content(torch.double)),
                            (student, student.content(torch.double) + table[:, bucket_of(offset, bucketing)]))
        )  # fmt: skip
        p = log_p.exp()
        total = total + torch.where(p > 0, p * (log_p - log_q.masked_fill(p == 0, 0)), 0).sum((1, 2))
        count += p.shape[1]
    return total / count


BUCKETINGS = st.sampled_from([Bucketing(8, 20, False), Bucketing(12, 300, False), Bucketing(8, 20, True)])


@settings(max_examples=25, deadline=None)
@given(BUCKETINGS, st.sampled_from([None, 17]), st.booleans(), st.sampled_from([None, 2.0]), st.integers(0, 2**30))
def test_the_loss_and_its_derivatives(
    bucketing: Bucketing, window: int | None, sinks: bool, softcap: float | None, seed: int
) -> None:
    """In float64, against the KL by its definition, and the finite differences of it."""
    window = None if bucketing.bidirectional else window
    planted = Planted(bucketing, window=window, sinks=sinks, softcap=softcap, seed=seed)
    pairs = planted.pairs(2)
    target = target_of(pairs, bucketing, torch.float64)
    point = planted.randn(planted.heads, bucketing.num_buckets)

    def at(table: Tensor) -> Tensor:
        return explicit_loss(table, pairs, bucketing)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_module, "BLOCK", 4000)  # several blocks
        patch.setattr("rpb_retrofit.tables.fit.PULL", 0.0)
        patch.setattr("rpb_retrofit.tables.fit.GAUGE", 0.0)
        found = loss(point, target, [student for _, student in pairs], bucketing)
        torch.testing.assert_close(found.value, at(point), rtol=1e-9, atol=1e-9)
        step = 1e-5
        for bucket in range(bucketing.num_buckets):
            move = torch.zeros_like(point)
            move[:, bucket] = step
            slope = (at(point + move) - at(point - move)) / (2 * step)
            torch.testing.assert_close(found.gradient[:, bucket], slope, rtol=1e-6, atol=1e-8)
            ahead, behind = (
                loss(point + sign * move, target, [s for _, s in pairs], bucketing).gradient for sign in (1, -1)
            )
            torch.testing.assert_close(found.hessian[:, bucket], (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-7)


@settings(max_examples=15, deadline=None)
@given(BUCKETINGS, st.sampled_from([None, 40]), st.booleans(), st.integers(0, 2**30))
def test_a_planted_bias_is_recovered(bucketing: Bucketing, window: int | None, sinks: bool, seed: int) -> None:
    """To 1e-3 on the buckets that data fell into, each head's constant removed; with sinks the constant too."""
    window = None if bucketing.bidirectional else window
    planted = Planted(bucketing, keys=200, window=window, sinks=sinks, seed=seed, dtype=torch.float32)
    pairs = planted.pairs(6)
    found = fit(pairs, bucketing)
    visited = found.visits > 20  # what a handful of pairs say counts less than the pull of the neighbours
    ours, theirs = found.table[:, visited], planted.table[:, visited]
    if not sinks:
        ours, theirs = ours - ours.mean(1, keepdim=True), theirs - theirs.mean(1, keepdim=True)
    assert (ours - theirs).abs().max() < 1e-3
    assert found.after.max() < 1e-4 < found.before.min()
    offsets = [o for source, _ in pairs for p in source.positions for o in _seen_offsets(source, p)]
    assert (
        found.visits.tolist()
        == torch.bincount(bucket_of(torch.tensor(offsets), bucketing), minlength=bucketing.num_buckets).tolist()
    )


def _seen_offsets(rows: Rows, position: int) -> list[int]:
    first, last = rows.seen[rows.positions.index(position)].tolist()
    return [position - key for key in range(first, last)]


def test_unvisited_buckets_continue_their_neighbours() -> None:
    bucketing = Bucketing(16, 1000, False)
    planted = Planted(bucketing, keys=60, dtype=torch.float32)
    found = fit(planted.pairs(2), bucketing)
    empty = (found.visits == 0).nonzero()[:, 0].tolist()
    last = bucket_of(torch.tensor([58]), bucketing).item()
    assert empty == list(range(last + 1, 16)), "windows of 60 tokens never reach these"
    for bucket in empty:
        torch.testing.assert_close(found.table[:, bucket], found.table[:, last], rtol=0, atol=1e-3)


def test_hard_attention_does_not_derail_the_steps() -> None:
    """A source that always looks at the previous token, however far its scores are from zero."""
    bucketing = Bucketing(8, 20, False)
    planted = Planted(bucketing, dtype=torch.float32)
    planted.table[:] = 0
    planted.table[:, 1] = 25.0
    found = fit(planted.pairs(2), bucketing)
    assert found.after.max() < 0.02 < found.before.min()
    assert found.table.isfinite().all() and (found.table.argmax(1) == 1).all()
