"""How far a layer's attention is from the source's, as a function of its numbers, with derivatives.

For a head let ``p_i`` be the source's attention of query ``i`` and ``s_ij`` the score left once its mechanism is gone,
with the parameters of a `ParameterLayout` added: a table, a tail, factors on the content. The loss is the mean over
queries of ``KL(p_i || softmax_j s_ij)``. The numbers enter the scores linearly, so it is convex, and all that it asks
of the data are moments: the gradient is the mean of the fit's moments less the source's, the Hessian the mean
covariance of the features under the fit. They are sums over rows, which are read a block at a time.

Softmax ignores a constant, so the loss is flat along one direction per head (unless there are sinks): the answer is
the table of mean zero. A very weak pull of each bucket to its neighbours decides what the data leave open: a bucket
that no pair of tokens fell into continues the one before it. Factors are pulled to 1, a tail to none.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rpb_retrofit.runtime.buckets import Bucketing
from rpb_retrofit.tables.attention_rows import AttentionRows
from rpb_retrofit.tables.parameters import ParameterLayout

RowPairs = Iterable[tuple[AttentionRows, AttentionRows]]
"""Rows of the source's attention, and the same rows of the model without its mechanism. Read once per step."""

PULL = 1e-5
"""Weight of the squared difference of neighbouring buckets and of the squared slopes of a tail, beside the sum (not the
mean) of the KL over the rows."""

STIFFNESS = 1.0
"""Weight of the squared distance of each factor from 1, likewise."""

GAUGE = 1.0
"""Weight of the squared mean of a table, where a constant is free: picks one of the equal tables."""


class Target(NamedTuple):
    """What the fit needs to know of the source: the mean moments (heads, size) of its attention, the mean of
    ``sum_j p_ij (log p_ij - s_ij)`` (heads,), how many pairs of tokens fell into each bucket, how many rows there are,
    and whether a constant is free: not beside a sink, whose size is fixed. Moments are None where a soft cap bends the
    features, so that they have to be taken anew at each step."""

    moments: Tensor | None
    constant: Tensor
    visits: Tensor
    rows: int
    free: bool


class Loss(NamedTuple):
    """The mean KL (heads,) and, with the pull, the loss; its gradient (heads, size) and Hessian (heads, size, size), if
    it was asked for. With another `Term` beside the KL, both together, and what it measures by itself (heads,)."""

    kl: Tensor
    value: Tensor
    gradient: Tensor
    hessian: Tensor | None
    beside: Tensor | None = None


class Term(Protocol):
    """What may be minimised beside the KL: a mean over rows, too."""

    @property
    def share(self) -> float:
        """How much the KL counts."""

    def __call__(
        self, source_block: AttentionRows, student_block: AttentionRows, weights: Tensor, content: Tensor, curved: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Its value (heads,), gradient (heads, size) and, where it has to be ``curved``, Hessian (heads, size, size),
        float64, summed over the rows of a block. Weights and content scores (heads, R, K) are the student's."""


def target_of(pairs: RowPairs, layout: ParameterLayout, dtype: torch.dtype = torch.float32) -> Target:
    """Read all rows once for what does not depend on the numbers."""
    sums: list[Tensor] = []  # constant, moments, visits
    rows, free, bent = 0, True, False
    for source, student in pairs:
        for source_block, student_block in zip(source.blocks(), student.blocks(), strict=True):
            content = student_block.content(dtype)
            weights, relative = _against(source_block, content)
            free = free and source_block.sinks is None
            bent = bent or (student_block.softcap is not None and layout.num_factors > 0)
            seen = (content[:1] > -torch.inf).to(dtype)
            visits = source_block.masses(seen, layout.bucketing)
            moments = layout.moments(student_block, weights, content)
            new = [relative, *(x.sum(1, dtype=torch.double) for x in (moments, visits))]
            sums = [a + b for a, b in zip(sums, new, strict=True)] if sums else new
            rows += len(source_block.positions)
    constant, moments, visits = sums
    if free:  # a row's masses sum to one, but for rounding, which would push buckets that no pair fell into
        masses = layout.table(moments)
        masses *= rows / masses.sum(1, keepdim=True)
    return Target(None if bent else moments / rows, constant / rows, visits[0].round().long(), rows, free)


def _against(source_block: AttentionRows, scores: Tensor) -> tuple[Tensor, Tensor]:
    """The source's weights (heads, R, K), and ``sum p (log p - s)`` over the rows, (heads,) float64."""
    own = source_block.content(scores.dtype)
    normaliser = source_block.log_normaliser(own)
    log = own - normaliser[..., None]
    weights = log.exp()
    relative = torch.where(weights > 0, weights * (log - scores), 0).sum((1, 2), dtype=torch.double)
    if source_block.sinks is not None:  # the sink's own term: both models have the same
        relative -= ((source_block.sinks[:, None] - normaliser).exp() * normaliser).sum(1)
    return weights, relative


class _Sums(NamedTuple):
    """Over all rows: the loss (heads,), the moments (heads, size) and the Hessian (heads, size, size) of the KL, from
    ``curved`` rows, and what a `Term` gives beside it."""

    value: Tensor
    moments: Tensor
    hessian: Tensor
    curved: int
    beside: list[Tensor]


def _sums(
    numbers: Tensor, target: Target, pairs: RowPairs, layout: ParameterLayout, thin: int | None, term: Term | None
) -> _Sums:
    """Read all rows once."""
    heads, size = numbers.shape
    value, mean = target.constant.new_zeros(heads), target.constant.new_zeros(heads, size)
    hessian, count = target.constant.new_zeros(heads, size, size), 0
    beside = [torch.zeros_like(x) for x in (value, mean, hessian)]
    for source, student in pairs:
        for source_block, block in zip(source.blocks(), student.blocks(), strict=True):
            scores, content = layout.scores(block, numbers)
            normaliser = block.log_normaliser(scores)
            weights = (scores - normaliser[..., None]).exp_()
            moments = layout.moments(block, weights, content)
            value += normaliser.sum(1, dtype=torch.double)
            mean += moments.sum(1, dtype=torch.double)
            if term is not None:
                parts = term(source_block, block, weights, content, curved=thin is not None)
                beside = [a if b is None else a + b for a, b in zip(beside, parts, strict=True)]
            if thin is not None:
                some = slice(None, None, thin)
                part, moments = block.part(some), moments[:, some]
                hessian += layout.covariance(part, weights[:, some], content[:, some], moments)
                count += moments.shape[1]
            if target.moments is None:
                weights, relative = _against(source_block, scores)
                value += relative
                mean -= layout.moments(block, weights, content).sum(1, dtype=torch.double)
    return _Sums(value, mean, hessian, count, beside)


def loss(
    numbers: Tensor,
    target: Target,
    pairs: RowPairs,
    layout: ParameterLayout,
    thin: int | None = 1,
    term: Term | None = None,
) -> Loss:
    """The loss of numbers (heads, size) with its derivatives, float64; rows are computed in the dtype of the numbers.

    The Hessian is taken from one row in ``thin``, or left out. A ``term`` stands beside the KL.
    """
    sums = _sums(numbers, target, pairs, layout, thin, term)
    x, pull = numbers.double(), _pull(layout, target).to(numbers.device)
    value, mean = sums.value / target.rows, sums.moments / target.rows
    if target.moments is not None:
        if target.free:
            masses = layout.table(mean)
            masses /= masses.sum(1, keepdim=True)
        value += target.constant - (target.moments * x).sum(1)
        mean -= target.moments
    hessian = sums.hessian / sums.curved + pull if sums.curved else None
    own = Loss(value, value + ((x @ pull) * x).sum(1) / 2, mean + x @ pull, hessian)
    if term is None:
        return own
    other, gradient, curvature = (x / target.rows for x in sums.beside)
    return Loss(
        value,
        term.share * own.value + other,
        term.share * own.gradient + gradient,
        None if own.hessian is None else term.share * own.hessian + curvature,
        other,
    )


def _pull(layout: ParameterLayout, target: Target) -> Tensor:
    buckets, bias = layout.bucketing.num_buckets, layout.num_bias
    pull = torch.zeros(layout.size, layout.size, dtype=torch.double)
    pull[:buckets, :buckets] = neighbours(layout.bucketing) * (PULL / target.rows)
    if target.free:
        pull[:buckets, :buckets] += GAUGE / buckets**2
    diagonal = pull.diagonal()
    diagonal[buckets:bias] += PULL / target.rows
    diagonal[bias:] += STIFFNESS / target.rows
    return pull


def neighbours(bucketing: Bucketing) -> Tensor:
    """The matrix (buckets, buckets), float64, of the sum of squared differences between neighbouring buckets."""
    chain = list(range(bucketing.per_direction))
    if bucketing.bidirectional:  # from the farthest key after the query to the farthest before it
        chain = list(range(bucketing.num_buckets - 1, bucketing.per_direction - 1, -1)) + chain
    difference = torch.zeros(len(chain) - 1, len(chain), dtype=torch.double)
    for row, (a, b) in enumerate(pairwise(chain)):
        difference[row, a], difference[row, b] = -1.0, 1.0
    return difference.T @ difference
