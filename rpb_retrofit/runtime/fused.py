"""Attention with any bias of the offset on a GPU, forward and backward, in linear memory: one fused kernel a pass.

What makes it as fast as attention without a bias: where the bias is one constant (T5's last bucket), tiles add a
number and look nothing up; elsewhere they read it from a vector, which stays in the cache. What causality and windows
hide is minus infinity in that vector, and tiles that nobody sees are not visited. Heads that share keys need no copies.

The bias' gradient is the sum of ``dS = P * (dP - delta)`` along each diagonal. Tiles on one diagonal of tiles have one
bias, so a program adds such tiles up and the diagonals are summed once, at the end: no atomics, equal bits every time.
Each row of ``dS`` sums to zero, so where the bias is constant from some offset on only the band before it is computed.

`kernels_forward` and `kernels_backward` hold the kernels; the first call imports them, since a machine without a GPU
has no Triton.
"""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .gradients import inner_products
from .tilings import Tiling, Variant, padded_width, product_precision, shared_memory_of, tilings
from .visibility import is_runs

LOG2_E = 1.4426950408889634

MARGIN = 128
"""Entries of minus infinity behind a line: a kernel's last tile may look past its end. At least the largest block."""

WIDE_BAND = 1024
"""Offsets from which the bias' gradient is summed in larger tiles: they read less, and compute more than is needed."""

BAND_BYTES = 2**26
"""Memory for those sums at a time."""

SPAN_PAIRS = 2**25
"""Pairs of a query and a block of keys that are looked at together."""

DELTA_NUMBERS = 2**25
"""Numbers of the output that are multiplied with its gradient's together."""

GRID = 2**16 - 1
"""Programs in the second dimension of a grid, at most."""

PROGRAMS = 1024
"""Programs that keep a GPU busy: a narrow band is split into about so many."""


class FusedCall:
    """The arguments of one attention, as the kernels take them.

    ``line`` (heads, Q + K - 1) is the bias by descending offset, as in `blockwise`; with a ``mask``, of runs (batch or
    1, 1, Q, 2) or booleans (batch or 1, heads or 1, Q, K), the rule ``lowest .. highest`` of visible offsets is not
    used. From the offset ``constant_from`` on, where there is one, the bias is one constant per head.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        line: Tensor,
        mask: Tensor | None,
        first_offset: int,
        lowest: int | None,
        highest: int | None,
        scale: float,
        constant_from: int | None,
    ) -> None:
        self.query, self.key, self.value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        self.batch, self.heads, self.queries, self.width = query.shape
        self.kv_heads, self.keys, self.value_width = key.shape[1], key.shape[2], value.shape[3]
        self.content_scale = scale
        self.length = line.shape[1]
        top = first_offset + self.queries - 1  # the offset of the line's first entry
        self.lowest_t, self.end_t = 0, self.length
        if mask is None:
            self.lowest_t = 0 if highest is None else min(max(top - highest, 0), self.length)
            self.end_t = self.length if lowest is None else min(max(top - lowest + 1, 0), self.length)
        self.far_t = -1  # the last entry of the constant part
        if constant_from is not None and self.lowest_t == 0:
            self.far_t = min(top - constant_from, self.end_t - 1)
        self.line = F.pad(line.float() * LOG2_E, (0, MARGIN), value=-torch.inf)
        self.line[:, : self.lowest_t] = -torch.inf
        self.line[:, self.end_t :] = -torch.inf
        self.masked = 0 if mask is None else 1 if is_runs(mask) else 2
        if mask is not None:
            mask = mask.contiguous() if self.masked == 1 or mask.stride(-1) != 1 else mask
            mask = mask if self.masked == 1 else mask.view(torch.uint8)
        self.mask = mask
        width = max(self.width, self.value_width)
        self.tilings = tilings(width, query.dtype.itemsize, shared_memory_of(query.device))

    def mask_strides(self) -> tuple[int, int, int]:
        """Entries of the mask from one batch row, head and query to the next."""
        if self.mask is None:
            return 0, 0, 0
        batch, heads, row = (
            0 if size == 1 else by for size, by in zip(self.mask.shape, self.mask.stride()[:3], strict=False)
        )
        return batch, heads, row

    def sizes(self) -> tuple[int | float, ...]:
        """What all kernels of attention take alike."""
        group = self.heads // self.kv_heads
        scale = self.content_scale * LOG2_E
        return self.heads, group, self.queries, self.keys, self.lowest_t, self.end_t, self.far_t, scale

    def variant(self, tiling: Tiling, steps_over: int = 0) -> Variant:
        """What a kernel is compiled for that takes so many keys, or queries, in steps."""
        return Variant(
            block=tiling.block,
            step=tiling.step,
            width=self.width,
            padded=padded_width(self.width),
            value_width=self.value_width,
            value_padded=padded_width(self.value_width),
            masked=self.masked,
            precision=product_precision() if self.query.dtype == torch.float32 else "ieee",
            has_far=self.far_t >= 0,
            even=steps_over % tiling.step == 0,
            direct=self.query.is_cuda,
        )

    def spans(self, block: int) -> Tensor | None:
        """Of a mask of runs, the queries that see some key of each block: (batch or 1, blocks, 2), int32."""
        if self.mask is None or self.masked != 1:
            return None
        begin, end = self.mask[:, 0, :, None].unbind(-1)
        spans = []
        at_once = max(1, SPAN_PAIRS // max(begin.numel(), 1))
        for first in torch.arange(0, self.keys, block, device=self.mask.device).split(at_once):
            sees = (begin < first + block) & (end > first) & (end > begin)  # (batch or 1, Q, blocks)
            any_sees, row = sees.max(1)
            spans.append(torch.stack([row, self.queries - sees.flip(1).max(1).indices], -1) * any_sees[..., None])
        return torch.cat(spans, 1).to(torch.int32)


WIDEST = 512
"""Bytes of a head's row: what fits into registers and shared memory."""


def obstacle(query: Tensor, value: Tensor) -> str:
    """Why these kernels cannot run such tensors; empty where they can."""
    if query.device.type != "cuda" or torch.version.hip:
        return f"there is no faster way on {'ROCm' if torch.version.hip else query.device.type}"
    if query.dtype == torch.float64:
        return "there is no faster way for float64 on a GPU"
    if (width := max(query.shape[3], value.shape[3])) * query.dtype.itemsize > WIDEST:
        return f"heads are {width} wide in {query.dtype}, and the fused kernels take {WIDEST} bytes"
    if query.shape[0] * query.shape[1] > GRID or not query.shape[2]:
        return f"{query.shape[0]} sequences of {query.shape[1]} heads and {query.shape[2]} queries are no grid of a GPU"
    return _lacking(query.device)


@torch.compiler.assume_constant_result  # torch.compile runs it instead of tracing it
def _lacking(device: torch.device) -> str:
    """What a GPU, or its software, lacks."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "this GPU is older than Ampere, for which Triton makes no such kernels"
    return ""


def rows_apart(x: Tensor, width: int | None = None) -> Tensor:
    """An empty (batch, heads, N, width or x's), laid out as models do: (batch, N, heads, width)."""
    batch, heads, length, own = x.shape
    return x.new_empty(batch, length, heads, own if width is None else width).transpose(1, 2)


def _strides(*tensors: Tensor) -> tuple[tuple[int, int, int], ...]:
    """Entries from one batch row, head and row of each to the next."""
    return tuple((x.stride(0), x.stride(1), x.stride(2)) for x in tensors)


def _run(kernel: Any, grid: tuple[int, ...], *arguments: Any, tiling: Tiling, variant: Variant) -> None:
    device = arguments[0].device  # Triton launches on the current one, whatever the tensors are on
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*arguments, variant, num_warps=tiling.warps, num_stages=tiling.stages)


def forward(call: FusedCall) -> tuple[Tensor, Tensor]:
    """Output (batch, heads, Q, d_v), laid out as (batch, Q, heads, d_v), and log-sum-exp in units of log 2."""
    from .kernels_forward import forward_kernel

    out = rows_apart(call.query, call.value_width)
    lse = call.query.new_empty(call.batch, call.heads, call.queries, dtype=torch.float32)
    tiling = call.tilings.forward
    _run(
        forward_kernel, (-(-call.queries // tiling.block), call.batch * call.heads),
        call.query, call.key, call.value, call.line, call.mask, out, lse,
        *_strides(call.query, call.key, call.value, out), call.mask_strides(), call.line.stride(0), *call.sizes(),
        tiling=tiling, variant=call.variant(tiling, call.keys),
    )  # fmt: skip
    return out, lse


def backward(call: FusedCall, grad: Tensor, out: Tensor, lse: Tensor, need_line: bool) -> tuple[Tensor, ...]:
    """Gradients of query, key, value, and of the line (zeros if not needed)."""
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    rows = max(1, DELTA_NUMBERS // (call.batch * call.heads * call.value_width))
    delta = inner_products(grad, out, torch.float32, rows)
    dquery = _query_gradient(call, grad, lse, delta)
    dkey, dvalue = _key_gradient(call, grad, lse, delta)
    dline = _line_gradient(call, grad, lse, delta) if need_line else call.line.new_zeros(call.heads, call.length)
    return dquery, dkey, dvalue, dline


def _query_gradient(call: FusedCall, grad: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    from .kernels_backward import query_gradient_kernel

    dquery = rows_apart(call.query)
    tiling = call.tilings.query_gradient
    _run(
        query_gradient_kernel, (-(-call.queries // tiling.block), call.batch * call.heads),
        call.query, call.key, call.value, call.line, call.mask, grad, lse, delta, dquery,
        *_strides(call.query, call.key, call.value, grad, dquery), call.mask_strides(), call.line.stride(0),
        *call.sizes(), call.content_scale,
        tiling=tiling, variant=call.variant(tiling, call.keys),
    )  # fmt: skip
    return dquery


def _key_gradient(call: FusedCall, grad: Tensor, lse: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Of keys and values."""
    from .kernels_backward import key_gradient_kernel

    dkey, dvalue = (x.new_empty(x.shape) for x in (call.key, call.value))
    tiling = call.tilings.key_gradient
    _run(
        key_gradient_kernel, (-(-call.keys // tiling.block), call.batch * call.kv_heads),
        call.query, call.key, call.value, call.line, call.mask, call.spans(tiling.block), grad, lse, delta, dkey,
        dvalue, *_strides(call.query, call.key, call.value, grad), call.mask_strides(), call.line.stride(0),
        *call.sizes(), call.content_scale,
        tiling=tiling, variant=call.variant(tiling, call.queries),
    )  # fmt: skip
    return dkey, dvalue


def _line_gradient(call: FusedCall, grad: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """Gradient of the line, (heads, Q + K - 1); that of the constant part comes in one entry."""
    band = (max(call.far_t + 1, call.lowest_t), call.end_t)  # entries that are computed
    wide_band = band[1] - band[0] >= WIDE_BAND
    tiling = call.tilings.wide_line_gradient if wide_band else call.tilings.line_gradient
    size = tiling.block
    dline = call.line.new_zeros(call.heads, call.length)
    if band[0] < band[1]:
        # The tile diagonal u holds the entries from Q - 1 + u * size - (size - 1) to size - 1 behind its middle.
        first = (band[0] - (call.queries - 1)) // size
        last = -(-(band[1] - 1 - (call.queries - 1)) // size)
        at_once = max(1, BAND_BYTES // (call.heads * 2 * size * size * 4))
        shift = call.queries - 1 + first * size - (size - 1)  # where the first diagonal's first entry goes
        wide = dline.new_zeros(call.heads, (last - first + 2) * size)
        for begin in range(first, last + 1, at_once):
            end = min(begin + at_once, last + 1)
            sums = _diagonal_sums(call, grad, lse, delta, begin, end, tiling)  # (heads, diagonals, 2 * size)
            place = wide[:, (begin - first) * size : (end - first + 1) * size]
            place[:, :-size] += sums[..., :size].flatten(1)
            place[:, size:] += sums[..., size:].flatten(1)
        dline[:, band[0] : band[1]] = wide[:, band[0] - shift : band[1] - shift]
    if call.far_t >= 0:  # the rows of dS sum to zero, so what the band has too much is what the constant lacks
        dline[:, call.far_t] = -dline.sum(1)
    return dline


def _diagonal_sums(
    call: FusedCall, grad: Tensor, lse: Tensor, delta: Tensor, first: int, end: int, tiling: Tiling
) -> Tensor:
    """Sums of ``dS`` along the diagonals of the tile diagonals ``first .. end - 1``: (heads, end - first, 2 * size)."""
    from .kernels_backward import line_gradient_kernel

    size = tiling.block
    pairs = (end - first) * call.heads
    most = min(PROGRAMS // pairs, BAND_BYTES // (pairs * 2 * size * size * 4), -(-call.batch * call.queries // size))
    splits = max(1, most)
    sums = call.line.new_empty(splits, call.heads, end - first, 2 * size * size)
    _run(
        line_gradient_kernel, (end - first, call.heads, splits),
        call.query, call.key, call.value, call.line, call.mask, grad, lse, delta, sums,
        *_strides(call.query, call.key, call.value, grad), call.mask_strides(), call.line.stride(0), call.length,
        call.batch, *call.sizes()[:4], first, call.sizes()[-1],
        tiling=tiling, variant=call.variant(tiling)._replace(has_far=False),  # one kernel: it does not look at this
    )  # fmt: skip
    whole = sums.sum(0)[..., : size * (2 * size - 1)]
    return F.pad(whole.unflatten(-1, (size, 2 * size - 1)).sum(-2), (0, 1))
