"""The fit of one layer: the numbers with which its attention is nearest to the source's.

The loss is convex (see `loss`), so Newton's method ends where it is least. A tail may fall with the distance, not rise:
its slopes are kept at or below zero, by projecting the steps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rpb_retrofit.tables.loss import RowPairs, Target, loss, target_of
from rpb_retrofit.tables.newton import Pace, newton
from rpb_retrofit.tables.parameters import ParameterLayout

BIAS, FACTORS = Pace(20, 1e-7), Pace(16, 1e-4, thin=4, stale=True)
"""For tables and tails alone, and with factors, whose covariance is dear."""


class Fit(NamedTuple):
    """A layer's numbers (heads, size), float32; per head the mean KL of a zero table and of the fit, in nats; pairs of
    tokens by bucket; the steps that it took; and, per head, the share of the variance of the source's outputs that the
    fit misses, before they were fitted and after, where they were."""

    numbers: Tensor
    before: Tensor
    after: Tensor
    visits: Tensor
    steps: int
    missed: tuple[Tensor, Tensor] | None = None


def fit(
    pairs: RowPairs,
    layout: ParameterLayout,
    dtype: torch.dtype = torch.float32,
    target: Target | None = None,
    rough: float = 0.0,
) -> Fit:
    """The numbers of a layer, by Newton's method with a step length per head; the bias goes first, alone.

    ``target``: of these pairs and this layout, where it is known. It may end as soon as a step promises each head less
    than the share ``rough`` of its loss.
    """
    target = target_of(pairs, layout, dtype) if target is None else target
    plain = ParameterLayout(layout.bucketing, layout.tail)
    if target.moments is None:
        known = target_of(pairs, plain, dtype)
    else:
        known = target._replace(moments=target.moments[:, : plain.size])
    zeros = target.constant.new_zeros(len(target.constant), plain.size)
    numbers, first, last, steps = newton(
        lambda x, thin: loss(x.to(dtype), known, pairs, plain, thin), zeros, BIAS._replace(rough=rough), layout.falling
    )
    if layout.num_factors:
        numbers, _, last, more = newton(
            lambda x, thin: loss(x.to(dtype), target, pairs, layout, thin),
            torch.nn.functional.pad(numbers, (0, 2 * layout.num_factors)),
            FACTORS._replace(rough=rough),
            layout.falling,
        )
        steps += more
    return Fit(numbers.float(), first.kl, last.kl, target.visits, steps)
