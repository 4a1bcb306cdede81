"""Whether the bias that acts in an attention is the one that its table promises, and if not, what became of it.

What a table promises is computed by Transformers' own T5, which shares no code with the runtime that is examined.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.models.t5.modeling_t5 import T5Attention

from rpb_retrofit.diagnosis.position_probe import AttentionProbe
from rpb_retrofit.runtime.bias import RelativePositionBias

FAITHFUL = "faithful"
CLOSE = {torch.float32: 2e-3, torch.float64: 2e-3, torch.bfloat16: 0.06, torch.float16: 0.01}
"""Nats by which a bias may differ from its table and still be it: the rounding of attention weights in a dtype."""

FAINT = 60.0
"""Nats below a row's largest bias beyond which a weight says nothing."""


@dataclass(frozen=True)
class BiasCheck:
    """What acts, beside what the table says: ``kind`` (`FAITHFUL`, or what became of it), the largest difference
    in nats, and the number that goes with the kind: a factor, a shift, the other attention's or heads' names."""

    kind: str
    difference: float
    detail: Any = None


def expected_bias(bias: RelativePositionBias, offsets: Tensor) -> Tensor:
    """The bias (heads, n), float64, that a module's numbers mean at ``offsets`` (n,), int64."""
    bucketing, weight = bias.bucketing, bias.weight.detach().double().cpu()
    bucket = T5Attention._relative_position_bucket(
        -offsets, bucketing.bidirectional, bucketing.num_buckets, bucketing.max_distance
    )
    line = weight[:, bucket]
    if bias.tail is not None:
        beyond = (offsets.abs().double() / bucketing.max_distance).clamp(min=1).log()
        slopes = bias.tail.detach().double().cpu().clamp(max=0)
        for direction, there in enumerate((offsets >= 0, offsets < 0)[: slopes.shape[1]]):
            line = line + slopes[:, direction, None] * torch.where(there, beyond, 0)
    return line


def compare(
    name: str, probe: AttentionProbe, biases: Mapping[str, RelativePositionBias], width: int, dtype: torch.dtype
) -> BiasCheck:
    """What became of the table of attention ``name``, whose heads are ``width`` wide."""
    bias, offsets = biases[name], probe.offsets
    allowed = CLOSE.get(dtype, CLOSE[torch.float32])

    def differs(want: Tensor) -> float:
        return _difference(probe.bias, want)

    own = expected_bias(bias, offsets)
    plain = differs(own)
    if plain <= allowed * max(1.0, _reach(own, probe.bias)):
        return BiasCheck(FAITHFUL, plain)
    matching = [
        BiasCheck(kind, plain, detail)
        for kind, detail, want in _suspects(name, probe, biases, own, width)
        if differs(want) <= max(allowed * max(1.0, _reach(want, probe.bias)), 0.02 * plain)
    ]
    return matching[0] if matching else BiasCheck("changed in no way that is known", plain)


def _suspects(
    name: str, probe: AttentionProbe, biases: Mapping[str, RelativePositionBias], own: Tensor, width: int
) -> Iterator[tuple[str, Any, Tensor]]:
    """What may have become of a table: the kind, its number, and the bias that would act then."""
    bias, offsets = biases[name], probe.offsets
    reverse = expected_bias(bias, -offsets)
    asked = probe.asked
    if bias.bucketing.bidirectional or (asked is not None and -asked[0] > asked[1]):
        yield "reversed", None, reverse
    else:
        if _difference(bias(-offsets.to(bias.weight.device)).detach().double().cpu(), own) < CLOSE[torch.float32]:
            yield "reversed", None, reverse
    yield "dropped", None, torch.zeros_like(own)
    for shift in (1, -1, 2, -2, 3, -3):
        yield "shifted", shift, expected_bias(bias, offsets + shift)
    factor = _factor(probe.bias, own)
    if factor is not None:
        kinds = {1 / math.sqrt(width): "scaled by 1/sqrt(d)", math.sqrt(width): "scaled by sqrt(d)", -1.0: "negated"}
        close = min(kinds, key=lambda known: abs(known - factor))
        yield (kinds[close] if abs(close - factor) < 0.02 * abs(close) else "scaled"), factor, factor * own
    slopes = (probe.bias - own).nan_to_num(neginf=0)[:, [0, -1]].diff() / (offsets[-1] - offsets[0])
    yield "with slopes of the offset added", slopes[:, 0].tolist(), own + slopes * offsets
    order = _best_heads(probe.bias, own)
    if order != list(range(len(own))):
        yield "with its heads in another order", order, own[order]
    for other in biases:
        if other != name and len(biases[other].weight) == len(own):
            yield "another layer's", other, expected_bias(biases[other], offsets)


def _difference(acts: Tensor, want: Tensor) -> float:
    """The largest difference in nats of two biases (heads, n) of which each row is known up to a constant."""
    seen = (acts > acts.amax(-1, True) - FAINT) & (want > want.amax(-1, True) - FAINT)
    difference = torch.where(seen, acts - want, 0)
    count = seen.sum(-1, True).clamp(min=1)
    return torch.where(seen, difference - difference.sum(-1, True) / count, 0).abs().max().item()


def _reach(want: Tensor, acts: Tensor) -> float:
    """How far a bias (heads, n) spreads, in nats: rounding grows with it."""
    return min(FAINT, (want.amax(-1) - want.amin(-1)).max().item()) / 10


def _factor(acts: Tensor, own: Tensor) -> float | None:
    """The number that the expected bias (heads, n) is multiplied by, by least squares; None where it is constant."""
    seen = acts > acts.amax(-1, True) - FAINT
    count = seen.sum(-1, True).clamp(min=1)
    a, o = (torch.where(seen, x - torch.where(seen, x, 0).sum(-1, True) / count, 0) for x in (acts, own))
    square = o.square().sum()
    return None if square < 1e-9 else ((a * o).sum() / square).item()


def _best_heads(acts: Tensor, own: Tensor) -> list[int]:
    """For each acting head, the expected one that it is nearest to."""
    return [
        min(range(len(own)), key=lambda other: _difference(acts[head, None], own[other, None]))
        for head in range(len(acts))
    ]
