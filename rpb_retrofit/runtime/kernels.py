"""The kernels of `fused`: attention with a bias of the offset, and its gradients, in Triton.

All of them see the bias as a line: ``line[h, t]`` is that of the offset ``first_offset + Q - 1 - t``, so query ``i``
and key ``j`` meet at ``t = Q - 1 - i + j``; it is minus infinity where a rule of offsets hides. Scores are in units of
log 2, as are log-sum-exps, since the hardware has a power of two; the line comes multiplied so.

A mask is none (``masked`` 0), runs of keys (1: (batch, 1, Q, 2), first key and one past the last), or a byte for every
pair (2: (batch, heads, Q, K)); strides of zero stand for what is alike.

The tiling and the online softmax are those of FlashAttention-2 (Dao 2023, arXiv:2307.08691).
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Named in a string: Transformers refuses remote code that imports what a machine (here one without a GPU) lacks.
triton: Any = import_module("triton")
tl: Any = import_module("triton.language")


@triton.jit
def _load(pointer, rows, row_stride, count, width: tl.constexpr, padded: tl.constexpr, even: tl.constexpr):
    """Rows of a matrix, zeros past its ends: (len(rows), padded)."""
    columns = tl.arange(0, padded)
    at = pointer + rows[:, None].to(tl.int64) * row_stride + columns[None, :]
    if even and width == padded:
        return tl.load(at)
    return tl.load(at, mask=(rows < count)[:, None] & (columns < width)[None, :], other=0.0)


@triton.jit
def _store(pointer, rows, row_stride, count, values, width: tl.constexpr, padded: tl.constexpr):
    """The inverse of `_load`."""
    columns = tl.arange(0, padded)
    at = pointer + rows[:, None].to(tl.int64) * row_stride + columns[None, :]
    tl.store(at, values.to(pointer.dtype.element_ty), mask=(rows < count)[:, None] & (columns < width)[None, :])


@triton.jit
def _look_up(line, index, direct: tl.constexpr):
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
def _visible(mask, mask_row, run_first, run_end, rows, columns, queries, keys, masked: tl.constexpr):
    """What a mask lets queries ``rows`` see of keys ``columns``, which broadcast as the runs and rows do."""
    if masked == 1:
        return (columns >= run_first) & (columns < run_end)
    inside = (rows < queries) & (columns < keys)
    return tl.load(mask + rows.to(tl.int64) * mask_row + columns, mask=inside, other=0) != 0


@triton.jit
def _run_of(runs, rows, queries):
    """First key and one past the last key of each query; of none past the last query."""
    inside = rows < queries
    first = tl.load(runs + 2 * rows, mask=inside, other=2147483647)
    last = tl.load(runs + 2 * rows + 1, mask=inside, other=0)
    return first, last


@triton.jit
def _keys_of(
    block, rows, block_rows: tl.constexpr, mask, queries, keys, lowest_t, end_t, far_t, step: tl.constexpr,
    masked: tl.constexpr,
):  # fmt: skip
    """What a block's queries see: first key, end of the keys of the constant bias, end of the keys, and their runs.

    The first key and the end of the far ones are ``step`` times a number apart.
    """
    first_row = block * block_rows
    last_row = tl.minimum(first_row + block_rows, queries) - 1
    first = tl.maximum(lowest_t - queries + 1 + first_row, 0) // step * step
    end = tl.minimum(end_t - queries + 1 + last_row, keys)
    far = tl.maximum(tl.minimum(far_t - queries + 2 + first_row, end) - first, 0)
    far = first + far // step * step
    run_first, run_end = rows, rows
    if masked == 1:
        run_first, run_end = _run_of(mask, rows, queries)
        first = tl.maximum(first, tl.min(run_first) // step * step)
        end = tl.minimum(end, tl.max(run_end))
        far = tl.maximum(tl.minimum(far, end // step * step), first)
    return first, far, end, run_first, run_end


@triton.jit
def _rows_of(first_key, last_key, queries, lowest_t, end_t, far_t, step: tl.constexpr):
    """Which queries see some of these keys by the rule: first row, first row of the constant bias, end of the rows."""
    first = tl.maximum(queries + first_key - end_t, 0) // step * step
    end = tl.minimum(queries - lowest_t + last_key, queries)
    far = tl.maximum(queries - 1 + last_key - far_t, first)
    far = first + (far - first + step - 1) // step * step
    return first, tl.minimum(far, tl.maximum(end, first)), end


@triton.jit
def _scores(
    query, k, line, at, constant, mask, mask_row, run_first, run_end, rows, columns, queries, keys, scale,
    flat: tl.constexpr, masked: tl.constexpr, even: tl.constexpr, precision: tl.constexpr, direct: tl.constexpr,
):  # fmt: skip
    """Scores of a block of queries and a tile of keys with their bias, minus infinity where nothing is seen."""
    score = tl.dot(query, tl.trans(k), input_precision=precision) * scale
    if flat:
        score += constant
    else:
        score += _look_up(line, at[:, None] + columns[None, :], direct)
        if not even:
            score = tl.where((columns < keys)[None, :], score, float("-inf"))
    if masked:
        seen = _visible(
            mask, mask_row, run_first[:, None], run_end[:, None], rows[:, None], columns[None, :], queries, keys,
            masked,
        )  # fmt: skip
        score = tl.where(seen, score, float("-inf"))
    return score


@triton.jit
def _forward_tiles(
    total, norm, highest, query, key, value, line, at, constant, mask, mask_row, run_first, run_end, rows, begin, end,
    key_stride, value_stride, queries, keys, scale,
    width: tl.constexpr, padded: tl.constexpr, value_width: tl.constexpr, value_padded: tl.constexpr,
    step: tl.constexpr, flat: tl.constexpr, masked: tl.constexpr, even: tl.constexpr, precision: tl.constexpr,
    direct: tl.constexpr,
):  # fmt: skip
    """One block of queries on the keys ``begin .. end - 1``, ``step`` at a time: the online softmax's state."""
    for start in range(begin, end, step):
        columns = start + tl.arange(0, step)
        k = _load(key, columns, key_stride, keys, width, padded, even)
        score = _scores(
            query, k, line, at, constant, mask, mask_row, run_first, run_end, rows, columns, queries, keys, scale,
            flat, masked, even, precision, direct,
        )  # fmt: skip
        new = tl.maximum(highest, tl.max(score, 1))
        base = tl.where(new == float("-inf"), 0.0, new)
        weight = tl.exp2(score - base[:, None])
        shrink = tl.exp2(highest - base)
        norm = norm * shrink + tl.sum(weight, 1)
        v = _load(value, columns, value_stride, keys, value_width, value_padded, even)
        total = tl.dot(weight.to(v.dtype), v, total * shrink[:, None], input_precision=precision)
        highest = new
    return total, norm, highest


@triton.jit
def forward_kernel(
    query, key, value, line, mask, out, lse,
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    out_batch, out_head, out_row, mask_batch, mask_head, mask_row, line_head,
    heads, group, queries, keys, lowest_t, end_t, far_t, scale,
    width: tl.constexpr, padded: tl.constexpr, value_width: tl.constexpr, value_padded: tl.constexpr,
    block_rows: tl.constexpr, step: tl.constexpr, has_far: tl.constexpr, masked: tl.constexpr,
    even: tl.constexpr, precision: tl.constexpr, direct: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of a block of queries of one head. Queries that see nothing get zeros."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # those with the most keys first
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    query += batch.to(tl.int64) * query_batch + head.to(tl.int64) * query_head
    key += batch.to(tl.int64) * key_batch + (head // group).to(tl.int64) * key_head
    value += batch.to(tl.int64) * value_batch + (head // group).to(tl.int64) * value_head
    line += head * line_head
    rows = block * block_rows + tl.arange(0, block_rows)
    if masked:
        mask += batch.to(tl.int64) * mask_batch + head.to(tl.int64) * mask_head
    first, far, end, run_first, run_end = _keys_of(
        block, rows, block_rows, mask, queries, keys, lowest_t, end_t, far_t, step, masked
    )
    q = _load(query, rows, query_row, queries, width, padded, False)
    at = queries - 1 - tl.minimum(rows, queries - 1)
    total = tl.zeros([block_rows, value_padded], tl.float32)
    norm = tl.zeros([block_rows], tl.float32)
    highest = tl.full([block_rows], float("-inf"), tl.float32)
    constant = tl.load(line + tl.maximum(far_t, 0))
    if has_far:
        total, norm, highest = _forward_tiles(
            total, norm, highest, q, key, value, line, at, constant, mask, mask_row, run_first, run_end, rows, first,
            far, key_row, value_row, queries, keys, scale, width, padded, value_width, value_padded, step, True, masked,
            True, precision, direct,
        )  # fmt: skip
        first = far
    total, norm, highest = _forward_tiles(
        total, norm, highest, q, key, value, line, at, constant, mask, mask_row, run_first, run_end, rows, first, end,
        key_row, value_row, queries, keys, scale, width, padded, value_width, value_padded, step, False, masked,
        even, precision, direct,
    )  # fmt: skip
    nothing = norm == 0.0
    total = total / tl.where(nothing, 1.0, norm)[:, None]
    out += batch.to(tl.int64) * out_batch + head.to(tl.int64) * out_head
    _store(out, rows, out_row, queries, total, value_width, value_padded)
    log = tl.where(nothing, 0.0, highest + tl.log2(tl.where(nothing, 1.0, norm)))
    tl.store(lse + tl.program_id(1).to(tl.int64) * queries + rows, log, mask=rows < queries)


@triton.jit
def _query_tiles(
    gradient, query, grad, key, value, lse, delta, line, at, constant, mask, mask_row, run_first, run_end, rows, begin,
    end, key_stride, value_stride, queries, keys, scale,
    width: tl.constexpr, padded: tl.constexpr, value_width: tl.constexpr, value_padded: tl.constexpr,
    step: tl.constexpr, flat: tl.constexpr, masked: tl.constexpr, even: tl.constexpr, precision: tl.constexpr,
    direct: tl.constexpr,
):  # fmt: skip
    """The same of a block of queries' gradient."""
    for start in range(begin, end, step):
        columns = start + tl.arange(0, step)
        k = _load(key, columns, key_stride, keys, width, padded, even)
        v = _load(value, columns, value_stride, keys, value_width, value_padded, even)
        score = _scores(
            query, k, line, at, constant, mask, mask_row, run_first, run_end, rows, columns, queries, keys, scale,
            flat, masked, even, precision, direct,
        )  # fmt: skip
        weight = tl.exp2(score - lse[:, None])
        ds = weight * (tl.dot(grad, tl.trans(v), input_precision=precision) - delta[:, None])
        gradient = tl.dot(ds.to(k.dtype), k, gradient, input_precision=precision)
    return gradient


@triton.jit
def query_gradient_kernel(
    query, key, value, line, mask, grad, lse, delta, dquery,
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    grad_batch, grad_head, grad_row, out_batch, out_head, out_row, mask_batch, mask_head, mask_row, line_head,
    heads, group, queries, keys, lowest_t, end_t, far_t, scale, content_scale,
    width: tl.constexpr, padded: tl.constexpr, value_width: tl.constexpr, value_padded: tl.constexpr,
    block_rows: tl.constexpr, step: tl.constexpr, has_far: tl.constexpr, masked: tl.constexpr,
    even: tl.constexpr, precision: tl.constexpr, direct: tl.constexpr,
):  # fmt: skip
    """Gradient of a block of queries of one head."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    query += batch.to(tl.int64) * query_batch + head.to(tl.int64) * query_head
    key += batch.to(tl.int64) * key_batch + (head // group).to(tl.int64) * key_head
    value += batch.to(tl.int64) * value_batch + (head // group).to(tl.int64) * value_head
    grad += batch.to(tl.int64) * grad_batch + head.to(tl.int64) * grad_head
    line += head * line_head
    rows = block * block_rows + tl.arange(0, block_rows)
    if masked:
        mask += batch.to(tl.int64) * mask_batch + head.to(tl.int64) * mask_head
    first, far, end, run_first, run_end = _keys_of(
        block, rows, block_rows, mask, queries, keys, lowest_t, end_t, far_t, step, masked
    )
    q = _load(query, rows, query_row, queries, width, padded, False)
    do = _load(grad, rows, grad_row, queries, value_width, value_padded, False)
    inside = rows < queries
    base = tl.program_id(1).to(tl.int64) * queries
    row_lse = tl.load(lse + base + rows, mask=inside, other=float("inf"))
    row_delta = tl.load(delta + base + rows, mask=inside, other=0.0)
    at = queries - 1 - tl.minimum(rows, queries - 1)
    constant = tl.load(line + tl.maximum(far_t, 0))
    gradient = tl.zeros([block_rows, padded], tl.float32)
    if has_far:
        gradient = _query_tiles(
            gradient, q, do, key, value, row_lse, row_delta, line, at, constant, mask, mask_row, run_first, run_end,
            rows, first, far, key_row, value_row, queries, keys, scale, width, padded, value_width, value_padded, step,
            True, masked, True, precision, direct,
        )  # fmt: skip
        first = far
    gradient = _query_tiles(
        gradient, q, do, key, value, row_lse, row_delta, line, at, constant, mask, mask_row, run_first, run_end, rows,
        first, end, key_row, value_row, queries, keys, scale, width, padded, value_width, value_padded, step, False,
        masked, even, precision, direct,
    )  # fmt: skip
    dquery += batch.to(tl.int64) * out_batch + head.to(tl.int64) * out_head
    _store(dquery, rows, out_row, queries, gradient * content_scale, width, padded)


@triton.jit
def _key_tiles(
    dkey, dvalue, key, value, query, grad, lse, delta, line, constant, mask, mask_row, columns, begin, end,
    query_stride, grad_stride, queries, keys, scale,
    width: tl.constexpr, padded: tl.constexpr, value_width: tl.constexpr, value_padded: tl.constexpr,
    step: tl.constexpr, flat: tl.constexpr, masked: tl.constexpr, even: tl.constexpr, precision: tl.constexpr,
    direct: tl.constexpr,
):  # fmt: skip
    """One block of keys on the queries ``begin .. end - 1``, ``step`` at a time; scores stand transposed."""
    for start in range(begin, end, step):
        rows = start + tl.arange(0, step)
        inside = rows < queries
        q = _load(query, rows, query_stride, queries, width, padded, even)
        do = _load(grad, rows, grad_stride, queries, value_width, value_padded, even)
        row_lse = tl.load(lse + rows, mask=inside, other=float("inf"))
        row_delta = tl.load(delta + rows, mask=inside, other=0.0)
        score = tl.dot(key, tl.trans(q), input_precision=precision) * scale
        if flat:
            score += constant
        else:
            at = queries - 1 - tl.minimum(rows, queries - 1)
            score += _look_up(line, at[None, :] + columns[:, None], direct)
        if masked:
            run_first, run_end = rows, rows
            if masked == 1:
                run_first, run_end = _run_of(mask, rows, queries)
            seen = _visible(
                mask, mask_row, run_first[None, :], run_end[None, :], rows[None, :], columns[:, None], queries, keys,
                masked,
            )  # fmt: skip
            score = tl.where(seen, score, float("-inf"))
        weight = tl.exp2(score - row_lse[None, :])
        dvalue = tl.dot(weight.to(do.dtype), do, dvalue, input_precision=precision)
        ds = weight * (tl.dot(value, tl.trans(do), input_precision=precision) - row_delta[None, :])
        dkey = tl.dot(ds.to(q.dtype), q, dkey, input_precision=precision)
    return dkey, dvalue


@triton.jit
def key_gradient_kernel(
    query, key, value, line, mask, spans, grad, lse, delta, dkey, dvalue,
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    grad_batch, grad_head, grad_row, mask_batch, mask_head, mask_row, line_head,
    heads, group, queries, keys, lowest_t, end_t, far_t, scale, content_scale,
    width: tl.constexpr, padded: tl.constexpr, value_width: tl.constexpr, value_padded: tl.constexpr,
    block_keys: tl.constexpr, step: tl.constexpr, has_far: tl.constexpr, masked: tl.constexpr,
    even: tl.constexpr, precision: tl.constexpr, direct: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of keys and values of one key-value head, over all query heads that share it.

    ``spans`` (batch or 1, blocks of keys, 2) bounds the queries that see some of a block's keys, where a mask is runs.
    """
    block = tl.program_id(0)  # under causality those with the most queries come first
    shared = heads // group
    batch, kv_head = tl.program_id(1) // shared, tl.program_id(1) % shared
    key += batch.to(tl.int64) * key_batch + kv_head.to(tl.int64) * key_head
    value += batch.to(tl.int64) * value_batch + kv_head.to(tl.int64) * value_head
    columns = block * block_keys + tl.arange(0, block_keys)
    k = _load(key, columns, key_row, keys, width, padded, False)
    v = _load(value, columns, value_row, keys, value_width, value_padded, False)
    last_key = tl.minimum((block + 1) * block_keys, keys) - 1
    first, far, end = _rows_of(block * block_keys, last_key, queries, lowest_t, end_t, far_t, step)
    if masked:
        mask += batch.to(tl.int64) * mask_batch
    if masked == 1:
        spans += (tl.where(mask_batch == 0, 0, batch) * tl.num_programs(0) + block) * 2
        first = tl.maximum(first, tl.load(spans) // step * step)
        end = tl.minimum(end, tl.load(spans + 1))
        far = tl.minimum(tl.maximum(far, first), tl.maximum((end + step - 1) // step * step, first))
    dk = tl.zeros([block_keys, padded], tl.float32)
    dv = tl.zeros([block_keys, value_padded], tl.float32)
    for member in range(group):
        head = kv_head * group + member
        own_query = query + batch.to(tl.int64) * query_batch + head.to(tl.int64) * query_head
        own_grad = grad + batch.to(tl.int64) * grad_batch + head.to(tl.int64) * grad_head
        base = (batch * heads + head).to(tl.int64) * queries
        own_line = line + head * line_head
        constant = tl.load(own_line + tl.maximum(far_t, 0))
        own_mask = mask
        if masked:
            own_mask += head.to(tl.int64) * mask_head
        near_end = end
        if has_far:
            near_end = far
        dk, dv = _key_tiles(
            dk, dv, k, v, own_query, own_grad, lse + base, delta + base, own_line, constant, own_mask,
            mask_row, columns, first, near_end, query_row, grad_row, queries, keys, scale, width, padded, value_width,
            value_padded, step, False, masked, even, precision, direct,
        )  # fmt: skip
        if has_far:
            dk, dv = _key_tiles(
                dk, dv, k, v, own_query, own_grad, lse + base, delta + base, own_line, constant, own_mask,
                mask_row, columns, far, end, query_row, grad_row, queries, keys, scale, width, padded, value_width,
                value_padded, step, True, masked, even, precision, direct,
            )  # fmt: skip
    at = tl.program_id(1).to(tl.int64) * keys
    _store(dkey + at * width, columns, width, keys, dk * content_scale, width, padded)
    _store(dvalue + at * value_width, columns, value_width, keys, dv, value_width, value_padded)


@triton.jit
def line_gradient_kernel(
    query, key, value, line, mask, grad, lse, delta, sums,
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    grad_batch, grad_head, grad_row, mask_batch, mask_head, mask_row, line_head, line_length,
    batches, heads, group, queries, keys, first_diagonal, scale,
    width: tl.constexpr, padded: tl.constexpr, value_width: tl.constexpr, value_padded: tl.constexpr,
    size: tl.constexpr, masked: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """The sum of ``dS`` over the tiles of one diagonal of tiles, all of which have the same bias.

    Tiles are ``size`` x ``size``. Program (diagonal, head, split) writes its sum, rows in reverse order and each
    padded with as many zeros, so that the same memory read with rows one shorter has diagonals as columns.
    """
    diagonal, head = first_diagonal + tl.program_id(0), tl.program_id(1)
    line += head * line_head
    row, column = tl.arange(0, size), tl.arange(0, size)
    t = queries - 1 + diagonal * size + column[None, :] - row[:, None]
    bias = tl.load(line + t, mask=(t >= 0) & (t < line_length), other=float("-inf"))
    first = tl.maximum(-diagonal, 0)  # block of queries
    end = tl.minimum(tl.cdiv(queries, size), tl.cdiv(keys, size) - diagonal)
    count = tl.maximum(end - first, 0)
    total = tl.zeros([size, size], tl.float32)
    for index in range(tl.program_id(2), count * batches, tl.num_programs(2)):
        batch, block = index // count, first + index % count
        rows, columns = block * size + row, (block + diagonal) * size + column
        any_seen = True
        seen = (rows < queries)[:, None] & (columns < keys)[None, :]
        if masked:
            own_mask = mask + batch.to(tl.int64) * mask_batch + head.to(tl.int64) * mask_head
            run_first, run_end = rows, rows
            if masked == 1:
                run_first, run_end = _run_of(own_mask, rows, queries)
                start = (block + diagonal) * size
                any_seen = (tl.max(run_end) > start) & (tl.min(run_first) < start + size)
            seen = seen & _visible(
                own_mask, mask_row, run_first[:, None], run_end[:, None], rows[:, None], columns[None, :], queries,
                keys, masked,
            )  # fmt: skip
        if any_seen:
            q = _load(
                query + batch.to(tl.int64) * query_batch + head.to(tl.int64) * query_head,
                rows, query_row, queries, width, padded, False,
            )  # fmt: skip
            k = _load(
                key + batch.to(tl.int64) * key_batch + (head // group).to(tl.int64) * key_head,
                columns, key_row, keys, width, padded, False,
            )  # fmt: skip
            v = _load(
                value + batch.to(tl.int64) * value_batch + (head // group).to(tl.int64) * value_head,
                columns, value_row, keys, value_width, value_padded, False,
            )  # fmt: skip
            do = _load(
                grad + batch.to(tl.int64) * grad_batch + head.to(tl.int64) * grad_head,
                rows, grad_row, queries, value_width, value_padded, False,
            )  # fmt: skip
            base = (batch * heads + head).to(tl.int64) * queries
            row_lse = tl.load(lse + base + rows, mask=rows < queries, other=float("inf"))
            row_delta = tl.load(delta + base + rows, mask=rows < queries, other=0.0)
            score = tl.dot(q, tl.trans(k), input_precision=precision) * scale + bias
            weight = tl.exp2(tl.where(seen, score, float("-inf")) - row_lse[:, None])
            total += weight * (tl.dot(do, tl.trans(v), input_precision=precision) - row_delta[:, None])
    place = (tl.program_id(2) * heads + head).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    flipped = (size - 1 - row)[:, None] * (2 * size) + column[None, :]
    tl.store(sums + place * (2 * size * size) + flipped, total)
    tl.store(sums + place * (2 * size * size) + size + flipped, tl.zeros([size, size], tl.float32))
