"""The second act of a fit: the numbers with which a layer's heads hand on what the source's heads hand on.

The KL of `fit` counts each unit of attention alike. But attention to a key matters by its value: much of it rests on
tokens whose values say next to nothing (sinks), and what is moved between two keys with like values is not missed. So
from the fit of the attention on, what is minimised is the squared distance of each head's output from the source's, as
the layer that reads it sees it, over the variance of the source's; with a tenth of the KL beside it, which holds what
the outputs leave open.

For weights ``w`` of a row, values ``v`` and features ``f`` the output ``o`` has the derivative ``sum_j w_j f_j
(v_j - o)``. Its product with a vector is one row of moments, of the weights times ``(v_j - o) . vector``: with the
residual as the vector that is the gradient, and with random signs it is a sample of Gauss and Newton's matrix
(Hutchinson 1990, "A stochastic estimator of the trace"), of which every row gives one, the same at every step. So
nothing is needed here but what a `ParameterLayout` knows already.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rpb_retrofit.tables.attention_rows import AttentionRows
from rpb_retrofit.tables.fit import Fit, fit
from rpb_retrofit.tables.loss import RowPairs, loss, target_of
from rpb_retrofit.tables.newton import Pace, newton
from rpb_retrofit.tables.parameters import ParameterLayout

SHARE = 0.1
"""Weight of the KL in nats beside the missed share of the outputs' variance."""

ROUNDING = 1e-6
"""Of a metric's mean diagonal: keeps its root where directions count for nothing."""

TINY = 1e-30
"""What counts as no variance at all."""

START = 0.02
"""The attention is fitted first, roughly: until a step promises less than this share of the KL that is left."""

STEPS = Pace(6, 1e-4, stale=True, rough=0.005)
"""The second act's; with factors, whose covariance under the KL is dear, that is taken from one row in four."""


@dataclass(frozen=True)
class Outputs:
    """The squared distance of a layer's outputs from the source's, over their variance: a `Term` of the loss.

    ``metric`` (heads, v, v) measures distances, ``root`` times its transpose is it; ``weight`` (heads,) is one over the
    variance, or nothing for a head whose outputs do not vary. All float64.
    """

    layout: ParameterLayout
    metric: Tensor
    root: Tensor
    weight: Tensor
    share: float = SHARE

    @classmethod
    def of(cls, pairs: RowPairs, layout: ParameterLayout, metric: Tensor | None) -> Outputs | None:
        """For rows measured by a ``metric`` (heads, v, v), or in plain squares; None where they hold no outputs."""
        rows, total, products = 0, torch.zeros(()), torch.zeros(())
        for source, student in pairs:
            if source.output is None or student.value is None:
                return None
            own = source.output.double()
            rows += own.shape[1]
            total, products = total.to(own) + own.sum(1), products.to(own) + own.mT @ own
        one = torch.eye(total.shape[-1]).to(total)
        metric = one.expand(len(total), -1, -1) if metric is None else metric.to(total)
        metric = metric / metric.diagonal(dim1=1, dim2=2).mean(1).clamp(min=TINY)[:, None, None] + ROUNDING * one
        mean = total / rows
        covariance = products / rows - mean[:, :, None] * mean[:, None]
        variance = (metric * covariance).sum((1, 2))
        weight = torch.where(variance > TINY, 1 / variance.clamp(min=TINY), 0)
        return cls(layout, metric, torch.linalg.cholesky(metric), weight)

    def __call__(
        self, source_block: AttentionRows, student_block: AttentionRows, weights: Tensor, content: Tensor, curved: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As of `Term`."""
        assert source_block.output is not None
        output = student_block.attended(weights)
        residual = output - source_block.output.to(output)
        measured = residual @ self.metric.to(output)
        slope = self._moved(student_block, weights, content, output, measured)
        hessian = None
        if curved:
            coins = torch.Generator().manual_seed(student_block.positions[0])
            signs = torch.randint(2, output.shape, generator=coins).to(output) * 2 - 1
            sample = self._moved(student_block, weights, content, output, signs @ self.root.mT.to(output))
            hessian = 2 * sample.mT @ sample * self.weight[:, None, None]
        return (
            (measured * residual).sum((1, 2), dtype=torch.double) * self.weight,
            2 * slope.sum(1) * self.weight[:, None],
            hessian,
        )

    def _moved(
        self, student_block: AttentionRows, weights: Tensor, content: Tensor, output: Tensor, vector: Tensor
    ) -> Tensor:
        """How the product (heads, R) of outputs and vectors (heads, R, v) moves with each number: (heads, R, size),
        float64."""
        assert student_block.value is not None
        along = student_block.ungrouped(student_block.grouped(vector) @ student_block.value.to(vector).mT)
        change = weights * (along - (output * vector).sum(-1, keepdim=True))
        return self.layout.moments(student_block, change, content).double()


def fit_outputs(
    pairs: RowPairs, layout: ParameterLayout, metric: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Fit:
    """The numbers of a layer whose outputs are nearest to the source's, from a fit of the attention on.

    ``metric`` (heads, v, v) says how near, as `reader.metrics` finds it; without it each dimension counts alike. Where
    a model hands out nothing but attention weights, the fit of those.
    """
    if (outputs := Outputs.of(pairs, layout, metric)) is None:
        return fit(pairs, layout, dtype)
    target = target_of(pairs, layout, dtype)
    fitted = fit(pairs, layout, dtype, target, START)
    numbers, first, last, steps = newton(
        lambda x, thin: loss(x.to(dtype), target, pairs, layout, thin, outputs),
        fitted.numbers.double(),
        STEPS._replace(thin=4) if layout.num_factors else STEPS,
        layout.falling,
    )
    assert first.beside is not None and last.beside is not None
    return fitted._replace(
        numbers=numbers.float(),
        after=last.kl,
        steps=fitted.steps + steps,
        missed=(first.beside, last.beside),
    )
