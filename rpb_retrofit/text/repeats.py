"""Spans that come again, somewhere below, planted in windows of text.

Natural text hardly rewards attention to what stands far above, so tables that are fitted to it, and models that are
trained on it, learn to leave it alone: the loss stays, and the model no longer copies from the beginning of a long
prompt. What comes again is predicted by nothing but that attention. So some spans of each window are written a second
time below; many of them of random tokens, which nothing else predicts at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import torch
from torch import Tensor

SPANS = (16, 64)
"""Tokens of the shortest and of the longest span that comes again: about what a model quotes or looks up."""

MOST = 0.5
"""The largest share that is planted: windows are full soon after."""

NOISE = 0.5
"""Share of the spans that are random tokens; the others are what stands there."""

ATTEMPTS = 200
"""Places that are tried for a span before a window counts as full."""


def with_repeats(windows: Sequence[Tensor], share: float, seed: int = 0, special: Sequence[int] = ()) -> list[Tensor]:
    """Windows (n,) of token ids, int64, in which about ``share`` of the tokens belong to a span that comes twice.

    ``special`` tokens, as at the ends of a window, stay where they are, and are no part of a span. The same arguments
    give the same windows.
    """
    if not windows:
        return []
    known = ordinary(torch.cat(list(windows)), special)
    return [plant(window, share, known, Random(f"{seed} {number}"), special) for number, window in enumerate(windows)]


def ordinary(ids: Tensor, special: Sequence[int] = ()) -> Tensor:
    """The different tokens among ids, but for special ones."""
    known = ids.unique()
    return known[~_among(known, special)]


def plant(
    window: Tensor, share: float, known: Tensor, random: Random, special: Sequence[int] = (), noise: float = NOISE
) -> Tensor:
    """A window (n,) with repeats; the share ``noise`` of the spans are random ones of ``known`` tokens.

    Distances are drawn uniformly, from a span's own length to the window's end: the near ones come again in natural
    text anyway (log-uniform ones give back less of what is far). Spans do not overlap. The share holds on average: a
    short window has a pair of spans or none, and one of less than two of the shortest stays as it is.
    """
    window, taken = window.clone(), _among(window, special)
    wanted, attempts = share * len(window), 0
    while wanted > 0 and attempts < ATTEMPTS and len(window) >= 2 * SPANS[0]:
        span = random.randint(SPANS[0], min(SPANS[1], len(window) // 2))
        if not attempts and random.random() * 2 * span > wanted:
            break  # whether there is a last pair is drawn, so that the share holds on average
        first, second = _places(len(window), span, random)
        if bool(taken[first].any()) or bool(taken[second].any()):
            attempts += 1
            continue
        if random.random() < noise:
            window[first] = known[[random.randrange(len(known)) for _ in range(span)]]
        window[second] = window[first]
        taken[first] = taken[second] = True
        wanted, attempts = wanted - 2 * span, 0
    return window


def _places(length: int, span: int, random: Random) -> tuple[slice, slice]:
    """Where a span stands, and where it stands again."""
    distance = random.randint(span, length - span)
    start = random.randint(0, length - span - distance)
    return slice(start, start + span), slice(start + distance, start + distance + span)


def _among(ids: Tensor, tokens: Sequence[int]) -> Tensor:
    return torch.isin(ids, torch.tensor(list(tokens), dtype=ids.dtype))
