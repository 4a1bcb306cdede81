"""Attention with any bias of the offset by FlexAttention: for a GPU where the bias has no constant end, or with a mask.

The bias is looked up in its vector; no bucket is computed in the kernel. Its gradient is summed by atomics there, so it
is not used where deterministic algorithms are asked for.

Source: Dong et al. 2024, arXiv:2412.05496, and ``torch/nn/attention/flex_attention.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from .visibility import is_runs


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=False)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    line: Tensor,
    mask: Tensor | None,
    first_offset: int,
    lowest: int | None,
    highest: int | None,
    scale: float,
) -> Tensor:
    """Output (batch, heads, Q, d_v); ``line`` and what is seen are as in `blockwise`, with gradients of all tensors."""
    queries, keys = query.shape[2], key.shape[2]

    def biased(score: Tensor, batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + line[head, queries - 1 - i + j]

    seen = _seen(mask, first_offset, lowest, highest)
    rows = None if mask is None else len(query)
    heads = None if mask is None or mask.shape[1] == 1 else query.shape[1]
    block_mask = None if seen is None else create_block_mask(seen, rows, heads, queries, keys, query.device)
    run = _compiled() if query.device.type == "cuda" and not torch.compiler.is_compiling() else flex_attention
    grouped = key.shape[1] != query.shape[1]
    return run(query, key, value, score_mod=biased, block_mask=block_mask, scale=scale, enable_gqa=grouped)


def _seen(
    mask: Tensor | None, first_offset: int, lowest: int | None, highest: int | None
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None:
    """Which (batch, head, query, key) are seen; None: all."""
    if mask is None and lowest is None and highest is None:
        return None

    def by_rule(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        offset = first_offset + i - j
        seen = offset >= lowest if lowest is not None else offset == offset
        return seen & (offset <= highest) if highest is not None else seen

    if mask is None:
        return by_rule
    one_row, one_head, given = len(mask) == 1, mask.shape[1] == 1, mask

    def by_mask(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        row, of = (batch * 0 if one_row else batch), (head * 0 if one_head else head)
        if is_runs(given):
            return (j >= given[row, of, i, 0]) & (j < given[row, of, i, 1])
        return given[row, of, i, j]

    return by_mask
