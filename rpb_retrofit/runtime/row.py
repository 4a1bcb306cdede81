"""Attention of one query a head, as in decoding: one call of PyTorch's attention, with a bias for each key."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .line import Bias, line_of
from .tracing import traced


def attend_row(query: Tensor, key: Tensor, value: Tensor, matrix: Tensor, scale: float) -> Tensor:
    """One query a head; ``matrix`` (1 or batch, heads, 1, K) is its bias."""
    grouped = query.shape[1] != key.shape[1]
    if query.device.type == "cpu":  # takes a float32 mask beside half-precision queries, and gives zeros for nothing
        matrix = matrix.double() if query.dtype == torch.float64 else matrix
        return F.scaled_dot_product_attention(query, key, value, attn_mask=matrix, scale=scale, enable_gqa=grouped)
    rounded = matrix.clamp(min=torch.finfo(query.dtype).min).to(query.dtype)
    if grouped:  # the heads of a group as its queries: their keys are read once
        query, rounded = (x.reshape(len(x), key.shape[1], -1, x.shape[-1]) for x in (query, rounded))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=rounded, scale=scale)
    return out.reshape(len(out), -1, 1, value.shape[-1]) * (matrix > -torch.inf).any(-1, keepdim=True)


def decode(query: Tensor, key: Tensor, value: Tensor, bias: Bias, scale: float) -> Tensor | None:
    """`attention` of one query behind all its keys, with nothing to hide: (batch, 1, heads, d_v), the short way.

    None where it is not one query, or has a gradient, or is compiled or cast, or does not fit. It leaves out whatever
    `attention` does for everybody else, since it runs in each layer at every token, where each line of Python shows.
    """
    batch, heads, queries, width = query.shape
    device = query.device
    if queries != 1 or torch.is_grad_enabled() or traced(query):
        return None
    if torch.is_autocast_enabled(device.type):
        return None
    groups, keys = key.shape[1], key.shape[2]
    row = line_of(bias, keys - 1, keys, device)
    if row.shape[0] != heads:
        return None
    if device.type != "cpu" or batch * groups < torch.get_num_threads() or query.dtype == torch.float64:
        return attend_row(query, key, value, row[None, :, None], scale).transpose(1, 2).contiguous()
    # The heads of a group stand as its queries, so that their keys are read once.
    query, row = query.reshape(batch, groups, -1, width), row.view(1, groups, -1, keys)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=row, scale=scale).reshape(batch, 1, heads, -1)
