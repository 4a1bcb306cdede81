"""Attention with a bias of the offset. Nothing here knows where the bias comes from: it is any function of ``i - j``.

A bias of the offset is a vector, never an N x N tensor; `blockwise` is how a CPU runs it, and `fused` how a GPU does,
with gradients. This file says what attention with a bias is, and chooses how it runs; what they do not offer runs in
plain operations.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .blockwise import Call, forward, plan
from .blockwise import attend as attend_in_blocks
from .errors import ConfigError
from .fused import attend as attend_fused
from .fused import obstacle
from .tracing import traced
from .visibility import dense, is_runs

Bias = Callable[[Any], Tensor]
"""Offsets, a Tensor (n,) of int64, to the bias, (heads, n) float32. Two attributes, where it has them, make it cheaper:
``constant_beyond``, (before, start): it is one constant per head at offsets up to ``before`` and one from ``start`` on
(None: no such end), so gradients need only their sums there; ``takes_range``: consecutive descending offsets may also
come as a range, so nothing needs to be computed for each of them."""


BLOCKWISE, FUSED, ROW, DENSE = "blockwise", "fused", "row", "dense"
"""How an attention runs: see the files of the first two; ``row``: one query by one call of PyTorch's attention, as in
decoding; ``dense``: with a bias for every pair of a block of queries, in plain operations, which is slow."""

DENSE_BLOCK = 256
"""Queries per block of the dense path."""


def reversed_bias(bias: Bias, queries: int, keys: int, first_offset: int | Tensor, device: torch.device) -> Tensor:
    """The bias of ``queries`` x ``keys`` as a view (heads, queries, keys), float32, with the queries in reverse order.

    ``first_offset`` is the offset of the first query and the first key.
    """
    return _line(bias, first_offset + (queries - 1), queries + keys - 1, device).unfold(1, keys, 1)


def bias_matrix(bias: Bias, queries: int, keys: int, first_offset: int | Tensor, device: torch.device) -> Tensor:
    """The bias of every (query, key) pair as a tensor (heads, queries, keys), float32, queries in order."""
    return reversed_bias(bias, queries, keys, first_offset, device).flip(1)


def bias_at(bias: Bias, query: Tensor, key: Tensor) -> Tensor:
    """The bias of every pair of a position in ``query`` (rows, Q) and one in ``key`` (rows, K), integers: a tensor
    (rows, heads, Q, K), float32."""
    offset = query[:, :, None] - key[:, None, :]
    return bias(offset.flatten()).unflatten(1, offset.shape).transpose(0, 1)


def _line(bias: Bias, top: int | Tensor, count: int, device: torch.device) -> Tensor:
    """The bias of the offsets ``top, top - 1, ...``: (heads, count)."""
    graph = torch.compiler.is_compiling() or torch.jit.is_tracing()  # which would keep these very offsets
    if getattr(bias, "takes_range", False) and isinstance(top, int) and not graph:
        return bias(range(top, top - count, -1))
    return bias(top - torch.arange(count, device=device))


def _hide(line: Tensor, top: int | Tensor, lowest: int | None, highest: int | None) -> Tensor:
    """A line with minus infinity outside the offsets ``lowest .. highest``."""
    offset = top - torch.arange(line.shape[1], device=line.device)
    if lowest is not None:
        line = line.masked_fill(offset < lowest, -torch.inf)
    if highest is not None:
        line = line.masked_fill(offset > highest, -torch.inf)
    return line


def _visible(
    queries: int, keys: int, first_offset: int | Tensor, lowest: int | None, highest: int | None, device: torch.device
) -> Tensor | None:
    """The mask (1, 1, Q, K) of the offsets ``lowest .. highest`` of indices; None where none is hidden."""
    if lowest is None and highest is None:
        return None
    offset = first_offset + torch.arange(queries, device=device)[:, None] - torch.arange(keys, device=device)
    seen = offset >= lowest if lowest is not None else torch.ones_like(offset, dtype=torch.bool)
    return (seen if highest is None else seen & (offset <= highest))[None, None]


class Attended(NamedTuple):
    """Output (batch, heads, Q, d_v), weights (batch, heads, Q, K) if asked for, and how it ran."""

    output: Tensor
    weights: Tensor | None
    backend: str


def backend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = True,
    mask: Tensor | None = None,
    first_offset: int | Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    need_weights: bool = False,
    bias_gradient: bool = True,
    positions: tuple[Tensor, Tensor] | None = None,
) -> tuple[str, str]:
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
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Bias,
    *,
    scale: float,
    causal: bool,
    mask: Tensor | None = None,
    first_offset: int | Tensor | None = None,
    positions: tuple[Tensor, Tensor] | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    need_weights: bool = False,
) -> Attended:
    """Softmax attention whose scores are ``scale * q k^T`` plus ``bias(i - j)``.

    Args:
        query: (batch, heads, Q, d), any floating dtype. The bias must have as many heads.
        key, value: (batch, key-value heads, K, d) and (batch, key-value heads, K, d_v); heads are grouped if fewer.
        bias: maps offsets to (heads, n); added after scaling, and after the soft cap where there is one.
        scale: factor of the content term.
        causal: whether keys after the query are hidden. Only used where ``mask`` is None: a mask holds causality.
        mask: (batch or 1, heads or 1, Q or 1, K), boolean, True where allowed, or additive floating point; or runs
            (batch or 1, 1, Q, 2), int32: the first key and one past the last key that each query sees.
        first_offset: offset of the first query and first key; by default the last query and key coincide.
        positions: of the queries, (batch or 1, Q), and of the keys, (batch or 1, K), integers: the bias is that of
            their differences, in the slow, dense way. What is hidden still goes by the indices.
        window: keys at a distance of ``window`` or more are hidden, before the query and (not causal) after it. Only
            used where ``mask`` is None.
        softcap: ``c * tanh(score / c)`` on the content term (Gemma 2).
        sinks: (heads,) one logit per head that takes part in the softmax and has no value (GPT-OSS).
        dropout: probability, applied to the attention weights.
        need_weights: also return the weights (batch, heads, Q, K).

    Returns:
        The output, the weights or None, and the way it took. A query that sees no key gets zeros, except from a mask
        of floating point, whose lowest number is a number.

    Soft caps, sinks, dropout, weights and masks of floating point take the slow, dense way, which says so once;
    `backend` tells which way it is. Raises ConfigError for a mask or a bias of another shape.
    """
    queries, keys = query.shape[2], key.shape[2]
    if first_offset is None:
        first_offset = keys - queries
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if isinstance(first_offset, Tensor) and queries > 1 and not torch.compiler.is_compiling():
        first_offset = int(first_offset)  # a static cache's; the last bit of a prompt is not worth a graph
    top = first_offset + (queries - 1)
    # At positions of their own every pair has its bias: the line is one entry then, for its heads and gradient.
    line = _line(bias, top, queries + keys - 1, query.device) if positions is None else _line(bias, 0, 1, query.device)
    _check(query, key, line, mask)
    if mask is not None and mask.shape[2] == 1:
        mask = mask.expand(-1, -1, queries, -1)
    lowest, highest = _rule(causal, window)
    constant = getattr(bias, "constant_beyond", (None, None))
    way, reason = backend(
        query, key, value, causal=causal, mask=mask, first_offset=first_offset, window=window, softcap=softcap,
        sinks=sinks, dropout=dropout, need_weights=need_weights, bias_gradient=line.requires_grad,
        positions=positions,
    )  # fmt: skip
    if way == FUSED:
        out, _ = attend_fused(query, key, value, line, mask, int(first_offset), lowest, highest, scale, constant[1])
        return Attended(out, None, way)
    if way == BLOCKWISE:
        out = _blockwise(query, key, value, line, mask, int(first_offset), lowest, highest, scale, constant)
        return Attended(out, None, way)
    if mask is not None and is_runs(mask):
        mask = dense(mask, keys)
    if mask is None and positions is None:
        line = _hide(line, top, lowest, highest)
    elif mask is None:
        mask = _visible(queries, keys, first_offset, lowest, highest, query.device)
    if way == ROW:
        matrix = line[None, :, None] if positions is None else bias_at(bias, *positions)
        out = _row(query, key, value, matrix if mask is None else _combined(matrix, mask), scale)
        return Attended(out, None, way)
    _say_once(reason)

    def matrix_of(start: int, end: int) -> Tensor:
        if positions is not None:
            return bias_at(bias, positions[0][:, start:end], positions[1])
        return line[:, queries - end : queries - start + keys - 1].unfold(1, keys, 1).flip(1)[None]

    out, weights = _dense(query, key, value, matrix_of, mask, scale, softcap, sinks, dropout, need_weights)
    return Attended(out, weights, way)


def decode(query: Tensor, key: Tensor, value: Tensor, bias: Bias, scale: float) -> Tensor | None:
    """`attention` of one query behind all its keys, with nothing to hide: (batch, 1, heads, d_v), the short way.

    None where it is not one query, or has a gradient, or is compiled or cast, or does not fit. It leaves out whatever
    `attention` does for everybody else, since it runs in each layer at every token, where each line of Python shows.
    """
    batch, heads, queries, width = query.shape
    device = query.device
    if queries != 1 or torch.is_grad_enabled() or traced(query):
        return None
    if torch.is_autocast_enabled(device.type):
        return None
    groups, keys = key.shape[1], key.shape[2]
    row = _line(bias, keys - 1, keys, device)
    if row.shape[0] != heads:
        return None
    if device.type != "cpu" or batch * groups < torch.get_num_threads() or query.dtype == torch.float64:
        return _row(query, key, value, row[None, :, None], scale).transpose(1, 2).contiguous()
    # The heads of a group stand as its queries, so that their keys are read once.
    query, row = query.reshape(batch, groups, -1, width), row.view(1, groups, -1, keys)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=row, scale=scale).reshape(batch, 1, heads, -1)


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


def _blockwise(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    line: Tensor,
    mask: Tensor | None,
    first_offset: int,
    lowest: int | None,
    highest: int | None,
    scale: float,
    constant: tuple[int | None, int | None],
) -> Tensor:
    width, value_width = query.shape[-1], value.shape[-1]
    if width != value_width:  # the kernels want equal widths (MLA's differ); zeros change nothing
        wide = max(width, value_width)
        query, key, value = (F.pad(x, (0, wide - x.shape[-1])) for x in (query, key, value))
    if query.dtype == torch.float64:
        line = line.double()
    tensors = (query, key, value, line)
    if traced(query) or (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
        out, _ = attend_in_blocks(*tensors, mask, first_offset, lowest, highest, scale, *constant)
    else:
        seen = plan(mask, len(query), query.shape[2], key.shape[2], first_offset, lowest, highest)
        out, _ = forward(Call(*tensors, seen, first_offset, scale, constant[1]))
    return out[..., :value_width]


def _row(query: Tensor, key: Tensor, value: Tensor, matrix: Tensor, scale: float) -> Tensor:
    """One query a head; ``matrix`` (1 or batch, heads, 1, K) is its bias."""
    grouped = query.shape[1] != key.shape[1]
    if query.device.type == "cpu":  # takes a float32 mask beside half-precision queries, and gives zeros for nothing
        matrix = matrix.double() if query.dtype == torch.float64 else matrix
        return F.scaled_dot_product_attention(query, key, value, attn_mask=matrix, scale=scale, enable_gqa=grouped)
    rounded = matrix.clamp(min=torch.finfo(query.dtype).min).to(query.dtype)
    if grouped:  # the heads of a group as its queries: their keys are read once
        query, rounded = (x.reshape(len(x), key.shape[1], -1, x.shape[-1]) for x in (query, rounded))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=rounded, scale=scale)
    return out.reshape(len(out), -1, 1, value.shape[-1]) * (matrix > -torch.inf).any(-1, keepdim=True)


def _combined(matrix: Tensor, mask: Tensor) -> Tensor:
    """A bias and a mask, boolean or additive, as one."""
    if mask.dtype == torch.bool:
        return torch.where(mask, matrix, -torch.inf)
    # A mask's lowest number plus a negative bias stays finite.
    return (matrix + mask.float()).clamp(min=torch.finfo(matrix.dtype).min)


def _dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    matrix_of: Callable[[int, int], Tensor],
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float,
    need_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """In plain operations, a block of queries at a time; blocks are computed again in the backward pass."""
    queries = query.shape[2]
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    outs, weights = [], []
    # A traced graph serves other lengths too, so it must not keep how many blocks there were.
    size = queries if torch.jit.is_tracing() else DENSE_BLOCK
    again = torch.is_grad_enabled() and queries > size and not need_weights and not torch.compiler.is_compiling()
    for start in range(0, queries, size):
        end = min(start + size, queries)
        part = None if mask is None else mask[:, :, start:end]
        matrix = partial(matrix_of, start, end)
        arguments = (query[:, :, start:end], key, value, matrix, part, scale, softcap, sinks, dropout)
        out, weight = checkpoint(_explicit, *arguments, use_reentrant=False) if again else _explicit(*arguments)
        outs.append(out)
        if need_weights:
            weights.append(weight)
    return torch.cat(outs, 2), torch.cat(weights, 2) if need_weights else None


def _explicit(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    matrix_of: Callable[[], Tensor],
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    matrix = matrix_of()
    scores = (query @ key.transpose(2, 3)).to(matrix.dtype) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + (matrix if mask is None else _combined(matrix, mask))
    if sinks is not None:
        sink = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    else:
        nothing = (scores == -torch.inf).all(-1, keepdim=True)  # whose softmax would be no number
        weights = scores.masked_fill(nothing, 0).softmax(-1).masked_fill(nothing, 0)
    weights = weights.to(value.dtype)
    return F.dropout(weights, dropout) @ value, weights


_SAID: set[str] = set()


def _say_once(reason: str) -> None:
    if reason not in _SAID and not torch.compiler.is_compiling():
        _SAID.add(reason)
        warnings.warn(f"rpb_retrofit: attention takes its slow path: {reason}", stacklevel=3)
