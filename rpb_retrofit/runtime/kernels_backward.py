"""The gradients of `fused` in Triton: of queries, of keys and values, of the line. See `kernels_shared` for what the
arguments mean."""

from __future__ import annotations

from .kernels_shared import keys_of, load, look_up, of_head, rows_of, run_of, scores, store, tl, triton, visible


@triton.jit
def _query_tiles(
    gradient, query, grad, key, value, key_row, value_row, lse, delta, bias, mask, rows, begin, end, queries, keys,
    scale, flat: tl.constexpr, even: tl.constexpr, variant: tl.constexpr,
):  # fmt: skip
    """One block of queries' gradient from the keys ``begin .. end - 1``, a step at a time."""
    for start in range(begin, end, variant.step):
        columns = start + tl.arange(0, variant.step)
        k = load(key, columns, key_row, keys, variant.width, variant.padded, even)
        v = load(value, columns, value_row, keys, variant.value_width, variant.value_padded, even)
        score = scores(query, k, bias, mask, rows, columns, queries, keys, scale, flat, even, variant)
        weight = tl.exp2(score - lse[:, None])
        ds = weight * (tl.dot(grad, tl.trans(v), input_precision=variant.precision) - delta[:, None])
        gradient = tl.dot(ds.to(k.dtype), k, gradient, input_precision=variant.precision)
    return gradient


@triton.jit
def query_gradient_kernel(
    query, key, value, line, mask, grad, lse, delta, dquery,
    query_strides, key_strides, value_strides, grad_strides, out_strides, mask_strides, line_stride,
    heads, group, queries, keys, lowest_t, end_t, far_t, scale, content_scale, variant: tl.constexpr,
):  # fmt: skip
    """Gradient of a block of queries of one head."""
    size: tl.constexpr = variant.block  # Triton 3.6 takes shapes of such names only
    padded: tl.constexpr = variant.padded
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    query = of_head(query, query_strides, batch, head)
    key = of_head(key, key_strides, batch, head // group)
    value = of_head(value, value_strides, batch, head // group)
    grad = of_head(grad, grad_strides, batch, head)
    line += head * line_stride
    rows = block * size + tl.arange(0, size)
    if variant.masked:
        mask = of_head(mask, mask_strides, batch, head)
    first, far, end, run_first, run_end = keys_of(block, rows, mask, queries, keys, lowest_t, end_t, far_t, variant)
    q = load(query, rows, query_strides[2], queries, variant.width, variant.padded, False)
    do = load(grad, rows, grad_strides[2], queries, variant.value_width, variant.value_padded, False)
    inside = rows < queries
    base = tl.program_id(1).to(tl.int64) * queries
    row_lse = tl.load(lse + base + rows, mask=inside, other=float("inf"))
    row_delta = tl.load(delta + base + rows, mask=inside, other=0.0)
    at = queries - 1 - tl.minimum(rows, queries - 1)
    bias = (line, at, tl.load(line + tl.maximum(far_t, 0)))
    seen = (mask, mask_strides[2], run_first, run_end)
    gradient = tl.zeros([size, padded], tl.float32)
    if variant.has_far:
        gradient = _query_tiles(
            gradient, q, do, key, value, key_strides[2], value_strides[2], row_lse, row_delta, bias, seen, rows, first,
            far, queries, keys, scale, True, True, variant,
        )  # fmt: skip
        first = far
    gradient = _query_tiles(
        gradient, q, do, key, value, key_strides[2], value_strides[2], row_lse, row_delta, bias, seen, rows, first,
        end, queries, keys, scale, False, variant.even, variant,
    )  # fmt: skip
    dquery = of_head(dquery, out_strides, batch, head)
    store(dquery, rows, out_strides[2], queries, gradient * content_scale, variant.width, padded)


@triton.jit
def _key_tiles(
    dkey, dvalue, key, value, query, grad, query_row, grad_row, lse, delta, line, constant, mask, mask_row, columns,
    begin, end, queries, keys, scale, flat: tl.constexpr, variant: tl.constexpr,
):  # fmt: skip
    """One block of keys on the queries ``begin .. end - 1``, a step at a time; scores stand transposed."""
    for start in range(begin, end, variant.step):
        rows = start + tl.arange(0, variant.step)
        inside = rows < queries
        q = load(query, rows, query_row, queries, variant.width, variant.padded, variant.even)
        do = load(grad, rows, grad_row, queries, variant.value_width, variant.value_padded, variant.even)
        row_lse = tl.load(lse + rows, mask=inside, other=float("inf"))
        row_delta = tl.load(delta + rows, mask=inside, other=0.0)
        score = tl.dot(key, tl.trans(q), input_precision=variant.precision) * scale
        if flat:
            score += constant
        else:
            at = queries - 1 - tl.minimum(rows, queries - 1)
            score += look_up(line, at[None, :] + columns[:, None], variant.direct)
        if variant.masked:
            run_first, run_end = rows, rows
            if variant.masked == 1:
                run_first, run_end = run_of(mask, rows, queries)
            seen = visible(
                mask, mask_row, run_first[None, :], run_end[None, :], rows[None, :], columns[:, None], queries, keys,
                variant.masked,
            )  # fmt: skip
            score = tl.where(seen, score, float("-inf"))
        weight = tl.exp2(score - row_lse[None, :])
        dvalue = tl.dot(weight.to(do.dtype), do, dvalue, input_precision=variant.precision)
        ds = weight * (tl.dot(value, tl.trans(do), input_precision=variant.precision) - row_delta[None, :])
        dkey = tl.dot(ds.to(q.dtype), q, dkey, input_precision=variant.precision)
    return dkey, dvalue


@triton.jit
def key_gradient_kernel(
    query, key, value, line, mask, spans, grad, lse, delta, dkey, dvalue,
    query_strides, key_strides, value_strides, grad_strides, mask_strides, line_stride,
    heads, group, queries, keys, lowest_t, end_t, far_t, scale, content_scale, variant: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of keys and values of one key-value head, over all query heads that share it.

    ``spans`` (batch or 1, blocks of keys, 2) bounds the queries that see some of a block's keys, where a mask is runs.
    """
    size: tl.constexpr = variant.block
    padded: tl.constexpr = variant.padded
    value_padded: tl.constexpr = variant.value_padded
    block = tl.program_id(0)  # under causality those with the most queries come first
    shared = heads // group
    batch, kv_head = tl.program_id(1) // shared, tl.program_id(1) % shared
    key = of_head(key, key_strides, batch, kv_head)
    value = of_head(value, value_strides, batch, kv_head)
    columns = block * size + tl.arange(0, size)
    k = load(key, columns, key_strides[2], keys, variant.width, variant.padded, False)
    v = load(value, columns, value_strides[2], keys, variant.value_width, variant.value_padded, False)
    last_key = tl.minimum((block + 1) * size, keys) - 1
    first, far, end = rows_of(block * size, last_key, queries, lowest_t, end_t, far_t, variant.step)
    if variant.masked == 1:
        spans += (tl.where(mask_strides[0] == 0, 0, batch) * tl.num_programs(0) + block) * 2
        first = tl.maximum(first, tl.load(spans) // variant.step * variant.step)
        end = tl.minimum(end, tl.load(spans + 1))
        far = tl.minimum(tl.maximum(far, first), tl.maximum(tl.cdiv(end, variant.step) * variant.step, first))
    dk = tl.zeros([size, padded], tl.float32)
    dv = tl.zeros([size, value_padded], tl.float32)
    for member in range(group):
        head = kv_head * group + member
        own_query = of_head(query, query_strides, batch, head)
        own_grad = of_head(grad, grad_strides, batch, head)
        base = (batch * heads + head).to(tl.int64) * queries
        own_line = line + head * line_stride
        constant = tl.load(own_line + tl.maximum(far_t, 0))
        own_mask = mask
        if variant.masked:
            own_mask = of_head(mask, mask_strides, batch, head)
        near_end = far if variant.has_far else end
        dk, dv = _key_tiles(
            dk, dv, k, v, own_query, own_grad, query_strides[2], grad_strides[2], lse + base, delta + base, own_line,
            constant, own_mask, mask_strides[2], columns, first, near_end, queries, keys, scale, False, variant,
        )  # fmt: skip
        if variant.has_far:
            dk, dv = _key_tiles(
                dk, dv, k, v, own_query, own_grad, query_strides[2], grad_strides[2], lse + base, delta + base,
                own_line, constant, own_mask, mask_strides[2], columns, far, end, queries, keys, scale, True, variant,
            )  # fmt: skip
    at = tl.program_id(1).to(tl.int64) * keys
    width, value_width = variant.width, variant.value_width
    store(dkey + at * width, columns, width, keys, dk * content_scale, width, padded)
    store(dvalue + at * value_width, columns, value_width, keys, dv, value_width, value_padded)


@triton.jit
def _tile_gradient(
    query, key, value, grad, query_row, key_row, value_row, grad_row, lse, delta, bias, seen, rows, columns, queries,
    keys, scale, variant: tl.constexpr,
):  # fmt: skip
    """``dS`` of a tile whose bias is known."""
    q = load(query, rows, query_row, queries, variant.width, variant.padded, False)
    k = load(key, columns, key_row, keys, variant.width, variant.padded, False)
    v = load(value, columns, value_row, keys, variant.value_width, variant.value_padded, False)
    do = load(grad, rows, grad_row, queries, variant.value_width, variant.value_padded, False)
    row_lse = tl.load(lse + rows, mask=rows < queries, other=float("inf"))
    row_delta = tl.load(delta + rows, mask=rows < queries, other=0.0)
    score = tl.dot(q, tl.trans(k), input_precision=variant.precision) * scale + bias
    weight = tl.exp2(tl.where(seen, score, float("-inf")) - row_lse[:, None])
    return weight * (tl.dot(do, tl.trans(v), input_precision=variant.precision) - row_delta[:, None])


@triton.jit
def line_gradient_kernel(
    query, key, value, line, mask, grad, lse, delta, sums,
    query_strides, key_strides, value_strides, grad_strides, mask_strides, line_stride, line_length,
    batches, heads, group, queries, keys, first_diagonal, scale, variant: tl.constexpr,
):  # fmt: skip
    """The sum of ``dS`` over the tiles of one diagonal of tiles, all of which have the same bias.

    Tiles are ``size`` x ``size``. Program (diagonal, head, split) writes its sum, rows in reverse order and each
    padded with as many zeros, so that the same memory read with rows one shorter has diagonals as columns.
    """
    size: tl.constexpr = variant.block
    diagonal, head = first_diagonal + tl.program_id(0), tl.program_id(1)
    line += head * line_stride
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
        if variant.masked:
            own_mask = of_head(mask, mask_strides, batch, head)
            run_first, run_end = rows, rows
            if variant.masked == 1:
                run_first, run_end = run_of(own_mask, rows, queries)
                start = (block + diagonal) * size
                any_seen = (tl.max(run_end) > start) & (tl.min(run_first) < start + size)
            seen = seen & visible(
                own_mask, mask_strides[2], run_first[:, None], run_end[:, None], rows[:, None], columns[None, :],
                queries, keys, variant.masked,
            )  # fmt: skip
        if any_seen:
            base = (batch * heads + head).to(tl.int64) * queries
            total += _tile_gradient(
                of_head(query, query_strides, batch, head), of_head(key, key_strides, batch, head // group),
                of_head(value, value_strides, batch, head // group), of_head(grad, grad_strides, batch, head),
                query_strides[2], key_strides[2], value_strides[2], grad_strides[2], lse + base, delta + base, bias,
                seen, rows, columns, queries, keys, scale, variant,
            )  # fmt: skip
    place = (tl.program_id(2) * heads + head).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    flipped = (size - 1 - row)[:, None] * (2 * size) + column[None, :]
    tl.store(sums + place * (2 * size * size) + flipped, total)
    tl.store(sums + place * (2 * size * size) + size + flipped, tl.zeros([size, size], tl.float32))
