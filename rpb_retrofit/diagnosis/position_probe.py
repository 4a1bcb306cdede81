"""What positions do in a running model, seen alone.

Every attention is shown the same hidden state at every position. Whatever then differs between two keys is the work of
positions, and of nothing else: queries and keys that differ from position to position betray a rotation, or a scale
that grows with the position; and the logarithm of the attention weights *is* the bias, but for one constant a row. The
model's own code computes all of it, in one forward pass, with its own masks; nothing here knows what it should be.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rpb_retrofit.instruments.interception import Attend, intercepted
from rpb_retrofit.instruments.modes import evaluating
from rpb_retrofit.runtime.anatomy import Anatomy
from rpb_retrofit.runtime.families import FACTOR, TABLE
from rpb_retrofit.runtime.interface import CAUSAL
from rpb_retrofit.tables.recording import run

CONTENT = 0.3
"""Standard deviation of the random queries and keys that show the scale of the content: far from where a soft cap
bends."""


FAINTEST = {torch.float16: 1e-4}
"""The least weight that still has the digits of its dtype; smaller ones are lost."""


@dataclass(frozen=True)
class AttentionProbe:
    """What one attention does with positions.

    ``offsets`` (n,), int64, and ``bias`` (heads, n), float64: what is added to the scores at each offset that was seen,
    up to a constant per head; minus infinity where the weight is lost below the smallest number.
    ``asked``: the least and the largest offset that the bias was asked for, None if it was not.
    ``turning`` (d,): by how much the directions of queries or keys differ between positions, by dimension, relative to
    the size of a mean entry.
    ``growth``: how many times longer the longest query is than the shortest one.
    ``scale`` (heads,): what the product of query and key is multiplied by; None where a model keeps its queries to
    itself.
    ``by_row``: the largest difference of the bias between two queries at the same offset.
    """

    offsets: Tensor
    bias: Tensor
    asked: tuple[int, int] | None
    turning: Tensor | None
    growth: float
    scale: Tensor | None
    by_row: float


@dataclass(frozen=True)
class PositionProbe:
    """The probes by the attention's name, in running order; attentions that never ran are missing.

    ``embedded``: by how much the embeddings of one token differ between positions, relative to their size.
    """

    probes: dict[str, AttentionProbe]
    embedded: float


@torch.no_grad()
def position_probe(anatomy: Anatomy, length: int, far: int = 0) -> PositionProbe:
    """The probes of a model's attentions, at ``length`` tokens; of causal ones also at ``far`` keys."""
    model, attentions = anatomy.model, anatomy.attentions
    probes: dict[str, AttentionProbe] = {}
    embedded: list[float] = []
    # A token between the special ones, which an embedding may treat in its own way.
    window = torch.full((length,), model.config.get_text_config().vocab_size // 2)
    with ExitStack() as undo:
        for name, module in attentions.items():
            undo.callback(
                module.register_forward_pre_hook(partial(_still, embedded), prepend=True, with_kwargs=True).remove
            )
            if not anatomy.family.uses_interface:
                undo.callback(module.register_forward_hook(partial(_by_weights, probes, name)).remove)
        if anatomy.family.uses_interface:
            undo.enter_context(intercepted(anatomy, partial(_probe, probes, attentions, far)))
        undo.enter_context(evaluating(model))
        run(model, window)
    return PositionProbe(probes, embedded[0] if embedded else 0.0)


def _still(embedded: list[float], module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Forward pre-hook of an attention: its first hidden state at every position."""
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    if not embedded:
        embedded.append(_spread(hidden[0].double()[None]).max().item())
    still = hidden[:, :1].expand_as(hidden).contiguous()
    return ((still, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": still})


def _spread(x: Tensor) -> Tensor:
    """(heads, n, d) -> (d,): the largest distance from the first position, relative to the size of the whole."""
    return (x - x[:, :1]).abs().amax((0, 1)) / x.square().mean().sqrt().clamp(min=1e-12)


def _turned(x: Tensor) -> Tensor:
    """`_spread` of the directions alone."""
    return _spread(torch.nn.functional.normalize(x, dim=-1))


def _probe(
    probes: dict[str, AttentionProbe], attentions: Mapping[str, Any], far: int, name: str, attend: Attend
) -> Attend:
    """``attend`` of the attention ``name``, which is probed first."""

    def probing(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        def weights(query: Tensor, key: Tensor, mask: Tensor | None = mask) -> Tensor:
            return weights_of(partial(attend, module), query, key, value.shape[-1], mask, kwargs)

        nothing = torch.zeros_like(query), torch.zeros_like(key)
        causal = getattr(module, CAUSAL)
        with _asked_for(attentions[name]) as asked:
            blank = weights(*nothing)
        offsets, bias, by_row = _profile(blank, causal)
        if causal and far > len(offsets):
            # Two queries, since one alone is decoding, which has a way of its own.
            keys = key.new_zeros(1, key.shape[1], far, key.shape[3])
            row = weights(nothing[0][:, :, -2:], keys, None)[:, -1].log().double()
            offsets, bias = torch.arange(far), row.flip(1)
        first = module._modules.get(FACTOR, lambda x: x)
        generator = torch.Generator().manual_seed(0)
        some = [torch.randn(x.shape, generator=generator).to(x) * CONTENT for x in (query, key)]
        product = first(some[0])[0, :, -1:].double() @ some[1][0].double().repeat_interleave(
            query.shape[1] // key.shape[1], 0
        ).transpose(1, 2)
        lengths = query[0].double().norm(dim=-1)
        content = (weights(*some)[:, -1] / blank[:, -1]).log().double()  # infinite where either is lost
        probes[name] = AttentionProbe(
            offsets=offsets,
            bias=bias,
            asked=(min(asked), max(asked)) if asked else None,
            turning=torch.maximum(_turned(query[0].double()), _turned(key[0].double())).cpu(),
            growth=(lengths.amax(1) / lengths.amin(1).clamp(min=1e-12)).max().item(),
            scale=_slope(product[:, 0].cpu(), content),
            by_row=by_row,
        )
        return attend(module, query, key, value, mask, **kwargs)

    return probing


def weights_of(
    attend: Attend, query: Tensor, key: Tensor, width: int, mask: Tensor | None, kwargs: dict[str, Any]
) -> Tensor:
    """The weights (heads, Q, K), float32, that an attention gives: the values of each key in turn are one, else zero.

    No attention is asked to hand out its weights, since that might make it run in another way.
    """
    keys, parts = key.shape[2], []
    for start in range(0, keys, width):
        count = min(width, keys - start)
        value = key.new_zeros(*key.shape[:3], width)
        value[:, :, torch.arange(start, start + count), torch.arange(count)] = 1
        output, _ = attend(query, key, value, mask, **kwargs)
        parts.append(output[0, :, :, :count].float().cpu())  # (Q, heads, count)
    weights = torch.cat(parts, -1).transpose(0, 1)
    return torch.where(weights > FAINTEST.get(key.dtype, 0.0), weights, 0)


def _profile(weights: Tensor, causal: bool) -> tuple[Tensor, Tensor, float]:
    """Offsets (n,), the bias (heads, n), and by how much rows disagree about it, from weights (heads, Q, K)."""
    log, length = weights.log().double(), weights.shape[1]
    keys = torch.arange(length)
    rows = (length - 1, length // 2) if causal else (length // 2, length // 3)
    offsets, bias = rows[0] - keys, log[:, rows[0]]
    other = log[:, rows[1]].roll(rows[0] - rows[1], -1)  # at the same offsets, where both rows have them
    both = bias.isfinite() & other.isfinite() & (rows[1] - offsets >= 0) & (rows[1] - offsets < length)
    difference = torch.where(both, bias - other, 0)
    centred = torch.where(both, difference - difference.sum(-1, True) / both.sum(-1, True).clamp(min=1), 0)
    order = offsets.argsort()
    return offsets[order], bias[:, order], centred.abs().max().item()


def _slope(x: Tensor, y: Tensor) -> Tensor:
    """The slope (heads,) of ``y`` on ``x``, both (heads, K), where ``y`` is finite."""
    seen = y.isfinite()
    count = seen.sum(-1, True).clamp(min=1)
    y = torch.where(seen, y, 0)
    x, y = (torch.where(seen, v - torch.where(seen, v, 0).sum(-1, True) / count, 0) for v in (x, y))
    return (x * y).sum(-1) / x.square().sum(-1).clamp(min=1e-12)


@contextmanager
def _asked_for(module: Any) -> Iterator[list[int]]:
    """Inside, the list grows by the ends of the offsets that a module's bias is asked for."""
    asked: list[int] = []
    bias = module._modules.get(TABLE)

    def hear(bias: Any, args: tuple[Any, ...]) -> None:
        (offset,) = args
        if len(offset):
            asked.extend(
                (min(offset), max(offset)) if isinstance(offset, range) else (int(offset.min()), int(offset.max()))
            )

    handle = bias.register_forward_pre_hook(hear) if bias is not None else None
    try:
        yield asked
    finally:
        if handle is not None:
            handle.remove()


def _by_weights(probes: dict[str, AttentionProbe], name: str, module: Any, args: Any, output: tuple[Any, ...]) -> None:
    """Forward hook of an attention that does not use the interface: its own weights show the bias."""
    offsets, bias, by_row = _profile(output[1][0].float().cpu(), causal=True)
    probes[name] = AttentionProbe(offsets, bias, None, None, 1.0, None, by_row)
