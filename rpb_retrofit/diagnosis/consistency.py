"""Whether the same text gets the same logits however it is fed: cached, padded, packed, alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

MOST = {torch.float32: 1e-3, torch.float64: 1e-6, torch.bfloat16: 0.1, torch.float16: 0.05}
"""Difference of logits, relative to the largest one, that no rounding explains, by dtype: a bound for a noise that is
measured on a model which a fault may have spoiled."""

LEAST, TIMES = 0.1, 10.0
"""What rounding explains is so many times the measured noise, since other shapes add up in other orders: the ways of
healthy models differ by up to 4 times it (model_cards/diagnosis.md); and no less than this share of `MOST`, since the
noise of one batch may happen to be zero."""


@dataclass(frozen=True)
class Way:
    """One way to feed a text: the largest difference of its logits from the plain pass, relative to the largest one.

    ``error``: what was raised in the place of logits; ``broken``: logits that are no numbers; ``far``: KL of what is
    predicted then from what the plain pass predicts, in nats a token.
    """

    difference: float
    error: str = ""
    broken: int = 0
    far: float = 0.0


@dataclass(frozen=True)
class Ways:
    """The ways by name. ``noise``: by how much logits differ where only the number of equal rows does, or of tokens
    that follow, which is rounding; ``allowed``: the difference that it explains."""

    by_name: dict[str, Way]
    noise: float
    allowed: float

    @property
    def broken(self) -> dict[str, int]:
        """How many logits are no numbers, by the way; only those where some are."""
        return {name: way.broken for name, way in self.by_name.items() if way.broken}


def consistency(model: Any, ids: Tensor, long: Tensor, dtype: torch.dtype) -> Ways:
    """How a causal model's logits of the text ``ids`` (n,), and of parts of it, depend on the way it is fed; and those
    of the last tokens of a ``long`` one (m,) on whether what is before them is cached. It computes in ``dtype``."""
    found = _ways(model, ids, long)
    noise, most = found.pop("noise").difference, MOST.get(dtype, MOST[torch.float32])
    return Ways(found, noise, min(most, max(LEAST * most, TIMES * noise)))


@torch.no_grad()
def _ways(model: Any, ids: Tensor, long: Tensor) -> dict[str, Way]:
    ids = ids.to(model.device)[None]
    half, length = ids.shape[1] // 2, ids.shape[1]
    first, second = ids[:, :half], ids[:, half:]
    pad = torch.zeros(1, min(7, length - half), dtype=torch.long, device=ids.device)
    real, padded = torch.ones_like(first), torch.zeros_like(pad)
    positions = torch.arange(length, device=ids.device)

    def logits(tokens: Tensor, **kwargs: Any) -> Tensor:
        return model(input_ids=tokens, use_cache=False, **kwargs).logits[0].float()

    def cached(cache: Any, steps: list[int]) -> Tensor:
        parts: list[Tensor] = []
        start = 0
        for end in steps:
            out = model(input_ids=ids[:, start:end], past_key_values=cache, use_cache=True)
            parts, start = [*parts, out.logits[0].float()], end
        return torch.cat(parts)

    whole, last = long.to(model.device)[None], 6

    def late() -> Tensor:
        cache: Any = DynamicCache(config=model.config)
        parts, at = [], whole.shape[1] - last
        for start, end in [(0, at), *((n, n + 1) for n in range(at, whole.shape[1]))]:
            logits = model(input_ids=whole[:, start:end], past_key_values=cache, use_cache=True).logits
            parts.append(logits[0, -1:].float())
        return torch.cat(parts[1:])

    cuts = [max(2, length - 3), max(2, length // 3)]
    steps = [half, *range(half + 1, min(half + 9, length - 1)), length]
    pair = torch.cat([torch.cat([pad, first], 1), ids[:, : half + pad.shape[1]]])
    mask = torch.ones_like(pair)
    mask[0, : pad.shape[1]] = 0
    ways: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
        "noise": (
            lambda: torch.cat(
                [
                    *(row.float() for row in model(input_ids=ids.repeat(2, 1), use_cache=False).logits),
                    *(logits(ids[:, :cut]) for cut in cuts),
                ]
            ),
            lambda: torch.cat([whole_text[:cut] for whole_text in [logits(ids)] for cut in (length, length, *cuts)]),
        ),
        "dynamic cache": (lambda: cached(DynamicCache(config=model.config), steps), lambda: logits(ids)),
        "static cache": (
            lambda: cached(StaticCache(config=model.config, max_cache_len=length + 16), steps),
            lambda: logits(ids),
        ),
        "another last token": (
            lambda: logits(torch.cat([ids[:, :-1], ids[:, :1] if ids[0, 0] != ids[0, -1] else ids[:, 1:2]], 1))[:-1],
            lambda: logits(ids)[:-1],
        ),
        "far decoding": (late, lambda: logits(whole)[-last:]),
        "left padding": (
            lambda: logits(torch.cat([pad, first], 1), attention_mask=torch.cat([padded, real], 1))[pad.shape[1] :],
            lambda: logits(first),
        ),
        "right padding": (
            lambda: logits(torch.cat([first, pad], 1), attention_mask=torch.cat([real, padded], 1))[:half],
            lambda: logits(first),
        ),
        "batch": (
            lambda: torch.cat(
                [
                    part.float()
                    for rows in model(
                        input_ids=pair.repeat(2, 1), attention_mask=mask.repeat(2, 1), use_cache=False
                    ).logits.unflatten(0, (2, 2))
                    for part in (rows[0, pad.shape[1] :], rows[1])
                ]
            ),
            lambda: torch.cat([logits(first), logits(pair[1:])]).repeat(2, 1),
        ),
        "packing": (
            lambda: logits(ids, position_ids=torch.where(positions < half, positions, positions - half)[None])[half:],
            lambda: logits(second),
        ),
    }
    return {name: _compare(*way) for name, way in ways.items()}


def _compare(fed: Callable[[], Tensor], plain: Callable[[], Tensor]) -> Way:
    try:
        got, want = fed(), plain()
    except Exception as error:  # whatever a model raises where it cannot do this
        return Way(0.0, f"{type(error).__name__}: {error}".splitlines()[0])
    broken = int((~got.isfinite()).sum() + (~want.isfinite()).sum())
    size = want.nan_to_num().abs().max().clamp(min=1e-12)
    far = 0.0
    if not broken:
        own, plainly = got.log_softmax(-1), want.log_softmax(-1)
        far = max(0.0, (plainly.exp() * (plainly - own)).sum(-1).mean().item())
    return Way(((got - want).nan_to_num().abs().max() / size).item(), "", broken, far)
