"""What the operators of `blockwise` and `fused` share: how their gradients are asked for, and a sum that both need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def differentiate(attend: Any, attend_backward: Callable[..., tuple[Tensor, ...]]) -> None:
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
        found = attend_backward(grad, query, key, value, line, out, lse, mask, *ctx.rest, ctx.needs_input_grad[3])
        return (*found, None, *(None for _ in ctx.rest))

    attend.register_autograd(backward, setup_context=save)


def inner_products(grad: Tensor, out: Tensor, dtype: torch.dtype, rows: int) -> Tensor:
    """``grad . out`` of each query, (batch, heads, Q) from (batch, heads, Q, d), computed in ``dtype``.

    In parts of ``rows`` queries: the whole product would be one more tensor as large as the output.
    """
    parts = zip(grad.split(rows, 2), out.split(rows, 2), strict=True)
    return torch.cat([(g.to(dtype) * o.to(dtype)).sum(-1) for g, o in parts], 2)
