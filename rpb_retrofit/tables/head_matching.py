"""Which head of another checkpoint serves each head best: whose table brings its attention nearest to the source's."""

from __future__ import annotations

import torch
from torch import Tensor

from rpb_retrofit.tables.fit import Fit
from rpb_retrofit.tables.loss import RowPairs, loss, target_of
from rpb_retrofit.tables.parameters import ParameterLayout
from rpb_retrofit.tables.table_spec import Start


def match_heads(
    pairs: RowPairs, layout: ParameterLayout, start: Start, dtype: torch.dtype = torch.float32
) -> tuple[Fit, list[int]]:
    """The best of the heads of ``start`` for each head of a layer, as if fitted, and which one it is.

    A head may serve several. One step is one candidate that was tried.
    """
    slopes = torch.zeros(len(start.table), layout.bucketing.directions) if start.slopes is None else start.slopes
    target = target_of(pairs, layout, dtype)
    heads = len(target.constant)
    candidates = torch.cat([start.table, slopes], 1) if layout.tail else start.table
    candidates = candidates.to(target.constant.device)  # where the model is

    def divergence(numbers: Tensor) -> Tensor:
        return loss(numbers.to(dtype).expand(heads, -1), target, pairs, layout).kl

    after = torch.stack([divergence(candidate) for candidate in candidates])
    best, chosen = after.min(0)
    before = divergence(candidates.new_zeros(layout.size))
    return Fit(candidates[chosen].float(), before, best, target.visits, len(candidates)), chosen.tolist()
