"""The fit of one layer: its derivatives, a planted answer, and what it does where the data say nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rpb_retrofit.runtime import factor
from rpb_retrofit.runtime.buckets import Bucketing, bucket_of
from rpb_retrofit.tables import loss as loss_module
from rpb_retrofit.tables.attention_rows import AttentionRows
from rpb_retrofit.tables.fit import fit
from rpb_retrofit.tables.loss import RowPairs, loss, target_of
from rpb_retrofit.tables.parameters import ParameterLayout
from tests.support.planted import BUCKETINGS, FORMS, Planted, exactly, explicit_scores


def explicit_loss(numbers: Tensor, pairs: RowPairs, layout: ParameterLayout) -> Tensor:
    """The mean KL per head by its definition, with no pull and no blocks."""
    total, count = torch.zeros(len(numbers), dtype=torch.double), 0
    for source, student in pairs:
        log_p, log_q = (
            torch.cat([s] if rows.sinks is None else [s, rows.sinks.view(-1, 1, 1).expand(-1, s.shape[1], 1)], -1)
            .log_softmax(-1)
            for rows, s in (
                (source, source.content(torch.double)),
                (student, explicit_scores(student, layout, numbers)),
            )
        )  # fmt: skip
        p = log_p.exp()
        total = total + torch.where(p > 0, p * (log_p - log_q.masked_fill(p == 0, 0)), 0).sum((1, 2))
        count += p.shape[1]
    return total / count


@settings(max_examples=40, deadline=None)
@given(FORMS, st.sampled_from([None, 17]), st.booleans(), st.sampled_from([None, 2.0]), st.integers(0, 2**30))
def test_the_loss_and_its_derivatives(
    layout: ParameterLayout, window: int | None, sinks: bool, softcap: float | None, seed: int
) -> None:
    """In float64, against the KL by its definition, and the finite differences of it."""
    window = None if layout.bucketing.bidirectional else window
    planted = Planted(layout, window=window, sinks=sinks, softcap=softcap, seed=seed)
    pairs = planted.pairs(2)
    point = planted.randn(planted.heads, layout.size) / 2
    step = 1e-5
    with pytest.MonkeyPatch.context() as patch:
        exactly(patch)
        target = target_of(pairs, layout, torch.float64)
        result = loss(point, target, pairs, layout)
        torch.testing.assert_close(result.value, explicit_loss(point, pairs, layout), rtol=1e-9, atol=1e-9)
        for number in range(layout.size):
            move = torch.zeros_like(point)
            move[:, number] = step
            ahead, behind = (explicit_loss(point + sign * move, pairs, layout) for sign in (1, -1))
            torch.testing.assert_close(result.gradient[:, number], (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-8)
            if target.moments is None:
                continue  # a soft cap over factors: the Hessian is Gauss and Newton's
            ahead, behind = (loss(point + sign * move, target, pairs, layout).gradient for sign in (1, -1))
            torch.testing.assert_close(result.hessian[:, number], (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-7)
        assert torch.linalg.eigvalsh(result.hessian).min() > -1e-9, "convex"


def test_a_large_mean_of_the_keys_leaves_the_curvature() -> None:
    """Keys share a large mean in real models: the float32 curvature must not drown in it."""
    layout = ParameterLayout(Bucketing(8, 20, False), pairs=factor.RotaryPairs("half", 0, 4))
    planted = Planted(layout, dtype=torch.float32)
    pairs = planted.pairs(2)
    point = torch.zeros(planted.heads, layout.size)
    want = loss(point.double(), target_of(pairs, layout, torch.float64), pairs, layout).hessian
    moved = [(source, replace(student, key=student.key + 300)) for source, student in pairs]
    curvature = loss(point, target_of(moved, layout), moved, layout).hessian
    torch.testing.assert_close(curvature[:, 8:, 8:], want[:, 8:, 8:], rtol=0.05, atol=2e-3)
    assert torch.linalg.eigvalsh(curvature).min() > 0


@settings(max_examples=10, deadline=None)
@given(FORMS.filter(lambda layout: layout.pairs is not None), st.sampled_from([None, 2.0]), st.integers(0, 2**30))
def test_planted_factors_are_recovered(layout: ParameterLayout, softcap: float | None, seed: int) -> None:
    """Factors, tail and table together: the attention is the source's again."""
    planted = Planted(layout, keys=400, softcap=softcap, seed=seed, dtype=torch.float32)
    layout.slopes(planted.numbers).abs_().neg_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "STIFFNESS", 1e-6)
        result = fit(planted.pairs(3), layout)
    assert result.after.max() < 1e-3 < 0.01 < result.before.min()
    torch.testing.assert_close(layout.factor(result.numbers), layout.factor(planted.numbers), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("bucketing", [Bucketing(8, 20, False), Bucketing(8, 20, True)])
def test_a_tail_that_would_rise_stays_flat(bucketing: Bucketing) -> None:
    """The best among the tails that do not rise: no number that may move would lower the loss (KKT)."""
    layout = ParameterLayout(bucketing, tail=True)
    planted = Planted(layout, keys=200)
    slopes = layout.slopes(planted.numbers)
    slopes[:] = torch.tensor([0.7, -0.7]).repeat(len(slopes))[: len(slopes), None]
    pairs = planted.pairs(2)
    result = fit(pairs, layout, torch.float64)
    got = layout.slopes(result.numbers)
    assert bool((got[slopes > 0] == 0).all() and (got[slopes < 0] < -0.3).all())
    gradient = loss(result.numbers.double(), target_of(pairs, layout, torch.float64), pairs, layout).gradient
    rising = layout.slopes(gradient)[slopes > 0]
    assert bool((rising < -1e-3).all()), "the data ask for a rise"
    layout.slopes(gradient)[slopes > 0] = 0
    assert gradient.abs().max() < 1e-5


@settings(max_examples=15, deadline=None)
@given(BUCKETINGS, st.sampled_from([None, 40]), st.booleans(), st.integers(0, 2**30))
def test_a_planted_bias_is_recovered(bucketing: Bucketing, window: int | None, sinks: bool, seed: int) -> None:
    """To 1e-3 on the buckets that data fell into, each head's constant removed; with sinks the constant too."""
    window = None if bucketing.bidirectional else window
    layout = ParameterLayout(bucketing)
    planted = Planted(layout, keys=200, window=window, sinks=sinks, seed=seed, dtype=torch.float32)
    pairs = planted.pairs(6)
    result = fit(pairs, layout)
    visited = result.visits > 20  # what a handful of pairs say counts less than the pull of the neighbours
    fitted, wanted = result.numbers[:, visited], planted.numbers[:, visited]
    if not sinks:
        fitted, wanted = (x - x.mean(1, keepdim=True) for x in (fitted, wanted))
    assert (fitted - wanted).abs().max() < 1e-3
    assert result.after.max() < 1e-4 < result.before.min()
    offsets = [o for source, _ in pairs for p in source.positions for o in _seen_offsets(source, p)]
    assert (
        result.visits.tolist()
        == torch.bincount(bucket_of(torch.tensor(offsets), bucketing), minlength=bucketing.num_buckets).tolist()
    )


def _seen_offsets(rows: AttentionRows, position: int) -> list[int]:
    first, last = rows.seen[rows.positions.index(position)].tolist()
    return [position - key for key in range(first, last)]


def test_unvisited_buckets_continue_their_neighbours() -> None:
    bucketing = Bucketing(16, 1000, False)
    planted = Planted(ParameterLayout(bucketing, tail=True), keys=60, dtype=torch.float32)
    result = fit(planted.pairs(2), planted.layout)
    empty = (result.visits == 0).nonzero()[:, 0].tolist()
    last = bucket_of(torch.tensor([58]), bucketing).item()
    assert empty == list(range(last + 1, 16)), "windows of 60 tokens never reach these"
    for bucket in empty:
        torch.testing.assert_close(result.numbers[:, bucket], result.numbers[:, last], rtol=0, atol=1e-3)
    assert planted.layout.slopes(result.numbers).abs().max() < 1e-6, "nothing says how a tail would fall"


def test_hard_attention_does_not_derail_the_steps() -> None:
    """A source that always looks at the previous token, however far its scores are from zero."""
    bucketing = Bucketing(8, 20, False)
    planted = Planted(ParameterLayout(bucketing), dtype=torch.float32)
    planted.numbers[:] = 0
    planted.numbers[:, 1] = 25.0
    result = fit(planted.pairs(2), planted.layout)
    assert result.after.max() < 0.02 < result.before.min()
    assert result.numbers.isfinite().all() and (result.numbers.argmax(1) == 1).all()
