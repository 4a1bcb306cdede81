"""Attention with a bias of the offset on a CPU, in blocks of queries and linear memory; its gradients are in
`blockwise_gradients`.

The bias is a vector over offsets, never a matrix. Take a block of queries in reverse order, and row ``r`` of its bias
is the slice ``line[r : r + K]``: a Hankel matrix, a zero-copy view of the vector, which PyTorch's flash kernels
for CPU take as their mask. What causality and windows hide is minus infinity in the vector, and keys that no query
of a block sees are not computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .visibility import Piece, is_runs, pieces_of, runs_of

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

STEP = 256
"""Queries at a time on the keys near a block's diagonal, where a taller step would compute more of what is hidden."""

FORWARD_QUERIES, FEW_QUERIES = 1024, 256
"""Queries per block, of many keys and of few: small blocks waste less of the causal half, large ones run a faster
kernel (from 768 on)."""

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
class BlockwiseCall:
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


def forward(call: BlockwiseCall) -> tuple[Tensor, Tensor]:
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
