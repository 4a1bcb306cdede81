"""Whether the same text gets the same logits however it is fed: cached, padded, packed, alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
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


@torch.no_grad()
def consistency(model: Any, ids: Tensor, long: Tensor, dtype: torch.dtype) -> Ways:
    """How a causal model's logits of the text ``ids`` (n,), and of parts of it, depend on the way it is fed; and those
    of the last tokens of a ``long`` one (m,) on whether what is before them is cached. It computes in ``dtype``."""
    text = _Text(model, ids.to(model.device)[None], long.to(model.device)[None])
    noise, most = _compare(_noise, text).difference, MOST.get(dtype, MOST[torch.float32])
    by_name = {name: _compare(way, text) for name, way in WAYS.items()}
    return Ways(by_name, noise, min(most, max(LEAST * most, TIMES * noise)))


@dataclass(frozen=True)
class _Text:
    """A model and what it is fed: the text ``ids`` (1, n), and a ``long`` one (1, m)."""

    model: Any
    ids: Tensor
    long: Tensor

    @property
    def length(self) -> int:
        return self.ids.shape[1]

    @property
    def half(self) -> int:
        return self.length // 2

    @property
    def first(self) -> Tensor:
        """The first half (1, h) of the text."""
        return self.ids[:, : self.half]

    @property
    def pad(self) -> Tensor:
        """Tokens (1, p) that an attention mask hides."""
        return self.ids.new_zeros(1, min(7, self.length - self.half))

    def logits(self, tokens: Tensor, **kwargs: Any) -> Tensor:
        """The logits (n, vocabulary) of tokens (1, n), fed at once."""
        return self.model(input_ids=tokens, use_cache=False, **kwargs).logits[0].float()

    def cached(self, tokens: Tensor, cache: Any, ends: Sequence[int]) -> list[Tensor]:
        """The logits of tokens (1, n) that are fed piece by piece, each up to one of the ``ends``."""
        pieces: list[Tensor] = []
        for start, end in pairwise((0, *ends)):
            out = self.model(input_ids=tokens[:, start:end], past_key_values=cache, use_cache=True)
            pieces.append(out.logits[0].float())
        return pieces


Logits = tuple[Tensor, Tensor]
"""Of the same tokens, both (n, vocabulary): fed in some way, and in the plain one."""


def _noise(text: _Text) -> Logits:
    """In two equal rows, and with fewer tokens that follow: what differs is rounding."""
    cuts = [max(2, text.length - 3), max(2, text.length // 3)]
    rows = text.model(input_ids=text.ids.repeat(2, 1), use_cache=False).logits
    fed = torch.cat([*(row.float() for row in rows), *(text.logits(text.ids[:, :cut]) for cut in cuts)])
    plain = text.logits(text.ids)
    return fed, torch.cat([plain[:cut] for cut in (text.length, text.length, *cuts)])


def _dynamic_cache(text: _Text) -> Logits:
    return _with_cache(text, DynamicCache(config=text.model.config))


def _static_cache(text: _Text) -> Logits:
    return _with_cache(text, StaticCache(config=text.model.config, max_cache_len=text.length + 16))


def _with_cache(text: _Text, cache: Any) -> Logits:
    """Half at once, then eight tokens one by one, then the rest."""
    ends = [text.half, *range(text.half + 1, min(text.half + 9, text.length - 1)), text.length]
    return torch.cat(text.cached(text.ids, cache, ends)), text.logits(text.ids)


def _another_last_token(text: _Text) -> Logits:
    ids = text.ids
    other = ids[:, :1] if ids[0, 0] != ids[0, -1] else ids[:, 1:2]
    return text.logits(torch.cat([ids[:, :-1], other], 1))[:-1], text.logits(ids)[:-1]


def _far_decoding(text: _Text) -> Logits:
    """The last six tokens of the long text one by one."""
    last, length = 6, text.long.shape[1]
    pieces = text.cached(text.long, DynamicCache(config=text.model.config), range(length - last, length + 1))
    return torch.cat(pieces[1:]), text.logits(text.long)[-last:]


def _left_padding(text: _Text) -> Logits:
    tokens = torch.cat([text.pad, text.first], 1)
    mask = torch.cat([text.pad, torch.ones_like(text.first)], 1)
    return text.logits(tokens, attention_mask=mask)[text.pad.shape[1] :], text.logits(text.first)


def _right_padding(text: _Text) -> Logits:
    tokens = torch.cat([text.first, text.pad], 1)
    mask = torch.cat([torch.ones_like(text.first), text.pad], 1)
    return text.logits(tokens, attention_mask=mask)[: text.half], text.logits(text.first)


def _batch(text: _Text) -> Logits:
    """A row that is padded on the left beside one that is not, and both again."""
    pad = text.pad.shape[1]
    padded, whole = torch.cat([text.pad, text.first], 1), text.ids[:, : text.half + pad]
    pair = torch.cat([padded, whole])
    mask = torch.ones_like(pair)
    mask[0, :pad] = 0
    logits = text.model(input_ids=pair.repeat(2, 1), attention_mask=mask.repeat(2, 1), use_cache=False).logits
    fed = [part.float() for rows in logits.unflatten(0, (2, 2)) for part in (rows[0, pad:], rows[1])]
    return torch.cat(fed), torch.cat([text.logits(text.first), text.logits(whole)]).repeat(2, 1)


def _packing(text: _Text) -> Logits:
    """Both halves in one row, as two documents: their position ids begin anew."""
    positions = torch.arange(text.length, device=text.ids.device)
    positions = torch.where(positions < text.half, positions, positions - text.half)
    second = text.ids[:, text.half :]
    return text.logits(text.ids, position_ids=positions[None])[text.half :], text.logits(second)


WAYS: dict[str, Callable[[_Text], Logits]] = {
    "dynamic cache": _dynamic_cache,
    "static cache": _static_cache,
    "another last token": _another_last_token,
    "far decoding": _far_decoding,
    "left padding": _left_padding,
    "right padding": _right_padding,
    "batch": _batch,
    "packing": _packing,
}
"""By the name that a finding calls it."""


def _compare(way: Callable[[_Text], Logits], text: _Text) -> Way:
    try:
        got, want = way(text)
    except Exception as error:  # whatever a model raises where it cannot do this
        return Way(0.0, f"{type(error).__name__}: {error}".splitlines()[0])
    broken = int((~got.isfinite()).sum() + (~want.isfinite()).sum())
    size = want.nan_to_num().abs().max().clamp(min=1e-12)
    far = 0.0
    if not broken:
        own, plainly = got.log_softmax(-1), want.log_softmax(-1)
        far = max(0.0, (plainly.exp() * (plainly - own)).sum(-1).mean().item())
    return Way(((got - want).nan_to_num().abs().max() / size).item(), "", broken, far)
