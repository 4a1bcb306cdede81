"""The dense way of `attention`: a bias for every pair of a block of queries, in plain operations, which is slow."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

DENSE_BLOCK = 256
"""Queries per block."""


def combined(matrix: Tensor, mask: Tensor) -> Tensor:
    """A bias and a mask, boolean or additive, as one."""
    if mask.dtype == torch.bool:
        return torch.where(mask, matrix, -torch.inf)
    # A mask's lowest number plus a negative bias stays finite.
    return (matrix + mask.float()).clamp(min=torch.finfo(matrix.dtype).min)


def attend_dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    matrix_of: Callable[[int, int], Tensor],
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float,
    need_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """Output (batch, heads, Q, d_v) and, if asked for, weights (batch, heads, Q, K), a block of queries at a time.

    ``matrix_of`` gives the bias (batch or 1, heads, end - start, K) of the queries ``start .. end - 1``; ``mask`` is
    boolean or floating point. Blocks are computed again in the backward pass.
    """
    queries = query.shape[2]
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    outs, weights = [], []
    # A traced graph serves other lengths too, so it must not keep how many blocks there were.
    size = queries if torch.jit.is_tracing() else DENSE_BLOCK
    again = torch.is_grad_enabled() and queries > size and not need_weights and not torch.compiler.is_compiling()
    for start in range(0, queries, size):
        end = min(start + size, queries)
        part = None if mask is None else mask[:, :, start:end]
        matrix = partial(matrix_of, start, end)
        arguments = (query[:, :, start:end], key, value, matrix, part, scale, softcap, sinks, dropout)
        out, weight = checkpoint(_explicit, *arguments, use_reentrant=False) if again else _explicit(*arguments)
        outs.append(out)
        if need_weights:
            weights.append(weight)
    return torch.cat(outs, 2), torch.cat(weights, 2) if need_weights else None


def _explicit(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    matrix_of: Callable[[], Tensor],
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """Output and weights of one block."""
    matrix = matrix_of()
    scores = (query @ key.transpose(2, 3)).to(matrix.dtype) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + (matrix if mask is None else combined(matrix, mask))
    if sinks is not None:
        sink = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    else:
        nothing = (scores == -torch.inf).all(-1, keepdim=True)  # whose softmax would be no number
        weights = scores.masked_fill(nothing, 0).softmax(-1).masked_fill(nothing, 0)
    weights = weights.to(value.dtype)
    return F.dropout(weights, dropout) @ value, weights
