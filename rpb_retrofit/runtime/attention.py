"""Attention with a bias of the offset. Nothing here knows where the bias comes from: it is any function of ``i - j``.

A bias of the offset is a vector, never an N x N tensor. Take the queries in reverse order, and row ``r`` of the bias
matrix is the slice ``line[r : r + K]`` of one vector of length ``Q + K - 1``: a zero-copy Hankel view, which
scaled-dot-product attention takes as its mask. Only a padding mask or a gradient for the bias makes it a real tensor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Bias = Callable[[Tensor], Tensor]
"""Offsets (n,) int64 -> bias (heads, n) float32."""


def reversed_bias(
    bias: Bias, queries: int, keys: int, first_offset: int | Tensor, causal: bool, device: torch.device
) -> Tensor:
    """The bias of ``queries`` x ``keys`` as a view (heads, queries, keys), float32, with the queries in reverse order.

    ``first_offset`` is the offset of the first query and the first key. With ``causal``, keys after the query get the
    lowest finite number: a row without any allowed key stays finite, as in Transformers' masks.
    """
    offset = first_offset + (queries - 1) - torch.arange(queries + keys - 1, device=device)
    line = bias(offset)
    if causal:
        line = line.masked_fill(offset < 0, torch.finfo(line.dtype).min)
    return line.unfold(1, keys, 1)


def bias_matrix(bias: Bias, queries: int, keys: int, first_offset: int | Tensor, device: torch.device) -> Tensor:
    """The bias of every (query, key) pair as a tensor (heads, queries, keys), float32, queries in order."""
    return reversed_bias(bias, queries, keys, first_offset, False, device).flip(1)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Bias,
    *,
    scale: float,
    causal: bool,
    mask: Tensor | None = None,
    first_offset: int | Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    need_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention whose scores are ``scale * q k^T`` plus ``bias(i - j)``.

    Args:
        query: (batch, heads, Q, d). The bias must have as many heads.
        key, value: (batch, key-value heads, K, d) and (batch, key-value heads, K, d_v); heads are grouped if fewer.
        bias: maps offsets to (heads, n); added after scaling, and after the soft cap where there is one.
        scale: factor of the content term.
        causal: whether keys after the query are hidden. Only used where ``mask`` is None: a mask holds causality.
        mask: (batch or 1, 1 or heads, Q, K); boolean, True where allowed, or additive floating point.
        first_offset: offset of the first query and first key; by default the last query and key coincide.
        softcap: ``c * tanh(score / c)`` on the content term (Gemma 2).
        sinks: (heads,) one logit per head that takes part in the softmax and has no value (GPT-OSS).
        dropout: probability, applied to the attention weights.
        need_weights: also return the weights (batch, heads, Q, K).

    Returns:
        The output, (batch, heads, Q, d_v), and the weights or None.
    """
    queries, keys = query.shape[2], key.shape[2]
    if first_offset is None:
        first_offset = keys - queries
    hidden = causal and mask is None
    matrix = reversed_bias(bias, queries, keys, first_offset, hidden, query.device)[None]
    if mask is not None:
        mask = mask.flip(2)
        if mask.dtype == torch.bool:
            matrix = torch.where(mask, matrix, torch.finfo(matrix.dtype).min)
        else:  # a mask's lowest number plus a negative bias must not become minus infinity
            matrix = (matrix + mask.float()).clamp(min=torch.finfo(matrix.dtype).min)
    query = query.flip(2)
    if softcap is None and sinks is None and not need_weights:
        # The CPU kernels take a float32 mask beside half-precision queries; others want one dtype.
        if query.device.type != "cpu" and matrix.dtype != query.dtype:
            matrix = matrix.clamp(min=torch.finfo(query.dtype).min).to(query.dtype)
        grouped = key.shape[1] != query.shape[1]
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=matrix, dropout_p=dropout, scale=scale, enable_gqa=grouped
        )
        return out.flip(2), None
    out, weights = _explicit(query, key, value, matrix, scale, softcap, sinks, dropout)
    return out.flip(2), weights.flip(2) if need_weights else None


def _explicit(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    matrix: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """The same in plain operations, for what no fused kernel offers: soft caps, sinks, weights."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query @ key.transpose(2, 3)).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + matrix
    if sinks is not None:
        sink = sinks.float().view(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    weights = weights.to(value.dtype)
    return F.dropout(weights, dropout) @ value, weights
