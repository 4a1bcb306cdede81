"""The gradients of `blockwise`: those of queries, keys and values by PyTorch's flash kernels for CPU, that of the bias
by sums along diagonals.

The bias' gradient is the sum of ``dS = P * (dP - delta)`` along each diagonal. Each row of ``dS`` sums to zero, so
where the bias is constant beyond some offset only the band before it is computed, and the constant's gradient is
minus the sum of the others. No atomics: equal bits in every run with the same number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .blockwise import Block, BlockwiseCall
from .gradients import inner_products
from .visibility import Piece

_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

BACKWARD_QUERIES = 768
"""Queries per block, of many keys."""

BACKWARD_KEYS = 4096
"""Keys at a time in the backward pass: its gradients of keys and values come as new tensors."""

TILE = 256
"""Queries of a tile where the bias' gradient is computed; it has twice as many keys."""


@dataclass(frozen=True)
class Upstream:
    """What the backward pass starts from: the output's gradient, the output, its log-sum-exp and ``grad . out``."""

    grad: Tensor
    out: Tensor
    lse: Tensor
    delta: Tensor


def backward(
    call: BlockwiseCall,
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    constant_before: int | None,
    constant_from: int | None,
    need_line: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, and of the line (zeros if not needed).

    The gradient of all offsets from ``constant_from`` on comes in one entry of the line, as that of all offsets up to
    ``constant_before``: whatever the line was made from, it does not tell them apart.
    """
    dquery, dkey, dvalue = (torch.zeros_like(x) for x in (call.query, call.key, call.value))
    for piece in call.plan.pieces:
        for block in call.blocks(piece, call.line_of(piece), BACKWARD_QUERIES, BACKWARD_KEYS):
            dq, dk, dv = _flash_backward(
                block.queries(grad), block.queries(call.query), block.keys(call.key), block.keys(call.value),
                block.queries(out), block.queries(lse), 0.0, False, attn_mask=call.bias(block), scale=call.scale,
            )  # fmt: skip
            dquery[block.rows, :, block.start : block.end] += dq.flip(2)
            block.keys(dkey).add_(dk)
            block.keys(dvalue).add_(dv)
            del dq, dk, dv  # before the next ones are made
    dline = torch.zeros_like(call.line)
    if need_line:
        delta = inner_products(grad, out, lse.dtype, 1024)
        for piece in call.plan.pieces:
            _line_gradient(dline, call, Upstream(grad, out, lse, delta), piece, constant_before, constant_from)
    return dquery, dkey, dvalue, dline


def _line_gradient(
    dline: Tensor,
    call: BlockwiseCall,
    upstream: Upstream,
    piece: Piece,
    constant_before: int | None,
    constant_from: int | None,
) -> None:
    """Add a piece's share of the line's gradient."""
    low, high = piece.offsets(call.first_offset)
    if low > high:
        return
    # A constant end is worth the trouble only where it spares something.
    far = constant_from if constant_from is not None and high > constant_from else None
    near = constant_before if constant_before is not None and low < constant_before else None
    last = high if far is None else far - 1
    if (low if near is None else near + 1) > last:
        return  # one constant for all of it: its gradient is the sum of rows that sum to zero
    band = _diagonal_sums(call, upstream, piece, low if near is None else near + 1, last)
    dline[:, call.top - last : call.top - last + band.shape[1]] += band
    rest = -band.sum(1)
    if far is not None and near is not None:  # two constants: one is computed, the other is what is left
        far_sum = _constant_gradient(call, upstream, piece._replace(lowest=far))
        dline[:, call.top - far] += far_sum
        dline[:, call.top - near] += rest - far_sum
    elif far is not None:
        dline[:, call.top - far] += rest
    elif near is not None:
        dline[:, call.top - near] += rest


def _diagonal_sums(call: BlockwiseCall, upstream: Upstream, piece: Piece, first: int, last: int) -> Tensor:
    """Sum of ``dS`` over a piece's batch rows and pairs, by descending offset: (heads, last - first + 1)."""
    line = call.line_of(piece)
    sums = line.new_zeros(line.shape[0], last - first + 1)
    # A band is covered best by tiles about as high as it is wide.
    height = min(TILE, max(64, last - first + 1))
    for start, end, first_key, end_key in piece._replace(lowest=first, highest=last).blocks(height, call.first_offset):
        for left in range(first_key, end_key, 2 * TILE):
            right = min(left + 2 * TILE, end_key)
            top = call.first_offset + end - 1 - left  # the offset of the tile's first diagonal
            begin, stop = max(top - last, 0), min(top - first + 1, end - start + right - left - 1)
            at = last - top + begin
            for row in range(*piece.rows):
                tile = Block(slice(row, row + 1), start, end, left, right, line)
                sums[:, at : at + stop - begin] += _sheared(call, upstream, tile)[..., begin:stop].sum(1)
    return sums


def _sheared(call: BlockwiseCall, upstream: Upstream, tile: Block) -> Tensor:
    """``dS`` of a tile of one batch row, (heads, queries, queries + keys - 1), each column one diagonal."""
    queries, keys, kv_heads = tile.end - tile.start, tile.last - tile.first, call.key.shape[1]
    dtype = upstream.lse.dtype

    def rows_of(x: Tensor) -> Tensor:  # the heads of a group share their keys
        return tile.queries(x).to(dtype).reshape(kv_heads, -1, x.shape[-1])

    def columns_of(x: Tensor) -> Tensor:
        return tile.keys(x)[0].to(dtype).transpose(1, 2)

    score = torch.baddbmm(
        call.bias(tile).reshape(kv_heads, -1, keys), rows_of(call.query), columns_of(call.key), alpha=call.scale
    )
    score.sub_(rows_of(upstream.lse[..., None])).exp_()
    ds = torch.baddbmm(rows_of(upstream.delta[..., None]), rows_of(upstream.grad), columns_of(call.value), beta=-1)
    # Write the rows into longer ones, of queries + keys, and read the same memory with rows one shorter.
    padded = score.new_zeros(call.query.shape[1], queries, keys + queries)
    torch.mul(score.view(-1, queries, keys), ds.view(-1, queries, keys), out=padded[..., :keys])
    diagonals = queries + keys - 1
    return padded.flatten(1)[:, : queries * diagonals].view(-1, queries, diagonals)


def _constant_gradient(call: BlockwiseCall, upstream: Upstream, beyond: Piece) -> Tensor:
    """Sum of ``dS`` over all pairs of a piece, (heads,), from a forward pass on them.

    With ``o`` and ``s`` the output and log-sum-exp of those keys alone, and ``w = exp(s - lse)`` their share of the
    softmax, it is the sum over queries of ``w * (dO . o - delta)``.
    """
    assert beyond.lowest is not None
    line = call.line_of(beyond)
    total = line.new_zeros(line.shape[0])
    possible = line[None, :, call.top - beyond.lowest, None] > -torch.inf
    for block in call.blocks(beyond, line, BACKWARD_QUERIES):
        # Queries too near to have such keys at all are left out: a kernel gives them no meaningful log-sum-exp.
        block = block._replace(start=max(block.start, block.first + beyond.lowest - call.first_offset))
        if block.start < block.end:
            o, s = call.attend(block)
            # Of queries that see none of these keys the kernel makes no log-sum-exp.
            seen = possible if call.plan.mask is None else (call.bias(block) > -torch.inf).any(-1)
            share = torch.where(seen, (s - block.queries(upstream.lse)).exp(), 0)
            inner = (block.queries(upstream.grad) * o).sum(-1, dtype=line.dtype)
            total += (share * (inner - block.queries(upstream.delta))).sum((0, 2))
    return total
