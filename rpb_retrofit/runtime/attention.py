"""Attention with a bias of the offset: what it is, and the choice of how it runs.

A bias of the offset is a vector (`line`), never an N x N tensor; `blockwise` is how a CPU runs it, and `fused` how a
GPU does, with gradients; `row` takes a single query. What they do not offer runs in plain operations (`dense`).
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .blockwise import BlockwiseCall, forward, plan
from .dense import attend_dense, combined
from .errors import ConfigError
from .fused import obstacle
from .line import Bias, bias_at, hide, line_of
from .operators import attend_blockwise, attend_fused
from .row import attend_row
from .tracing import autocast_dtype, traced
from .visibility import dense, is_runs

BLOCKWISE, FUSED, ROW, DENSE = "blockwise", "fused", "row", "dense"
"""How an attention runs: see the files of these names."""


class Attended(NamedTuple):
    """Output (batch, heads, Q, d_v), weights (batch, heads, Q, K) if asked for, and how it ran."""

    output: Tensor
    weights: Tensor | None
    backend: str


class AttentionCall(NamedTuple):
    """The arguments of one `attention`, checked, and with what it leaves open filled in.

    ``line`` (heads, Q + K - 1) is the bias by descending offset, or where there are ``positions`` one entry of it; the
    offsets ``lowest .. highest`` are seen where there is no mask, ``constant`` is the bias' ``constant_beyond``.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Bias
    line: Tensor
    mask: Tensor | None
    first_offset: int | Tensor
    positions: tuple[Tensor, Tensor] | None
    lowest: int | None
    highest: int | None
    constant: tuple[int | None, int | None]
    scale: float
    softcap: float | None
    sinks: Tensor | None
    dropout: float
    need_weights: bool


def backend(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool = True, mask: Tensor | None = None,
    first_offset: int | Tensor | None = None, positions: tuple[Tensor, Tensor] | None = None,
    window: int | None = None, softcap: float | None = None, sinks: Tensor | None = None, dropout: float = 0.0,
    need_weights: bool = False, bias_gradient: bool = True,
) -> tuple[str, str]:  # fmt: skip
    """Which way `attention` takes for such arguments, and where it is the slow one, why.

    ``bias_gradient`` is whether the bias has a gradient to be computed.
    """
    if need_weights:
        return DENSE, "the attention weights were asked for"
    if softcap is not None:
        return DENSE, "scores have a soft cap"
    if sinks is not None:
        return DENSE, "the softmax has sinks"
    if dropout:
        return DENSE, f"attention dropout is {dropout}"
    bias_gradient = bias_gradient and torch.is_grad_enabled()
    if query.shape[2] == 1 and not bias_gradient and not (torch.is_grad_enabled() and query.requires_grad):
        return ROW, ""
    if positions is not None:
        return DENSE, "position_ids are not the tokens' indices less a constant"
    if torch.jit.is_tracing():  # the other ways look at the mask, and a graph would keep what they saw
        return DENSE, "torch.jit.trace is at work"
    if mask is not None and mask.is_floating_point():
        return DENSE, "the mask is of floating point"
    if isinstance(first_offset, Tensor):
        return DENSE, "several queries on a static cache are compiled"
    if query.device.type == "cpu":
        return BLOCKWISE, ""
    if reason := obstacle(query, value):
        return DENSE, reason
    return FUSED, ""


def attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Bias, *, scale: float, causal: bool, mask: Tensor | None = None,
    first_offset: int | Tensor | None = None, positions: tuple[Tensor, Tensor] | None = None,
    window: int | None = None, softcap: float | None = None, sinks: Tensor | None = None, dropout: float = 0.0,
    need_weights: bool = False,
) -> Attended:  # fmt: skip
    """Softmax attention whose scores are ``scale * q k^T`` plus ``bias(i - j)``.

    Args:
        query: (batch, heads, Q, d), any floating dtype. The bias must have as many heads.
        key, value: (batch, key-value heads, K, d) and (batch, key-value heads, K, d_v); heads are grouped if fewer.
        bias: maps offsets to (heads, n); added after scaling, and after the soft cap where there is one.
        scale: factor of the content term.
        causal: whether keys after the query are hidden; ``window``: so are those at its distance or further, before the
            query and (not causal) after it. Both only used where ``mask`` is None: a mask holds causality.
        mask: (batch or 1, heads or 1, Q or 1, K), boolean, True where allowed, or additive floating point; or runs
            (batch or 1, 1, Q, 2), int32: the first key and one past the last key that each query sees.
        first_offset: offset of the first query and first key; by default the last query and key coincide.
        positions: of the queries, (batch or 1, Q), and of the keys, (batch or 1, K), integers: the bias is that of
            their differences, in the slow, dense way. What is hidden still goes by the indices.
        softcap: ``c * tanh(score / c)`` on the content term (Gemma 2).
        sinks: (heads,) one logit per head that takes part in the softmax and has no value (GPT-OSS).
        dropout: probability, applied to the attention weights.
        need_weights: also return the weights (batch, heads, Q, K).

    Returns the output, the weights or None, and the way it took, which `backend` tells: soft caps, sinks, dropout,
    weights and masks of floating point take the slow, dense one, which says so once. A query that sees no key gets
    zeros, except from a mask of floating point, whose lowest number is a number. Raises ConfigError for a mask or a
    bias of another shape.
    """
    query, key, value, first_offset = _settled(query, key, value, first_offset)
    line = _line(bias, query, key, first_offset, positions)
    _check(query, key, line, mask)
    if mask is not None and mask.shape[2] == 1:
        mask = mask.expand(-1, -1, query.shape[2], -1)
    constant = getattr(bias, "constant_beyond", (None, None))
    call = AttentionCall(
        query, key, value, bias, line, mask, first_offset, positions, *_rule(causal, window), constant, scale, softcap,
        sinks, dropout, need_weights,
    )  # fmt: skip
    way, reason = backend(
        query, key, value, mask=mask, first_offset=first_offset, positions=positions, softcap=softcap, sinks=sinks,
        dropout=dropout, need_weights=need_weights, bias_gradient=line.requires_grad,
    )  # fmt: skip
    if way == DENSE:
        _say_once(reason)
    return Attended(*WAYS[way](call), way)


def _settled(
    query: Tensor, key: Tensor, value: Tensor, first_offset: int | Tensor | None
) -> tuple[Tensor, Tensor, Tensor, int | Tensor]:
    """What autocast casts, cast; and the offset of the first query and key."""
    if first_offset is None:
        first_offset = key.shape[2] - query.shape[2]
    if (dtype := autocast_dtype(query.device)) is not None:
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if isinstance(first_offset, Tensor) and query.shape[2] > 1 and not torch.compiler.is_compiling():
        first_offset = int(first_offset)  # a static cache's; the last bit of a prompt is not worth a graph
    return query, key, value, first_offset


def _line(
    bias: Bias, query: Tensor, key: Tensor, first_offset: int | Tensor, positions: tuple[Tensor, Tensor] | None
) -> Tensor:
    """See `AttentionCall`."""
    if positions is not None:  # every pair has a bias of its own: this is for its heads and gradient
        return line_of(bias, 0, 1, query.device)
    queries, keys = query.shape[2], key.shape[2]
    return line_of(bias, first_offset + (queries - 1), queries + keys - 1, query.device)


def _check(query: Tensor, key: Tensor, line: Tensor, mask: Tensor | None) -> None:
    if line.shape[0] != query.shape[1]:
        raise ConfigError(f"the bias has {line.shape[0]} heads and the query {query.shape[1]}: they must be as many")
    if mask is None or is_runs(mask):
        return
    shape, wanted = tuple(mask.shape), (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    fits = len(shape) == 4 and shape[3] == wanted[3] and all(shape[i] in (1, wanted[i]) for i in range(3))
    if not fits or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise ConfigError(
            f"an attention mask of shape {shape} and {mask.dtype}: it must be boolean (True where allowed) or floating "
            f"point (added), of shape {wanted}, where the first three may be 1"
        )


def _rule(causal: bool, window: int | None) -> tuple[int | None, int | None]:
    """The lowest and the highest offset that are seen."""
    highest = None if window is None else window - 1
    return (0 if causal else None if highest is None else -highest), highest


def _fused(call: AttentionCall) -> tuple[Tensor, None]:
    out, _ = attend_fused(
        call.query, call.key, call.value, call.line, call.mask, int(call.first_offset), call.lowest, call.highest,
        call.scale, call.constant[1],
    )  # fmt: skip
    return out, None


def _blockwise(call: AttentionCall) -> tuple[Tensor, None]:
    query, key, value, line = call.query, call.key, call.value, call.line
    width, value_width = query.shape[-1], value.shape[-1]
    if width != value_width:  # the kernels want equal widths (MLA's differ); zeros change nothing
        wide = max(width, value_width)
        query, key, value = (F.pad(x, (0, wide - x.shape[-1])) for x in (query, key, value))
    if query.dtype == torch.float64:
        line = line.double()
    tensors, first_offset, rule = (query, key, value, line), int(call.first_offset), (call.lowest, call.highest)
    if traced(query) or (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
        out, _ = attend_blockwise(*tensors, call.mask, first_offset, *rule, call.scale, *call.constant)
    else:
        seen = plan(call.mask, len(query), query.shape[2], key.shape[2], first_offset, *rule)
        out, _ = forward(BlockwiseCall(*tensors, seen, first_offset, call.scale, call.constant[1]))
    return out[..., :value_width], None


def _row(call: AttentionCall) -> tuple[Tensor, None]:
    line, mask = _hidden(call)
    matrix = line[None, :, None] if call.positions is None else bias_at(call.bias, *call.positions)
    matrix = matrix if mask is None else combined(matrix, mask)
    return attend_row(call.query, call.key, call.value, matrix, call.scale), None


def _dense(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    line, mask = _hidden(call)
    queries, keys = call.query.shape[2], call.key.shape[2]

    def matrix_of(start: int, end: int) -> Tensor:
        if call.positions is not None:
            return bias_at(call.bias, call.positions[0][:, start:end], call.positions[1])
        return line[:, queries - end : queries - start + keys - 1].unfold(1, keys, 1).flip(1)[None]

    return attend_dense(
        call.query, call.key, call.value, matrix_of, mask, call.scale, call.softcap, call.sinks, call.dropout,
        call.need_weights,
    )  # fmt: skip


WAYS = {FUSED: _fused, BLOCKWISE: _blockwise, ROW: _row, DENSE: _dense}


def _hidden(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """The line and the mask, boolean or of floating point, that together hide what is hidden."""
    queries, keys = call.query.shape[2], call.key.shape[2]
    if call.mask is not None:
        return call.line, dense(call.mask, keys) if is_runs(call.mask) else call.mask
    if call.positions is None:
        return hide(call.line, call.first_offset + (queries - 1), call.lowest, call.highest), None
    return call.line, _visible(queries, keys, call.first_offset, call.lowest, call.highest, call.query.device)


def _visible(
    queries: int, keys: int, first_offset: int | Tensor, lowest: int | None, highest: int | None, device: torch.device
) -> Tensor | None:
    """The mask (1, 1, Q, K) of the offsets ``lowest .. highest`` of indices; None where none is hidden."""
    if lowest is None and highest is None:
        return None
    offset = first_offset + torch.arange(queries, device=device)[:, None] - torch.arange(keys, device=device)
    seen = offset >= lowest if lowest is not None else torch.ones_like(offset, dtype=torch.bool)
    return (seen if highest is None else seen & (offset <= highest))[None, None]


_SAID: set[str] = set()


def _say_once(reason: str) -> None:
    if reason not in _SAID and not torch.compiler.is_compiling():
        _SAID.add(reason)
        warnings.warn(f"rpb_retrofit: attention takes its slow path: {reason}", stacklevel=3)
