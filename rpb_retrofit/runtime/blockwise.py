"""Attention with a bias of the offset on a CPU, forward and backward, in blocks of queries and linear memory.

The bias is a vector over offsets, never a matrix. Take a block of queries in reverse order, and row ``r`` of its bias
is the slice ``line[r : r + K]``: a Hankel matrix, a zero-copy view of the vector, which PyTorch's flash kernels
for CPU take as their mask. What causality and windows hide is minus infinity in the vector, and keys that no query
of a block sees are not computed.

The bias' gradient is the sum of ``dS = P * (dP - delta)`` along each diagonal. Each row of ``dS`` sums to zero, so
where the bias is constant beyond some offset only the band before it is computed, and the constant's gradient is
minus the sum of the others. No atomics: equal bits in every run with the same number of threads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .visibility import Piece, is_runs, pieces_of, runs_of

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Plan(NamedTuple):
    """What is computed: pieces in which visibility is a rule, and a boolean mask where pieces cannot express it."""

    pieces: list[Piece]
    mask: Tensor | None


def plan(
    mask: Tensor | None, batch: int, queries: int, keys: int, first_offset: int, lowest: int | None, highest: int | None
) -> Plan:
    """By a mask of runs (batch or 1, 1, Q, 2) or booleans (batch or 1, 1 or heads, Q, K), or by one rule of offsets."""
    whole = Piece((0, batch), (0, queries), (0, keys), lowest, highest)
    if mask is None:
        return Plan([whole], None)
    runs: Tensor | None = mask
    if not is_runs(mask):
        runs = runs_of(lambda start, end: mask[:, :, start:end], queries, keys) if mask.shape[1] == 1 else None
    if runs is None:
        return Plan([whole._replace(lowest=None, highest=None)], mask.expand(batch, -1, -1, -1))
    return Plan(pieces_of(runs[:, 0].expand(batch, -1, -1), first_offset), None)


TILE = 512
"""Queries and keys of a tile where the bias' gradient is computed."""


def block_size(keys: int) -> int:
    """Queries per block. Small blocks waste less of the causal half, large ones run a faster kernel (from 768 on)."""
    return 768 if keys >= 4096 else 256


class _Blocks:
    """The bias of one call, block by block.

    ``line`` (heads, Q + K - 1) holds it by descending offset: entry ``t`` is that of offset
    ``first_offset + Q - 1 - t``.
    """

    def __init__(self, line: Tensor, mask: Tensor | None, queries: int, first_offset: int) -> None:
        self.mask, self.queries, self.first_offset = mask, queries, first_offset
        self.top = first_offset + queries - 1  # the offset of entry 0
        self._line = line
        self._hidden: dict[tuple[int | None, int | None], Tensor] = {}

    def line(self, piece: Piece) -> Tensor:
        """The line with minus infinity where the piece hides."""
        rule = (piece.lowest, piece.highest)
        if rule not in self._hidden:
            line = self._line
            if rule != (None, None):
                line = line.clone()
                if piece.lowest is not None:
                    line[:, max(self.top - piece.lowest + 1, 0) :] = -torch.inf
                if piece.highest is not None:
                    line[:, : max(self.top - piece.highest, 0)] = -torch.inf
            self._hidden[rule] = line
        return self._hidden[rule]

    def bias(self, line: Tensor, rows: slice, start: int, end: int, first: int, last: int) -> Tensor:
        """The bias of queries ``end - 1 .. start`` and keys ``first .. last - 1``: (1 or rows, heads, queries, keys).

        A view of the line where no mask stands between.
        """
        at = self.queries - end + first
        hankel = line[None, :, at : at + (end - start) + (last - first) - 1].unfold(2, last - first, 1)
        if self.mask is None:
            return hankel
        seen = self.mask[rows, :, start:end, first:last].flip(2)
        return torch.where(seen, hankel, torch.finfo(hankel.dtype).min)

    def reversed(self, start: int, end: int) -> slice:
        """Where the queries ``end - 1 .. start`` are in a tensor whose queries are reversed."""
        return slice(self.queries - end, self.queries - start)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    line: Tensor,
    plan: Plan,
    first_offset: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output (batch, heads, Q, d), laid out as (batch, Q, heads, d), and log-sum-exp (batch, heads, Q), float32.

    Queries without any key get zeros.
    """
    pieces, mask = plan
    batch, heads, queries, width = query.shape
    out = query.new_zeros(batch, queries, heads, width).transpose(1, 2)
    lse = torch.zeros(batch, heads, queries, dtype=line.dtype, device=query.device)
    blocks = _Blocks(line, mask, queries, first_offset)
    query = query.flip(2)
    for piece in pieces:
        rows = slice(*piece.rows)
        hidden = blocks.line(piece)
        for start, end, first, last in piece.blocks(block_size(key.shape[2]), first_offset):
            o, s = _flash(
                query[rows, :, blocks.reversed(start, end)],
                key[rows, :, first:last],
                value[rows, :, first:last],
                0.0,
                False,
                attn_mask=blocks.bias(hidden, rows, start, end, first, last),
                scale=scale,
            )
            out[rows, :, start:end] = o.flip(2)
            lse[rows, :, start:end] = s.flip(2)
    if mask is not None:
        out *= mask.any(-1, keepdim=True)
    return out, lse


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    line: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: Plan,
    first_offset: int,
    scale: float,
    constant_before: int | None,
    constant_from: int | None,
    need_line: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, and of the line (zeros if not needed).

    The gradient of all offsets from ``constant_from`` on comes in one entry of the line, as that of all offsets up to
    ``constant_before``: whatever the line was made from, it does not tell them apart.
    """
    pieces, mask = plan
    if mask is not None:
        grad = grad * mask.any(-1, keepdim=True)
    blocks = _Blocks(line, mask, query.shape[2], first_offset)
    dquery, dkey, dvalue = (torch.zeros_like(x) for x in (query, key, value))
    query, grad, out, lse = (x.flip(2) for x in (query, grad, out, lse))
    for piece in pieces:
        rows = slice(*piece.rows)
        hidden = blocks.line(piece)
        for start, end, first, last in piece.blocks(block_size(key.shape[2]), first_offset):
            at = blocks.reversed(start, end)
            dq, dk, dv = _flash_backward(
                grad[rows, :, at],
                query[rows, :, at],
                key[rows, :, first:last],
                value[rows, :, first:last],
                out[rows, :, at],
                lse[rows, :, at],
                0.0,
                False,
                attn_mask=blocks.bias(hidden, rows, start, end, first, last),
                scale=scale,
            )
            dquery[rows, :, start:end] = dq.flip(2)
            dkey[rows, :, first:last] += dk
            dvalue[rows, :, first:last] += dv
    dline = torch.zeros_like(line)
    if need_line:
        delta = (grad.to(line.dtype) * out.to(line.dtype)).sum(-1)
        for piece in pieces:
            _line_gradient(
                dline, blocks, piece, grad, query, key, value, delta, lse, scale, constant_before, constant_from
            )
    return dquery, dkey, dvalue, dline


def _line_gradient(
    dline: Tensor,
    blocks: _Blocks,
    piece: Piece,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    delta: Tensor,
    lse: Tensor,
    scale: float,
    constant_before: int | None,
    constant_from: int | None,
) -> None:
    """Add a piece's share of the line's gradient; queries, gradients, delta and log-sum-exps come reversed."""
    low, high = piece.offsets(blocks.first_offset)
    if low > high:
        return
    # A constant end is worth the trouble only where it spares something.
    far = constant_from if constant_from is not None and high > constant_from else None
    near = constant_before if constant_before is not None and low < constant_before else None
    first = low if near is None else near + 1
    last = high if far is None else far - 1
    arguments = (blocks, piece, grad, query, key, value, delta, lse, scale)
    band = _diagonal_sums(*arguments, first, last)
    at = blocks.top - last
    dline[:, at : at + band.shape[1]] += band
    rest = -band.sum(1)
    if far is not None and near is not None:  # two constants: one is computed, the other is what is left
        far_sum = _constant_gradient(*arguments, far)
        dline[:, blocks.top - far] += far_sum
        dline[:, blocks.top - near] += rest - far_sum
    elif far is not None:
        dline[:, blocks.top - far] += rest
    elif near is not None:
        dline[:, blocks.top - near] += rest


def _tiles(piece: Piece, first: int, last: int, first_offset: int) -> Iterator[tuple[int, int, int, int]]:
    """Tiles of queries and keys that together hold every pair of the piece with an offset in ``first .. last``."""
    # A band is covered best by blocks about as high as it is wide.
    height = min(TILE, max(64, last - first + 1))
    width = max(TILE, min(2 * TILE, height + last - first))
    band = piece._replace(lowest=first, highest=last)
    for start, end, first_key, end_key in band.blocks(height, first_offset):
        for left in range(first_key, end_key, width):
            yield start, end, left, min(left + width, end_key)


def _diagonal_sums(
    blocks: _Blocks,
    piece: Piece,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    delta: Tensor,
    lse: Tensor,
    scale: float,
    first: int,
    last: int,
) -> Tensor:
    """Sum of ``dS`` over a piece's batch rows and pairs, by descending offset: (heads, last - first + 1)."""
    heads, kv_heads = query.shape[1], key.shape[1]
    sums = torch.zeros(heads, last - first + 1, dtype=lse.dtype, device=lse.device)
    line = blocks.line(piece)
    for row in range(*piece.rows):
        for start, end, left, right in _tiles(piece, first, last, blocks.first_offset):
            at, queries, keys = blocks.reversed(start, end), end - start, right - left

            def rows_of(x: Tensor, at: slice = at, row: int = row) -> Tensor:  # grouped heads share their keys
                return x[row, :, at].to(lse.dtype).reshape(kv_heads, -1, x.shape[-1])

            def columns_of(x: Tensor, left: int = left, right: int = right, row: int = row) -> Tensor:
                return x[row, :, left:right].to(lse.dtype).transpose(1, 2)

            bias = blocks.bias(line, slice(row, row + 1), start, end, left, right).reshape(kv_heads, -1, keys)
            score = torch.baddbmm(bias, rows_of(query), columns_of(key), alpha=scale)
            score.sub_(rows_of(lse[..., None])).exp_()
            ds = torch.baddbmm(rows_of(delta[..., None]), rows_of(grad), columns_of(value), beta=-1)
            # Rows one entry longer than a Toeplitz matrix's shear: the same memory, read with rows one shorter, has
            # the diagonals as columns.
            padded = score.new_zeros(heads, queries, keys + queries)
            torch.mul(score.view(heads, queries, keys), ds.view(heads, queries, keys), out=padded[..., :keys])
            diagonals = keys + queries - 1
            sheared = padded.flatten(1)[:, : queries * diagonals].view(heads, queries, diagonals)
            top = blocks.first_offset + end - 1 - left  # the offset of the first diagonal
            begin, stop = max(top - last, 0), min(top - first + 1, diagonals)
            if begin < stop:
                to = last - top + begin
                sums[:, to : to + stop - begin] += sheared[..., begin:stop].sum(1)
    return sums


def _constant_gradient(
    blocks: _Blocks,
    piece: Piece,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    delta: Tensor,
    lse: Tensor,
    scale: float,
    far: int,
) -> Tensor:
    """Sum of ``dS`` over all pairs of a piece with an offset of ``far`` or more, (heads,), from a forward pass on them.

    With ``o`` and ``s`` the output and log-sum-exp of those keys alone, and ``w = exp(s - lse)`` their share of the
    softmax, it is the sum over queries of ``w * (dO . o - delta)``.
    """
    beyond = piece._replace(lowest=far)
    line = blocks.line(beyond)
    total = torch.zeros(query.shape[1], dtype=lse.dtype, device=lse.device)
    rows = slice(*piece.rows)
    for start, end, first, last in beyond.blocks(block_size(key.shape[2]), blocks.first_offset):
        # Queries too near to have such keys at all are left out: a kernel gives them no meaningful log-sum-exp.
        start = max(start, first + far - blocks.first_offset)
        if start >= end:
            continue
        at = blocks.reversed(start, end)
        o, s = _flash(
            query[rows, :, at],
            key[rows, :, first:last],
            value[rows, :, first:last],
            0.0,
            False,
            attn_mask=blocks.bias(line, rows, start, end, first, last),
            scale=scale,
        )
        share = (s - lse[rows, :, at]).exp()
        total += (share * ((grad[rows, :, at] * o).sum(-1, dtype=lse.dtype) - delta[rows, :, at])).sum((0, 2))
    return total


# One opaque operator for torch.compile: what happens inside (blocks, pieces read from a tensor) is not traced.
# Its namespace is this module's name, because each checkpoint brings its own copy of this file.
NAMESPACE = re.sub(r"\W", "_", __name__)


@torch.library.custom_op(f"{NAMESPACE}::attend", mutates_args=())
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
    constant_before: int | None,
    constant_from: int | None,
) -> tuple[Tensor, Tensor]:
    """`forward` with gradients; what is seen is as in `plan`."""
    seen = plan(mask, query.shape[0], query.shape[2], key.shape[2], first_offset, lowest, highest)
    with torch.autocast(query.device.type, enabled=False):
        return forward(query, key, value, line, seen, first_offset, scale)


@attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, line: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, heads, queries, width = query.shape
    return (
        query.new_empty(batch, queries, heads, width).transpose(1, 2),
        line.new_empty(batch, heads, queries),
    )


@torch.library.custom_op(f"{NAMESPACE}::attend_backward", mutates_args=())
def attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    line: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    first_offset: int,
    lowest: int | None,
    highest: int | None,
    scale: float,
    constant_before: int | None,
    constant_from: int | None,
    need_line: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`backward` as an operator."""
    seen = plan(mask, query.shape[0], query.shape[2], key.shape[2], first_offset, lowest, highest)
    with torch.autocast(query.device.type, enabled=False):
        return backward(
            grad, query, key, value, line, out, lse, seen, first_offset, scale,
            constant_before, constant_from, need_line,
        )  # fmt: skip


@attend_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, line: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), torch.empty_like(line)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, line, mask, *ctx.rest = inputs
    out, lse = output
    ctx.save_for_backward(query, key, value, line, out, lse, mask)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse)


def _differentiate(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    query, key, value, line, out, lse, mask = ctx.saved_tensors
    if grad is None:
        return (None,) * (5 + len(ctx.rest))
    found = attend_backward(grad, query, key, value, line, out, lse, mask, *ctx.rest, ctx.needs_input_grad[3])
    return (*found, None, *(None for _ in ctx.rest))


attend.register_autograd(_differentiate, setup_context=_save)
