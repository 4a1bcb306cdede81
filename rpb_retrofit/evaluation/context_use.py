"""What a model gains from its context, in nats a token, over token ids alone: any vocabulary will do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rpb_retrofit.errors import ConfigError, DataError
from rpb_retrofit.evaluation.filler import pieces
from rpb_retrofit.evaluation.nll import losses_at, token_losses

SPAN = 32
"""Tokens that are repeated."""


@dataclass(frozen=True)
class Gain:
    """Mean losses in nats a token, of the same tokens, ``without`` help from the context and ``given`` it."""

    without: float
    given: float
    gain: float


@dataclass(frozen=True, eq=False)
class Induction:
    """A span of random tokens, text, and the span again: ``ids`` (BOS + distance + span,).

    ``distance`` is the offset in tokens from the span's first occurrence to its second.
    """

    distance: int
    span: int
    number: int
    ids: Tensor


@dataclass(frozen=True, eq=False)
class LocalOrder:
    """Text ``ids`` (n,), and the same with neighbours ``swapped`` (n,) in all but its last third, ``scored`` tokens."""

    number: int
    ids: Tensor
    swapped: Tensor
    scored: int


def make_inductions(
    filler: Sequence[Tensor],
    distances: Sequence[int],
    count: int,
    seed: int = 0,
    span: int = SPAN,
    bos: int | None = None,
) -> list[Induction]:
    """``count`` items for each distance, each the same whatever else is asked for.

    Args:
        filler: documents (n,) of token ids: what lies between, and all tokens that a span is drawn from.
        distances: offsets in tokens, at least ``span``.
        count: items of a distance.
        seed: other items of the same sort.
        span: tokens that come twice, at least 2, no token twice among them.
        bos: the token that begins every item, where the model was trained with one.

    Raises:
        ConfigError for a distance below the span or a span below 2; DataError where the filler is too short or has
        too few different tokens.
    """
    if span < 2 or min(distances, default=span) < span:
        raise ConfigError(f"distance {min(distances)}, span {span}: give a span of 2 or more and no distance below it")
    known = torch.cat(list(filler)).unique().tolist() if filler else []
    if len(known) < span:
        raise DataError(f"filler: it has {len(known)} different tokens, and a span takes {span}: give longer text")
    items = []
    for distance in distances:
        name = f"{seed} induction {distance}"
        for number, between in enumerate(pieces(filler, distance - span, count, Random(name))):
            twice = torch.tensor(Random(f"{name} {number}").sample(known, span))
            items.append(Induction(distance, span, number, torch.cat([_first(bos), twice, between, twice])))
    return items


def make_local_orders(
    filler: Sequence[Tensor], lengths: Sequence[int], count: int, seed: int = 0, bos: int | None = None
) -> list[LocalOrder]:
    """``count`` items for each length in tokens (BOS included), each the same whatever else is asked for.

    From left to right, every token that has not moved yet changes places with the next one with probability 1/2; two
    in three move. Raises ConfigError for a length below 6, DataError where the filler is too short.
    """
    if min(lengths, default=6) < 6:
        raise ConfigError(f"length {min(lengths)}: local order takes 6 tokens or more")
    items = []
    for length in lengths:
        name, start = f"{seed} local-order {length}", len(_first(bos))
        for number, text in enumerate(pieces(filler, length - start, count, Random(name))):
            random, ids, scored = Random(f"{name} {number}"), torch.cat([_first(bos), text]), length // 3
            order = list(range(length))
            at = start
            while at + 1 < length - scored:
                if swap := random.random() < 0.5:
                    order[at], order[at + 1] = at + 1, at
                at += 2 if swap else 1
            items.append(LocalOrder(number, ids, ids[order], scored))
    return items


@torch.no_grad()
def induction_gain(model: PreTrainedModel, item: Induction) -> Gain:
    """How much better a span is predicted the second time, its first token, which nothing announces, left out."""
    ids = item.ids.to(next(model.parameters()).device)
    start, scored = len(ids) - item.distance - item.span, item.span - 1  # it starts after a BOS, or at once
    first = torch.arange(start, start + scored, device=ids.device)  # where its second token and the next are predicted
    at = torch.cat([first, first + item.distance])
    losses = losses_at(model, ids, at)
    return _gain(losses[:scored], losses[scored:])


def induction_gains(
    model: PreTrainedModel,
    filler: Sequence[Tensor],
    counts: Mapping[int, int],
    span: int = SPAN,
    bos: int | None = None,
) -> dict[int, list[float]]:
    """What each repeated span gains, in nats a token, by its distance in tokens; ``counts``: spans of each distance.

    The rest is as of `make_inductions`, which says what is raised.
    """
    return {
        distance: [
            induction_gain(model, item).gain for item in make_inductions(filler, [distance], count, span=span, bos=bos)
        ]
        for distance, count in counts.items()
    }


@torch.no_grad()
def local_order_gain(model: PreTrainedModel, item: LocalOrder) -> Gain:
    """How much better the last third of a text is predicted after the rest in its own order."""
    device = next(model.parameters()).device
    swapped, intact = (token_losses(model, ids.to(device))[-item.scored :] for ids in (item.swapped, item.ids))
    return _gain(swapped, intact)


def _first(bos: int | None) -> Tensor:
    return torch.tensor([] if bos is None else [bos], dtype=torch.long)


def _gain(without: Tensor, given: Tensor) -> Gain:
    losses = without.double().mean().item(), given.double().mean().item()
    return Gain(*losses, losses[0] - losses[1])
