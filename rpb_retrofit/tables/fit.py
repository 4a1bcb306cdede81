"""The fit of one layer: the table whose attention, on top of the content scores, is nearest to the source's.

For a head let ``p_i`` be the source's attention of query ``i`` and ``s_ij`` the content score that is left once its
mechanism is gone. Minimised is the mean over queries of ``KL(p_i || softmax_j(s_ij + u[bucket(i - j)]))`` over the
table ``u``. That is convex, and all that it asks of the data are bucket masses: with ``m_i`` those of the fit, the
gradient is the mean of ``m_i`` less the source's, the Hessian the mean of ``diag(m_i) - m_i m_i^T``. So each step of
Newton's method reads the rows once, a block at a time.

Softmax ignores a constant, so the loss is flat along one direction per head (unless there are sinks): the answer is
the table of mean zero. A very weak pull of each bucket to its neighbours decides what the data leave open: a bucket
that no pair of tokens fell into continues the one before it.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from rpb_retrofit.runtime.buckets import Bucketing
from rpb_retrofit.tables.rows import Rows

Pairs = Iterable[tuple[Rows, Rows]]
"""Rows of the source's attention, and the same rows of the model without its mechanism. Read once per step."""

PULL = 1e-5
"""Weight of the squared difference of neighbouring buckets, beside the sum (not the mean) of the KL over the rows."""

GAUGE = 1.0
"""Weight of the squared mean of a table, where a constant is free: picks one of the equal tables."""

STEPS, TOLERANCE = 20, 1e-7
"""Most Newton steps; a head is done once a step promises less than this many nats."""


class Target(NamedTuple):
    """What the fit needs to know of the source: the mean bucket masses (heads, buckets) of its attention, the mean of
    ``sum_j p_ij (log p_ij - s_ij)`` (heads,), how many pairs of tokens fell into each bucket, how many rows there are,
    and whether a constant is free: not beside a sink, whose size is fixed."""

    masses: Tensor
    constant: Tensor
    visits: Tensor
    rows: int
    free: bool


class Loss(NamedTuple):
    """The mean KL (heads,), with the pull; its gradient (heads, buckets) and Hessian (heads, buckets, buckets)."""

    value: Tensor
    gradient: Tensor
    hessian: Tensor


class Fit(NamedTuple):
    """A layer's table (heads, buckets), the mean KL per head of zeros and of the table, in nats, pairs of tokens by
    bucket, and the steps that it took."""

    table: Tensor
    before: Tensor
    after: Tensor
    visits: Tensor
    steps: int


def target_of(pairs: Pairs, bucketing: Bucketing, dtype: torch.dtype = torch.float32) -> Target:
    """Read all rows once for what does not depend on the table."""
    sums: list[Tensor] = []  # constant, masses, visits
    rows, free = 0, True
    for source, student in pairs:
        for theirs, ours in zip(source.blocks(), student.blocks(), strict=True):
            scores, content = theirs.content(dtype), ours.content(dtype)
            normaliser = theirs.log_normaliser(scores)
            log = scores - normaliser[..., None]
            weights = log.exp()
            constant = torch.where(weights > 0, weights * (log - content), 0).sum((1, 2), dtype=torch.double)
            if theirs.sinks is not None:  # the sink's own term: both models have the same
                free = False
                constant -= ((theirs.sinks[:, None] - normaliser).exp() * normaliser).sum(1)
            seen = (scores[:1] > -torch.inf).to(dtype)
            new = [constant, *(theirs.masses(x, bucketing).sum(1, dtype=torch.double) for x in (weights, seen))]
            sums = [a + b for a, b in zip(sums, new, strict=True)] if sums else new
            rows += len(theirs.positions)
    constant, masses, visits = sums
    if free:  # a row's masses sum to one, but for rounding, which would push buckets that no pair fell into
        masses = masses * (rows / masses.sum(1, keepdim=True))
    return Target(masses / rows, constant / rows, visits[0].round().long(), rows, free)


def loss(table: Tensor, target: Target, students: Iterable[Rows], bucketing: Bucketing) -> Loss:
    """The loss of a table (heads, buckets) with its derivatives, float64; rows are computed in the table's dtype."""
    heads, buckets = table.shape
    value, mean = target.constant.new_zeros(heads), target.constant.new_zeros(heads, buckets)
    square = target.constant.new_zeros(heads, buckets, buckets)
    for student in students:
        for block in student.blocks():
            scores = block.content(table.dtype).add_(block.bias(table, bucketing))
            normaliser = block.log_normaliser(scores)
            masses = block.masses(scores.sub_(normaliser[..., None]).exp_(), bucketing)
            value += normaliser.sum(1, dtype=torch.double)
            mean += masses.sum(1, dtype=torch.double)
            square += masses.transpose(1, 2) @ masses
    u = table.double()
    pull = (neighbours(bucketing) * (PULL / target.rows) + (GAUGE / buckets**2 if target.free else 0)).to(u)
    mean /= mean.sum(1, keepdim=True) if target.free else target.rows
    return Loss(
        value / target.rows + target.constant - (target.masses * u).sum(1) + ((u @ pull) * u).sum(1) / 2,
        mean - target.masses + u @ pull,
        torch.diag_embed(mean) - square / target.rows + pull,
    )


def neighbours(bucketing: Bucketing) -> Tensor:
    """The matrix (buckets, buckets), float64, of the sum of squared differences between neighbouring buckets."""
    chain = list(range(bucketing.per_direction))
    if bucketing.bidirectional:  # from the farthest key after the query to the farthest before it
        chain = list(range(bucketing.num_buckets - 1, bucketing.per_direction - 1, -1)) + chain
    difference = torch.zeros(len(chain) - 1, len(chain), dtype=torch.double)
    for row, (a, b) in enumerate(pairwise(chain)):
        difference[row, a], difference[row, b] = -1.0, 1.0
    return difference.T @ difference


def fit(pairs: Pairs, bucketing: Bucketing, dtype: torch.dtype = torch.float32) -> Fit:
    """The table of a layer, float32, by Newton's method with a step length per head."""
    target = target_of(pairs, bucketing, dtype)
    heads = len(target.constant)

    def evaluate(table: Tensor) -> Loss:
        return loss(table.to(dtype), target, (student for _, student in pairs), bucketing)

    table = target.constant.new_zeros(heads, bucketing.num_buckets)
    now = evaluate(table)
    before, steps = now.value, 0
    length = target.constant.new_ones(heads, 1)
    while steps < STEPS:
        direction = -torch.linalg.solve(now.hessian, now.gradient)
        promised = -(direction * now.gradient).sum(1) / 2
        if not (promised > TOLERANCE).any():
            # What is left is next to nothing in the loss but not in the table: the loss is flat here.
            table = table + direction
            break
        steps += 1
        there = table + length * direction
        new = evaluate(there)
        # Sufficient decrease, or a decrease that is lost in rounding; a head that gets worse tries a shorter step.
        better = new.value <= now.value - 1e-4 * length[:, 0] * promised + 1e-6
        table = torch.where(better[:, None], there, table)
        now = Loss(*(torch.where(better.view(-1, *[1] * (a.dim() - 1)), a, b) for a, b in zip(new, now, strict=True)))
        length = torch.where(better[:, None], (length * 4).clamp(max=1), length / 4)
    return Fit(table.float(), before, now.value, target.visits, steps)
