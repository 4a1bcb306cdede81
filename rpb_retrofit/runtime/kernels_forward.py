"""The forward pass of `fused` in Triton: output and log-sum-exp. See `kernels_shared` for what the arguments mean."""

from __future__ import annotations

from .kernels_shared import keys_of, load, of_head, scores, store, tl, triton


@triton.jit
def _forward_tiles(
    total, norm, highest, query, key, value, key_row, value_row, bias, mask, rows, begin, end, queries, keys, scale,
    flat: tl.constexpr, even: tl.constexpr, variant: tl.constexpr,
):  # fmt: skip
    """One block of queries on the keys ``begin .. end - 1``, a step at a time: the online softmax's state."""
    for start in range(begin, end, variant.step):
        columns = start + tl.arange(0, variant.step)
        k = load(key, columns, key_row, keys, variant.width, variant.padded, even)
        score = scores(query, k, bias, mask, rows, columns, queries, keys, scale, flat, even, variant)
        new = tl.maximum(highest, tl.max(score, 1))
        base = tl.where(new == float("-inf"), 0.0, new)
        weight = tl.exp2(score - base[:, None])
        shrink = tl.exp2(highest - base)
        norm = norm * shrink + tl.sum(weight, 1)
        v = load(value, columns, value_row, keys, variant.value_width, variant.value_padded, even)
        total = tl.dot(weight.to(v.dtype), v, total * shrink[:, None], input_precision=variant.precision)
        highest = new
    return total, norm, highest


@triton.jit
def forward_kernel(
    query, key, value, line, mask, out, lse,
    query_strides, key_strides, value_strides, out_strides, mask_strides, line_stride,
    heads, group, queries, keys, lowest_t, end_t, far_t, scale, variant: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of a block of queries of one head. Queries that see nothing get zeros."""
    size: tl.constexpr = variant.block  # Triton 3.6 takes shapes of such names only
    value_padded: tl.constexpr = variant.value_padded
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # those with the most keys first
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    query = of_head(query, query_strides, batch, head)
    key = of_head(key, key_strides, batch, head // group)
    value = of_head(value, value_strides, batch, head // group)
    line += head * line_stride
    rows = block * size + tl.arange(0, size)
    if variant.masked:
        mask = of_head(mask, mask_strides, batch, head)
    first, far, end, run_first, run_end = keys_of(block, rows, mask, queries, keys, lowest_t, end_t, far_t, variant)
    q = load(query, rows, query_strides[2], queries, variant.width, variant.padded, False)
    at = queries - 1 - tl.minimum(rows, queries - 1)
    total = tl.zeros([size, value_padded], tl.float32)
    norm = tl.zeros([size], tl.float32)
    highest = tl.full([size], float("-inf"), tl.float32)
    bias = (line, at, tl.load(line + tl.maximum(far_t, 0)))
    seen = (mask, mask_strides[2], run_first, run_end)
    if variant.has_far:
        total, norm, highest = _forward_tiles(
            total, norm, highest, q, key, value, key_strides[2], value_strides[2], bias, seen, rows, first, far,
            queries, keys, scale, True, True, variant,
        )  # fmt: skip
        first = far
    total, norm, highest = _forward_tiles(
        total, norm, highest, q, key, value, key_strides[2], value_strides[2], bias, seen, rows, first, end, queries,
        keys, scale, False, variant.even, variant,
    )  # fmt: skip
    nothing = norm == 0.0
    total = total / tl.where(nothing, 1.0, norm)[:, None]
    out = of_head(out, out_strides, batch, head)
    store(out, rows, out_strides[2], queries, total, variant.value_width, value_padded)
    log = tl.where(nothing, 0.0, highest + tl.log2(tl.where(nothing, 1.0, norm)))
    tl.store(lse + tl.program_id(1).to(tl.int64) * queries + rows, log, mask=rows < queries)
