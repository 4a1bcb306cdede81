"""What the kernels of `fused` share: how they read and write matrices, see the bias, and know what a mask shows.

All of them see the bias as a line: ``line[h, t]`` is that of the offset ``first_offset + Q - 1 - t``, so query ``i``
and key ``j`` meet at ``t = Q - 1 - i + j``; it is minus infinity where a rule of offsets hides. Scores are in units of
log 2, as are log-sum-exps, since the hardware has a power of two; the line comes multiplied so.

A mask is none (``masked`` 0), runs of keys (1: (batch, 1, Q, 2), first key and one past the last), or a byte for every
pair (2: (batch, heads, Q, K)); strides of zero stand for what is alike.

Strides come as (batch, head, row), in entries, and ``variant`` is a `Variant` of `tilings`. Two tuples are made in the
kernels: a ``bias`` is (line, the entry of each query's first key, the constant), a ``mask`` on its way to a tile is
(mask, row stride, first keys, ends of keys).

The tiling and the online softmax are those of FlashAttention-2 (Dao 2023, arXiv:2307.08691).
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Named in a string: Transformers refuses remote code that imports what a machine (here one without a GPU) lacks.
triton: Any = import_module("triton")
tl: Any = import_module("triton.language")


@triton.jit
def of_head(pointer, strides, batch, head):
    """Where a head of a batch row begins."""
    return pointer + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]


@triton.jit
def load(pointer, rows, row_stride, count, width: tl.constexpr, padded: tl.constexpr, even: tl.constexpr):
    """Rows of a matrix, zeros past its ends: (len(rows), padded)."""
    columns = tl.arange(0, padded)
    at = pointer + rows[:, None].to(tl.int64) * row_stride + columns[None, :]
    if even and width == padded:
        return tl.load(at)
    return tl.load(at, mask=(rows < count)[:, None] & (columns < width)[None, :], other=0.0)


@triton.jit
def store(pointer, rows, row_stride, count, values, width: tl.constexpr, padded: tl.constexpr):
    """The inverse of `load`."""
    columns = tl.arange(0, padded)
    at = pointer + rows[:, None].to(tl.int64) * row_stride + columns[None, :]
    tl.store(at, values.to(pointer.dtype.element_ty), mask=(rows < count)[:, None] & (columns < width)[None, :])


@triton.jit
def look_up(line, index, direct: tl.constexpr):
    """Entries of the line, in the layout of whatever they are added to.

    ``direct`` is NVIDIA's load in so many words. A plain load would be staged through shared memory, as those of keys
    and values are, and a tile of the bias is larger than both.
    """
    if direct:
        address = line.to(tl.int64) + index.to(tl.int64) * 4
        return tl.inline_asm_elementwise(
            "ld.global.nc.f32 $0, [$1];", "=f,l", [address], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.load(line + index)


@triton.jit
def visible(mask, mask_row, run_first, run_end, rows, columns, queries, keys, masked: tl.constexpr):
    """What a mask lets queries ``rows`` see of keys ``columns``, which broadcast as the runs and rows do."""
    if masked == 1:
        return (columns >= run_first) & (columns < run_end)
    inside = (rows < queries) & (columns < keys)
    return tl.load(mask + rows.to(tl.int64) * mask_row + columns, mask=inside, other=0) != 0


@triton.jit
def run_of(runs, rows, queries):
    """First key and one past the last key of each query; of none past the last query."""
    inside = rows < queries
    first = tl.load(runs + 2 * rows, mask=inside, other=2147483647)
    last = tl.load(runs + 2 * rows + 1, mask=inside, other=0)
    return first, last


@triton.jit
def keys_of(block, rows, mask, queries, keys, lowest_t, end_t, far_t, variant: tl.constexpr):
    """What a block's queries see: first key, end of the keys of the constant bias, end of the keys, and their runs.

    The first key and the end of the far ones are ``step`` times a number apart.
    """
    first_row = block * variant.block
    last_row = tl.minimum(first_row + variant.block, queries) - 1
    first = tl.maximum(lowest_t - queries + 1 + first_row, 0) // variant.step * variant.step
    end = tl.minimum(end_t - queries + 1 + last_row, keys)
    far = tl.maximum(tl.minimum(far_t - queries + 2 + first_row, end) - first, 0)
    far = first + far // variant.step * variant.step
    run_first, run_end = rows, rows
    if variant.masked == 1:
        run_first, run_end = run_of(mask, rows, queries)
        first = tl.maximum(first, tl.min(run_first) // variant.step * variant.step)
        end = tl.minimum(end, tl.max(run_end))
        far = tl.maximum(tl.minimum(far, end // variant.step * variant.step), first)
    return first, far, end, run_first, run_end


@triton.jit
def rows_of(first_key, last_key, queries, lowest_t, end_t, far_t, step: tl.constexpr):
    """Which queries see some of these keys by the rule: first row, first row of the constant bias, end of the rows."""
    first = tl.maximum(queries + first_key - end_t, 0) // step * step
    end = tl.minimum(queries - lowest_t + last_key, queries)
    far = tl.maximum(queries - 1 + last_key - far_t, first)
    far = first + (far - first + step - 1) // step * step
    return first, tl.minimum(far, tl.maximum(end, first)), end


@triton.jit
def scores(
    query, k, bias, mask, rows, columns, queries, keys, scale,
    flat: tl.constexpr, even: tl.constexpr, variant: tl.constexpr,
):  # fmt: skip
    """Scores of a block of queries and a tile of keys with their bias, minus infinity where nothing is seen.

    ``flat``: the bias is its constant; ``even``: all columns are keys.
    """
    score = tl.dot(query, tl.trans(k), input_precision=variant.precision) * scale
    line, at, constant = bias
    if flat:
        score += constant
    else:
        score += look_up(line, at[:, None] + columns[None, :], variant.direct)
        if not even:
            score = tl.where((columns < keys)[None, :], score, float("-inf"))
    if variant.masked:
        pairs, mask_row, run_first, run_end = mask
        seen = visible(
            pairs, mask_row, run_first[:, None], run_end[:, None], rows[:, None], columns[None, :], queries, keys,
            variant.masked,
        )  # fmt: skip
        score = tl.where(seen, score, float("-inf"))
    return score
