"""What the gradients of `blockwise_gradients` and `fused` share."""

from __future__ import annotations

import torch
from torch import Tensor


def inner_products(grad: Tensor, out: Tensor, dtype: torch.dtype, rows: int) -> Tensor:
    """``grad . out`` of each query, (batch, heads, Q) from (batch, heads, Q, d), computed in ``dtype``.

    In parts of ``rows`` queries: the whole product would be one more tensor as large as the output.
    """
    parts = zip(grad.split(rows, 2), out.split(rows, 2), strict=True)
    return torch.cat([(g.to(dtype) * o.to(dtype)).sum(-1) for g, o in parts], 2)
