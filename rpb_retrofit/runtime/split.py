"""Causal attention with a bias that is constant from some offset on, by two stock kernels: a far part and a band.

Beyond the offset ``reach`` the bias is one constant per head. So the far keys of each query are plain causal attention
of the later queries on the earlier keys, which every fused kernel does without a bias; the near keys are a band, in
which blocks of queries share one small bias. The two are merged by their log-sum-exps, the far one shifted by the
constant. In the backward pass each part is called with the merged output and log-sum-exp, as in ring attention (Liu et
al. 2023, arXiv:2310.01889). The bias' gradient is summed over all blocks of the band first, then along the diagonals:
no atomics.

It runs on CUDA with flash attention and memory-efficient attention, and on a CPU, where the tests are, with PyTorch's
flash kernel for CPU; `blockwise` is faster there. On CUDA the near part of the bias is rounded to the queries' dtype.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCKS_AT_A_TIME = 32
"""Blocks of the band of which the bias' gradient is computed at once: a bound on memory."""


def attend_far(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Plain causal attention of as many queries as keys: output and log-sum-exp (batch, heads, Q)."""
    if query.device.type == "cuda":
        found = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True, scale=scale)
        return found[0], found[1]
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, True, scale=scale)


def attend_far_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, by output and log-sum-exp of the whole softmax."""
    if query.device.type == "cuda":
        none, seed = torch.empty(0, device=query.device), torch.zeros(2, dtype=torch.uint64, device=query.device)
        return torch.ops.aten._scaled_dot_product_flash_attention_backward(
            grad, query, key, value, out, lse, none, none, query.shape[2], key.shape[2], 0.0, True, seed, none,
            scale=scale,
        )  # fmt: skip
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, query, key, value, out, lse, 0.0, True, scale=scale
    )


def attend_near(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention with a small dense bias (1, heads, Q, K): output and log-sum-exp (batch, heads, Q)."""
    bias = bias.expand(len(query), -1, -1, -1)
    if query.device.type == "cuda":
        out, lse, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, _rounded(bias, query.dtype), True, scale=scale
        )
        return out, lse[..., : query.shape[2]]  # it comes padded to a multiple of 32
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, False, attn_mask=bias, scale=scale
    )


def attend_near_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `attend_far_backward`, with a bias."""
    bias = bias.expand(len(query), -1, -1, -1)
    if query.device.type == "cuda":
        seed = torch.zeros((), dtype=torch.int64, device=query.device)
        lse = F.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf)
        dq, dk, dv, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
            grad, query, key, value, _rounded(bias, query.dtype), out, lse, seed, seed, 0.0, [True, True, True, False],
            scale=scale,
        )  # fmt: skip
        return dq, dk, dv
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, query, key, value, out, lse, 0.0, False, attn_mask=bias, scale=scale
    )


def _rounded(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """This kernel wants the bias in the queries' dtype; what is hidden stays finite."""
    return bias.clamp(min=torch.finfo(dtype).min).to(dtype)


class Band:
    """The near keys of every query, offsets 0 to ``reach - 1``, in blocks of queries that share one bias.

    A block of ``size`` queries, ``size >= reach``, sees the keys of its own block and of the one before. The first
    block has none before it: it is block 0 of zeros, whose keys the bias hides.
    """

    def __init__(self, near: Tensor) -> None:
        """``near`` (heads, reach) is the bias by ascending offset."""
        self.heads, self.reach = near.shape
        self.size = -(-self.reach // 64) * 64  # memory-efficient attention wants aligned rows
        row, column = torch.arange(self.size, device=near.device), torch.arange(2 * self.size, device=near.device)
        self.offset = self.size + row[:, None] - column
        seen = (self.offset >= 0) & (self.offset < self.reach)
        lowest = torch.finfo(near.dtype).min
        bias = torch.where(seen, near[:, self.offset.clamp(0, self.reach - 1)], lowest)
        self.bias = bias[None]
        self.first = torch.where(column >= self.size, bias, lowest)[None]

    def queries(self, x: Tensor, padding: float = 0.0) -> Tensor:
        """(batch, heads, N, d) in blocks: (batch * blocks, heads, size, d), the last one padded."""
        batch, heads, length, width = x.shape
        x = F.pad(x, (0, 0, 0, -length % self.size), value=padding)
        return x.view(batch, heads, -1, self.size, width).transpose(1, 2).flatten(0, 1)

    def keys(self, x: Tensor) -> Tensor:
        """(batch, heads, N, d) in overlapping blocks: (batch * blocks, heads, 2 * size, d)."""
        x = F.pad(x, (0, 0, self.size, -x.shape[2] % self.size))
        return x.unfold(2, 2 * self.size, self.size).permute(0, 2, 1, 4, 3).flatten(0, 1)

    def whole(self, x: Tensor, batch: int, length: int) -> Tensor:
        """The inverse of `queries`."""
        return x.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)[:, :, :length]

    def sum_of_keys(self, x: Tensor, batch: int, length: int) -> Tensor:
        """The adjoint of `keys`: each key gets the sum of its two blocks' gradients."""
        earlier, own = x.unflatten(0, (batch, -1)).transpose(1, 2).split(self.size, 3)
        return (own + F.pad(earlier[:, :, 1:], (0, 0, 0, 0, 0, 1))).flatten(2, 3)[:, :, :length]


def repeat(x: Tensor, groups: int) -> Tensor:
    """Key-value heads for every query head: these kernels take no fewer."""
    return x if groups == 1 else x.repeat_interleave(groups, 1)


def forward(
    query: Tensor, key: Tensor, value: Tensor, near: Tensor, far: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Output (batch, heads, N, d) and log-sum-exp (batch, heads, N), float32."""
    batch, heads, length, _ = query.shape
    groups, reach = heads // key.shape[1], near.shape[1]
    key, value, band = repeat(key, groups), repeat(value, groups), Band(near)
    queries, keys, values = band.queries(query), band.keys(key), band.keys(value)
    out, lse = attend_near(queries, keys, values, band.bias, scale)
    step = len(queries) // batch
    out[::step], lse[::step] = attend_near(queries[::step], keys[::step], values[::step], band.first, scale)
    out, lse = band.whole(out, batch, length), band.whole(lse[..., None], batch, length)[..., 0]
    if length <= reach:
        return out, lse
    far_out, far_lse = attend_far(query[:, :, reach:], key[:, :, :-reach], value[:, :, :-reach], scale)
    far_lse = far_lse + far[:, None]
    merged = torch.logaddexp(lse[:, :, reach:], far_lse)
    near_share, far_share = (lse[:, :, reach:] - merged).exp()[..., None], (far_lse - merged).exp()[..., None]
    later = (out[:, :, reach:] * near_share + far_out * far_share).to(query.dtype)
    return torch.cat([out[:, :, :reach], later], 2), torch.cat([lse[:, :, :reach], merged], 2)


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    near: Tensor,
    far: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, ``near`` and ``far`` (zeros where not needed)."""
    batch, heads, length, _ = query.shape
    groups, reach, band = heads // key.shape[1], near.shape[1], Band(near)
    wide_key, wide_value = repeat(key, groups), repeat(value, groups)
    queries, keys, values = band.queries(query), band.keys(wide_key), band.keys(wide_value)
    grads, outs = band.queries(grad), band.queries(out)
    lses = band.queries(lse[..., None], padding=torch.inf)[..., 0]  # so that padding gets no weight
    step = len(queries) // batch
    found = attend_near_backward(grads, queries, keys, values, band.bias, outs, lses, scale)
    for whole, part in zip(
        found,
        attend_near_backward(
            grads[::step], queries[::step], keys[::step], values[::step], band.first, outs[::step], lses[::step], scale
        ),
        strict=True,
    ):
        whole[::step] = part
    dquery = band.whole(found[0], batch, length)
    dkey, dvalue = (band.sum_of_keys(x, batch, length) for x in found[1:])
    if length > reach:
        later, earlier = slice(reach, None), slice(None, -reach)
        dq, dk, dv = attend_far_backward(
            grad[:, :, later], query[:, :, later], wide_key[:, :, earlier], wide_value[:, :, earlier],
            out[:, :, later], lse[:, :, later] - far[:, None], scale,
        )  # fmt: skip
        dquery[:, :, later] += dq
        dkey[:, :, earlier] += dk
        dvalue[:, :, earlier] += dv
    dkey, dvalue = (x.unflatten(1, (-1, groups)).sum(2) for x in (dkey, dvalue))
    dnear = (
        _near_gradient(band, grads, queries, keys, values, outs, lses, step, scale)
        if need_bias
        else torch.zeros_like(near)
    )
    # The rows of dS sum to zero, so what the band has too much is what the far keys lack.
    return dquery, dkey, dvalue, dnear, -dnear.sum(1) if length > reach else torch.zeros_like(far)


def _near_gradient(
    band: Band,
    grads: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    outs: Tensor,
    lses: Tensor,
    step: int,
    scale: float,
) -> Tensor:
    """Sum of ``dS`` over the blocks of the band, by ascending offset: (heads, reach)."""
    total = torch.zeros(band.heads, band.size, 2 * band.size, device=grads.device)
    delta = (grads.float() * outs.float()).sum(-1, keepdim=True)
    for at in range(0, len(queries), BLOCKS_AT_A_TIME):
        part = slice(at, at + BLOCKS_AT_A_TIME)
        first = (torch.arange(len(queries), device=grads.device)[part] % step == 0)[:, None, None, None]
        bias = torch.where(first, band.first, band.bias)
        score = (queries[part].float() @ keys[part].float().transpose(2, 3)) * scale + bias
        weight = (score - lses[part][..., None]).exp()
        ds = weight * (grads[part].float() @ values[part].float().transpose(2, 3) - delta[part])
        total += ds.sum(0)
    padded = F.pad(total.flip(1), (0, band.size)).flatten(1)
    diagonals = padded[:, : band.size * (3 * band.size - 1)].view(band.heads, band.size, -1).sum(1)
    # Read with rows one entry shorter, the columns are the diagonals: column c holds the offset 2 * size - 1 - c.
    offset = torch.arange(band.reach, device=grads.device)
    return diagonals[:, 2 * band.size - 1 - offset]


# One opaque operator for torch.compile, in a namespace of this copy of the file.
NAMESPACE = re.sub(r"\W", "_", __name__)


@torch.library.custom_op(f"{NAMESPACE}::attend", mutates_args=())
def attend(query: Tensor, key: Tensor, value: Tensor, near: Tensor, far: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`forward` with gradients."""
    with torch.autocast(query.device.type, enabled=False):
        return forward(query, key, value, near, far, scale)


@attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, near: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), near.new_empty(query.shape[:3])


@torch.library.custom_op(f"{NAMESPACE}::attend_backward", mutates_args=())
def attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    near: Tensor,
    far: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`backward` as an operator."""
    with torch.autocast(query.device.type, enabled=False):
        return backward(grad, query, key, value, near, far, out, lse, scale, need_bias)


@attend_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, near: Tensor, far: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (*(torch.empty_like(x) for x in (query, key, value, near, far)),)  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    need_bias = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
    return (*attend_backward(grad, *ctx.saved_tensors, ctx.scale, need_bias), None)


attend.register_autograd(_differentiate, setup_context=_save)
