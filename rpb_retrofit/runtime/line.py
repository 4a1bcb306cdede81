"""A bias of the offset as a line, its values by descending offset, and as a matrix. Nothing here, nor in `attention`,
knows where a bias comes from: it is any function of ``i - j``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Bias = Callable[[Any], Tensor]
"""Offsets, a Tensor (n,) of int64, to the bias, (heads, n) float32. Two attributes, where it has them, make it cheaper:
``constant_beyond``, (before, start): it is one constant per head at offsets up to ``before`` and one from ``start`` on
(None: no such end), so gradients need only their sums there; ``takes_range``: consecutive descending offsets may also
come as a range, so nothing needs to be computed for each of them."""


def line_of(bias: Bias, top: int | Tensor, count: int, device: torch.device) -> Tensor:
    """The bias of the offsets ``top, top - 1, ...``: (heads, count), float32."""
    graph = torch.compiler.is_compiling() or torch.jit.is_tracing()  # which would keep these very offsets
    if getattr(bias, "takes_range", False) and isinstance(top, int) and not graph:
        return bias(range(top, top - count, -1))
    return bias(top - torch.arange(count, device=device))


def hide(line: Tensor, top: int | Tensor, lowest: int | None, highest: int | None) -> Tensor:
    """A line, whose first offset is ``top``, with minus infinity outside the offsets ``lowest .. highest``."""
    offset = top - torch.arange(line.shape[1], device=line.device)
    if lowest is not None:
        line = line.masked_fill(offset < lowest, -torch.inf)
    if highest is not None:
        line = line.masked_fill(offset > highest, -torch.inf)
    return line


def reversed_bias(bias: Bias, queries: int, keys: int, first_offset: int | Tensor, device: torch.device) -> Tensor:
    """The bias of ``queries`` x ``keys`` as a view (heads, queries, keys), float32, with the queries in reverse order.

    ``first_offset`` is the offset of the first query and the first key.
    """
    return line_of(bias, first_offset + (queries - 1), queries + keys - 1, device).unfold(1, keys, 1)


def bias_matrix(bias: Bias, queries: int, keys: int, first_offset: int | Tensor, device: torch.device) -> Tensor:
    """The bias of every (query, key) pair as a tensor (heads, queries, keys), float32, queries in order."""
    return reversed_bias(bias, queries, keys, first_offset, device).flip(1)


def bias_at(bias: Bias, query: Tensor, key: Tensor) -> Tensor:
    """The bias of every pair of a position in ``query`` (rows, Q) and one in ``key`` (rows, K), integers: a tensor
    (rows, heads, Q, K), float32."""
    offset = query[:, :, None] - key[:, None, :]
    return bias(offset.flatten()).unflatten(1, offset.shape).transpose(0, 1)
