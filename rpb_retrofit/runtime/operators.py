"""The attentions of `blockwise` and `fused` as operators with gradients, which torch.compile does not look into.

Each gives output and log-sum-exp. ``line`` (heads, Q + K - 1) is the bias by descending offset; what is seen is as in
`blockwise.plan`. Each checkpoint brings its own copy of this file, so the operators' namespace is this module's name.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .blockwise import BlockwiseCall, plan
from .blockwise import forward as blockwise_forward
from .blockwise_gradients import backward as blockwise_backward
from .fused import FusedCall, rows_apart
from .fused import backward as fused_backward
from .fused import forward as fused_forward

NAMESPACE = re.sub(r"\W", "_", __name__)


def _differentiate(attend: Any, attend_backward: Callable[..., tuple[Tensor, ...]]) -> None:
    """Let the operator ``attend(query, key, value, line, mask, *rest)``, which gives output and log-sum-exp, have the
    gradients ``attend_backward(grad, query, key, value, line, out, lse, mask, *rest, need_line)``."""

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        query, key, value, line, mask, *ctx.rest = inputs
        out, lse = output
        ctx.save_for_backward(query, key, value, line, out, lse, mask)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(lse)

    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        query, key, value, line, out, lse, mask = ctx.saved_tensors
        if grad is None:
            return (None,) * (5 + len(ctx.rest))
        gradients = attend_backward(grad, query, key, value, line, out, lse, mask, *ctx.rest, ctx.needs_input_grad[3])
        return (*gradients, None, *(None for _ in ctx.rest))

    attend.register_autograd(backward, setup_context=save)


@torch.library.custom_op(f"{NAMESPACE}::attend_blockwise", mutates_args=())
def attend_blockwise(
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
    """`blockwise.forward` with gradients."""
    seen = plan(mask, query.shape[0], query.shape[2], key.shape[2], first_offset, lowest, highest)
    with torch.autocast(query.device.type, enabled=False):
        return blockwise_forward(BlockwiseCall(query, key, value, line, seen, first_offset, scale, constant_from))


@attend_blockwise.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, line: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, heads, queries, _ = query.shape
    return rows_apart(query), line.new_empty(batch, heads, queries)


@torch.library.custom_op(f"{NAMESPACE}::attend_blockwise_backward", mutates_args=())
def attend_blockwise_backward(
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
    """`blockwise_gradients.backward` as an operator."""
    seen = plan(mask, query.shape[0], query.shape[2], key.shape[2], first_offset, lowest, highest)
    with torch.autocast(query.device.type, enabled=False):
        call = BlockwiseCall(query, key, value, line, seen, first_offset, scale)
        return blockwise_backward(call, grad, out, lse, constant_before, constant_from, need_line)


@attend_blockwise_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, line: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), torch.empty_like(line)


_differentiate(attend_blockwise, attend_blockwise_backward)


@torch.library.custom_op(f"{NAMESPACE}::attend_fused", mutates_args=())
def attend_fused(
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
) -> tuple[Tensor, Tensor]:
    """`fused.forward` with gradients; the arguments are those of `FusedCall`."""
    return fused_forward(FusedCall(query, key, value, line, mask, first_offset, lowest, highest, scale, constant_from))


@attend_fused.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, line: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, heads, queries, _ = query.shape
    return rows_apart(query, value.shape[3]), query.new_empty(batch, heads, queries, dtype=torch.float32)


@torch.library.custom_op(f"{NAMESPACE}::attend_fused_backward", mutates_args=())
def attend_fused_backward(
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
    constant_from: int | None,
    need_line: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`fused.backward` as an operator."""
    call = FusedCall(query, key, value, line, mask, first_offset, lowest, highest, scale, constant_from)
    dquery, dkey, dvalue, dline = fused_backward(call, grad, out, lse, need_line)
    return dquery, dkey, dvalue, dline.to(line.dtype)


@attend_fused_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, line: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dkey, dvalue, dline = (x.new_empty(x.shape) for x in (key, value, line))
    return rows_apart(query), dkey, dvalue, dline


_differentiate(attend_fused, attend_fused_backward)
