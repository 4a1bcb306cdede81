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
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .gradients import differentiate, inner_products
from .visibility import Piece, is_runs, pieces_of, runs_of

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

BACKWARD_KEYS = 4096
"""Keys at a time in the backward pass: its gradients of keys and values come as new tensors."""

TILE = 256
"""Queries of a tile where the bias' gradient is computed; it has twice as many keys."""


STEP = 256
"""Queries at a time on the keys near a block's diagonal, where a taller step would compute more of what is hidden."""

FORWARD_QUERIES, BACKWARD_QUERIES, FEW_QUERIES = 1024, 768, 256
"""Queries per block: small blocks waste less of the causal half, large ones run a faster kernel (from 768 on)."""

LONG = 4096
"""Keys from which the large blocks are the faster ones."""


class BlockPlan(NamedTuple):
    """What is computed: pieces in which visibility is a rule, and a boolean mask where pieces cannot express it."""

    pieces: list[Piece]
    mask: Tensor | None


def plan(
    mask: Tensor | None, batch: int, queries: int, keys: int, first_offset: int, lowest: int | None, highest: int | None
) -> BlockPlan:
    """By a mask of runs (batch or 1, 1, Q, 2) or booleans (batch or 1, 1 or heads, Q, K), or by one rule of offsets."""
    whole = Piece((0, batch), (0, queries), (0, keys), lowest, highest)
    if mask is None:
        return BlockPlan([whole], None)
    runs: Tensor | None = mask
    if not is_runs(mask):
        runs = runs_of(lambda start, end: mask[:, :, start:end], queries, keys) if mask.shape[1] == 1 else None
    if runs is None:
        return BlockPlan([whole._replace(lowest=None, highest=None)], mask.expand(batch, -1, -1, -1))
    return BlockPlan(pieces_of(runs[:, 0].expand(batch, -1, -1), first_offset), None)


class Block(NamedTuple):
    """Queries ``start .. end - 1`` of the batch ``rows`` and the keys ``first .. last - 1``, and the line for them."""

    rows: slice
    start: int
    end: int
    first: int
    last: int
    line: Tensor

    def queries(self, x: Tensor) -> Tensor:
        """This block's part of a tensor (batch, heads, Q, ...), the queries in reverse order."""
        return x[self.rows, :, self.start : self.end].flip(2)

    def keys(self, x: Tensor) -> Tensor:
        """This block's part of a tensor (batch, heads, K, ...): a view."""
        return x[self.rows, :, self.first : self.last]


@dataclass(frozen=True)
class Call:
    """The arguments of one attention.

    ``line`` (heads, Q + K - 1) is the bias by descending offset: entry ``t`` is that of ``first_offset + Q - 1 - t``.
    From the offset ``constant_from`` on, where there is one, it is one constant per head.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    line: Tensor
    plan: BlockPlan
    first_offset: int
    scale: float
    constant_from: int | None = None

    @property
    def top(self) -> int:
        """The offset of the line's first entry."""
        return self.first_offset + self.query.shape[2] - 1

    def line_of(self, piece: Piece) -> Tensor:
        """The line with minus infinity where the piece hides."""
        if piece.lowest is None and piece.highest is None:
            return self.line
        line = self.line.clone()
        if piece.lowest is not None:
            line[:, max(self.top - piece.lowest + 1, 0) :] = -torch.inf
        if piece.highest is not None:
            line[:, : max(self.top - piece.highest, 0)] = -torch.inf
        return line

    def blocks(self, piece: Piece, line: Tensor, queries: int, most_keys: int | None = None) -> Iterator[Block]:
        """A piece in blocks of ``queries``, or of fewer where there are not many keys.

        ``most_keys`` at a time, where given, and then all queries of those before the next.
        """
        rows, size = slice(*piece.rows), queries if self.key.shape[2] >= LONG else FEW_QUERIES
        (left, right), step = piece.keys, most_keys or self.key.shape[2]
        for first in range(left, right, step):
            part = piece._replace(keys=(first, min(first + step, right)))
            for start, end, low, high in part.blocks(size, self.first_offset):
                yield Block(rows, start, end, low, high, line)

    def bias(self, block: Block) -> Tensor:
        """The bias of a block, (1 or rows, heads, queries reversed, keys): a view, unless a mask stands between."""
        keys, at = block.last - block.first, self.query.shape[2] - block.end + block.first
        hankel = block.line[None, :, at : at + block.end - block.start + keys - 1].unfold(2, keys, 1)
        if self.plan.mask is None:
            return hankel
        seen = block.queries(self.plan.mask)[..., block.first : block.last]
        return torch.where(seen, hankel, -torch.inf)

    def attend(self, block: Block) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of a block's queries on its keys alone; queries reversed."""
        return _flash(
            block.queries(self.query), block.keys(self.key), block.keys(self.value), 0.0, False,
            attn_mask=self.bias(block), scale=self.scale,
        )  # fmt: skip

    def attend_in_steps(self, block: Block, corner: int) -> tuple[Tensor, Tensor]:
        """`attend` of a block whose first query sees the keys up to ``corner``, the next one key more, and so on.

        The keys before the corner are taken by all queries at once, those after it in steps which leave most of the
        hidden triangle out; log-sum-exps join the two. Where the bias is constant for all queries, and that is most of
        a long text, keys are taken without it: a constant adds to the log-sum-exp, and a mask costs the kernel time.
        """
        joint = self._constant_up_to(block, corner)
        if joint > block.first:
            far = self._attend_flat(block._replace(last=joint))
        elif (joint := corner) > block.first:
            far = self.attend(block._replace(last=joint))
        else:
            far = None
        outs: list[Tensor] = []
        lses: list[Tensor] = []
        for start in range(block.start, block.end, STEP):
            end = min(start + STEP, block.end)
            last = min(corner + end - block.start, block.last)
            out, lse = self.attend(block._replace(start=start, end=end, first=joint, last=last))
            if far is not None:
                far_out, far_lse = (x[:, :, block.end - end : block.end - start] for x in far)  # queries are reversed
                out = far_out.lerp(out, torch.sigmoid(lse - far_lse)[..., None].to(out.dtype))
                lse = torch.logaddexp(lse, far_lse)
            outs.insert(0, out)
            lses.insert(0, lse)
        return torch.cat(outs, 2), torch.cat(lses, 2)

    def _constant_up_to(self, block: Block, corner: int) -> int:
        """The first key, at most ``corner``, for which the bias may differ among a block's queries."""
        if self.constant_from is None:
            return block.first
        return min(block.start + self.first_offset - self.constant_from + 1, corner)

    def _attend_flat(self, block: Block) -> tuple[Tensor, Tensor]:
        """`attend` where the bias is one constant per head."""
        assert self.constant_from is not None
        out, lse = _flash(
            block.queries(self.query), block.keys(self.key), block.keys(self.value), 0.0, False, scale=self.scale
        )
        return out, lse + self.line[:, self.top - self.constant_from, None]


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """Output (batch, heads, Q, d), laid out as (batch, Q, heads, d), and log-sum-exp (batch, heads, Q), float32.

    Queries without any key get zeros.
    """
    batch, heads, queries, width = call.query.shape
    out = call.query.new_zeros(batch, queries, heads, width).transpose(1, 2)
    lse = call.line.new_zeros(batch, heads, queries)
    # The kernel gives no log-sum-exp to a query that sees nothing, so none may be among the keys before the corner.
    visible = call.plan.mask is None and bool((call.line > -torch.inf).all())
    for piece in call.plan.pieces:
        for block in call.blocks(piece, call.line_of(piece), FORWARD_QUERIES):
            corner = -1 if piece.lowest is None else block.start + call.first_offset - piece.lowest
            stepwise = visible and piece.highest is None and block.first <= corner < block.last - STEP
            o, s = call.attend_in_steps(block, corner) if stepwise else call.attend(block)
            out[block.rows, :, block.start : block.end] = o.flip(2)
            lse[block.rows, :, block.start : block.end] = s.flip(2)
    return out, lse


@dataclass(frozen=True)
class Upstream:
    """What the backward pass starts from: the output's gradient, the output, its log-sum-exp and ``grad . out``."""

    grad: Tensor
    out: Tensor
    lse: Tensor
    delta: Tensor


def backward(
    call: Call,
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
    dline: Tensor, call: Call, upstream: Upstream, piece: Piece, constant_before: int | None, constant_from: int | None
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


def _diagonal_sums(call: Call, upstream: Upstream, piece: Piece, first: int, last: int) -> Tensor:
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


def _sheared(call: Call, upstream: Upstream, tile: Block) -> Tensor:
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


def _constant_gradient(call: Call, upstream: Upstream, beyond: Piece) -> Tensor:
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
        return forward(Call(query, key, value, line, seen, first_offset, scale, constant_from))


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
        call = Call(query, key, value, line, seen, first_offset, scale)
        return backward(call, grad, out, lse, constant_before, constant_from, need_line)


@attend_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, line: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), torch.empty_like(line)


differentiate(attend, attend_backward)
