"""Whether the tables suit the source: its attention beside the retrofit's, under the tables as they are and as they may
have been meant.

A table in the wrong place, upside down or in other units runs as well as any. But the source's attention knows whose it
is: put back, it is much nearer to it. Distances are mean KL from the source's attention in nats, per head; queries and
keys are the retrofit's own, so only the tables differ. What the heads hand on is compared, too, with the retrofit's
values: there what lower layers lost counts under any table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from tqdm import tqdm

from rpb_retrofit.diagnosis.arms import Arms
from rpb_retrofit.diagnosis.meanings import MADE_FOR, continued, meanings_of
from rpb_retrofit.files.spool import Spool, temporary_spool
from rpb_retrofit.runtime.anatomy import Anatomy
from rpb_retrofit.runtime.bias import RelativePositionBias
from rpb_retrofit.runtime.buckets import Bucketing
from rpb_retrofit.runtime.families import FACTOR
from rpb_retrofit.tables.attention_rows import AttentionRows
from rpb_retrofit.tables.fit import fit
from rpb_retrofit.tables.loss import Loss, Target, loss, target_of
from rpb_retrofit.tables.output_metric import metrics
from rpb_retrofit.tables.outputs import Outputs
from rpb_retrofit.tables.parameters import ParameterLayout
from rpb_retrofit.tables.recording import record_source, run, watch

QUERIES = 96
"""Queries of each window that are compared, evenly spaced."""

THIN = 4
"""One row in so many decides what tables may have been meant to be, and whose they are: it is a suspicion, which the
running model has to confirm."""

ROUGH = 0.01
"""Share of the loss at which a fit of other buckets may end: what is made of it begins at a quarter."""

WHOLE = 12
"""Attentions up to which each is tried with every other's table; of more, with those near it and its mirror."""

NOTABLE = 0.02
"""Mean KL in nats between attentions below which nothing is made of it."""

FINE, FARTHER = "finer buckets", "a farther reach"


@dataclass(frozen=True)
class Fidelity:
    """KL from the source's attention, (heads,) by attention: ``own`` tables, ``zeros``, and those of the same buckets
    that are best for the attention (``refit``); ``meant``: under what the tables may have been meant to be; ``swaps``
    (heads, heads): of each head under each one's row; ``layers``: the mean of an attention's heads under another's
    table; ``richer``: under the best tables of other buckets, ``richer_tables``, made for the distances
    ``richer_reach``; ``continued``: by bucket, where those from it on hold
    what the one before holds. ``tables``: the best ones.

    ``missed``, ``missed_without``, ``missed_by_attention``: the share of the variance of each of the source's heads'
    outputs that they miss with their own tables, with none, and with those that are best for the attention;
    ``missed_if_meant``: under each meaning that is notably nearer in attention. Left out where the model hands out no
    values."""

    own: dict[str, Tensor] = field(default_factory=dict)
    zeros: dict[str, Tensor] = field(default_factory=dict)
    refit: dict[str, Tensor] = field(default_factory=dict)
    meant: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    swaps: dict[str, Tensor] = field(default_factory=dict)
    layers: dict[str, dict[str, float]] = field(default_factory=dict)
    richer: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    tables: dict[str, Tensor] = field(default_factory=dict)
    richer_tables: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    richer_reach: dict[str, int] = field(default_factory=dict)
    continued: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    missed: dict[str, Tensor] = field(default_factory=dict)
    missed_without: dict[str, Tensor] = field(default_factory=dict)
    missed_by_attention: dict[str, Tensor] = field(default_factory=dict)
    missed_if_meant: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def mean(self, by_name: dict[str, Tensor]) -> float:
        """The mean over all heads."""
        return torch.cat([kl.flatten() for kl in by_name.values()]).mean().item()

    def hands_on_better(self, name: str) -> bool:
        """Whether an attention's heads hand on something nearer to the source's with their own tables than with those
        that are best for the attention: tables fitted to that give up some of the attention for it."""
        return name in self.missed and bool(self.missed[name].mean() <= self.missed_by_attention[name].mean())

    @property
    def excess(self) -> float:
        """By how much the tables as they are fall behind the best of the same buckets."""
        return self.mean(self.own) - self.mean(self.refit)


@torch.no_grad()
def fidelity(
    arms: Arms, source: Anatomy, windows: Sequence[Tensor], width: int, suspected: Collection[str]
) -> Fidelity:
    """Compare the retrofit's tables with ``source`` on windows of text; heads are ``width`` wide. What tables may have
    been meant to be is only asked of the ``suspected`` attentions': not of those that are what was written."""
    result = Fidelity()
    with temporary_spool(AttentionRows) as spool:
        names = _record(arms, source, windows, spool)
        output_metrics = metrics(source, windows[0])
        biases = arms.biases
        for name in tqdm(names, desc="attention beside the source's", unit="layer", leave=False):
            pairs, bias = _RowPairs(spool, name, len(windows), arms.attentions[name]), biases[name]
            layout = ParameterLayout(bias.bucketing, bias.tail is not None)
            target, outputs = target_of(pairs, layout), Outputs.of(pairs, layout, output_metrics.get(name))
            far = partial(loss, target=target, pairs=pairs, layout=layout, thin=None, term=outputs)
            _own_and_best(result, name, _numbers(bias), fit(pairs, layout, target=target).numbers, layout, far)
            _richer_tables(result, name, pairs, bias)
            if name in suspected:
                sampled = _Sampled(result.own[name], _numbers(bias), replace(pairs, thin=THIN), layout)
                _meanings(result, name, bias, width, sampled, far)
                _continued(result, name, bias, sampled)
                _try_heads(result, name, sampled)
                _try_others(result, name, _RowPairs(spool, name, 1, arms.attentions[name], THIN), biases, names)
    return result


def _record(arms: Arms, source: Anatomy, windows: Sequence[Tensor], spool: Spool) -> list[str]:
    every = max(1, max(map(len, windows)) // QUERIES)
    positions = [range(len(window) - 1, -1, -every) for window in windows]
    names = record_source(source, windows, positions, spool, lambda n: None)
    with watch(arms.anatomy) as listen:
        for number, (window, queries) in enumerate(zip(windows, positions, strict=True)):

            def take(name: str, rows: AttentionRows, number: int = number) -> None:
                spool["student", name, number] = rows

            listen(take, queries)
            run(arms.retrofit, window)
    return names


@dataclass(frozen=True)
class _RowPairs:
    """The rows of source and retrofit, window by window, from disk; with a factor that the queries get, applied."""

    spool: Spool
    name: str
    windows: int
    attention: Any
    thin: int = 1

    def __iter__(self) -> Iterator[tuple[AttentionRows, AttentionRows]]:
        for number in range(self.windows):
            source, own = (self.spool[role, self.name, number] for role in ("source", "student"))
            if (factor := self.attention._modules.get(FACTOR)) is not None and own.query is not None:
                own = replace(own, query=factor(own.query[None])[0])
            part = slice(None, None, self.thin)
            yield source.part(part), own.part(part)


class _Sampled:
    """KL of other numbers, by how much farther or nearer they are than the ``own`` on some of the rows."""

    def __init__(self, known: Tensor, own: Tensor, pairs: _RowPairs, layout: ParameterLayout) -> None:
        self.known, self.own, self.pairs, self.layout = known, own, pairs, layout
        self.target = target_of(pairs, layout)
        self.plain = self._loss(own, self.target, layout)

    def __call__(self, numbers: Tensor) -> Tensor:
        return self.known + self._loss(numbers, self.target, self.layout) - self.plain

    def in_buckets(self, bucketing: Bucketing) -> Tensor:
        """Of the same numbers in other buckets."""
        layout = ParameterLayout(bucketing, self.layout.tail)
        return self.known + self._loss(self.own, target_of(self.pairs, layout), layout) - self.plain

    def _loss(self, numbers: Tensor, target: Target, layout: ParameterLayout) -> Tensor:
        return loss(numbers, target, self.pairs, layout, thin=None).kl.cpu()


def _own_and_best(
    result: Fidelity, name: str, own: Tensor, best: Tensor, layout: ParameterLayout, far: Callable[[Tensor], Loss]
) -> None:
    """How far the own tables are, none, and the best of the same buckets."""
    for numbers, attention, missed in (
        (own, result.own, result.missed),
        (torch.zeros_like(own), result.zeros, result.missed_without),
        (best, result.refit, result.missed_by_attention),
    ):
        apart = far(numbers)
        attention[name] = apart.kl.cpu()
        if apart.beside is not None:
            missed[name] = apart.beside.cpu()
    result.tables[name] = layout.table(best).cpu()


def _richer_tables(result: Fidelity, name: str, pairs: _RowPairs, bias: RelativePositionBias) -> None:
    for what, bucketing in _richer(bias.bucketing, pairs).items():
        richer = ParameterLayout(bucketing)
        better = fit(pairs, richer, rough=ROUGH)
        result.richer.setdefault(name, {})[what] = better.after.cpu()
        result.richer_tables.setdefault(name, {})[what] = richer.table(better.numbers).cpu()
        result.richer_reach[what] = bucketing.max_distance


def _meanings(
    result: Fidelity,
    name: str,
    bias: RelativePositionBias,
    width: int,
    sampled: _Sampled,
    far: Callable[[Tensor], Loss],
) -> None:
    meanings, buckets = meanings_of(bias, sampled.own, width), bias.bucketing
    result.meant[name] = {what: sampled(numbers) for what, numbers in meanings.items()}
    result.missed_if_meant[name] = {
        what: apart.beside.cpu()
        for what, numbers in meanings.items()
        if (result.own[name] - result.meant[name][what]).mean() > NOTABLE and (apart := far(numbers)).beside is not None
    }
    for factor in (2, 0.5, 4, 0.25):
        if buckets.num_exact < (distance := round(buckets.max_distance * factor)):
            other = Bucketing(buckets.num_buckets, distance, buckets.bidirectional)
            result.meant[name][f"{MADE_FOR} {distance}"] = sampled.in_buckets(other)


def _continued(result: Fidelity, name: str, bias: RelativePositionBias, sampled: _Sampled) -> None:
    buckets = bias.bucketing
    table, rest = sampled.own[:, : buckets.num_buckets], sampled.own[:, buckets.num_buckets :]
    for start in range(buckets.num_exact // 2 + 1, buckets.per_direction):
        numbers = torch.cat([continued(table, start, buckets), rest], 1)
        result.continued.setdefault(start, {})[name] = sampled(numbers)


def _try_heads(result: Fidelity, name: str, sampled: _Sampled) -> None:
    heads = len(sampled.own)
    swaps = torch.stack([sampled(sampled.own.roll(-shift, 0)) for shift in range(heads)], 1)  # (head, shift)
    column = (torch.arange(heads)[:, None] + torch.arange(heads)) % heads
    result.swaps[name] = torch.empty_like(swaps).scatter_(1, column, swaps)


def _numbers(bias: RelativePositionBias) -> Tensor:
    parts = [bias.weight.detach()] + ([] if bias.tail is None else [bias.tail.detach().clamp(max=0)])
    return torch.cat(parts, 1).float()


def _richer(bucketing: Bucketing, pairs: _RowPairs) -> dict[str, Bucketing]:
    """Buckets that could tell more: of the same reach but finer, and of the whole text's reach."""
    keys = next(iter(pairs))[0].keys
    reach = min(bucketing.max_distance, keys)
    finer = Bucketing(
        min(max(4 * bucketing.num_buckets, 64), bucketing.directions * reach),
        bucketing.max_distance,
        bucketing.bidirectional,
    )
    result = {FINE: finer} if finer.num_buckets > bucketing.num_buckets and finer.num_exact < finer.max_distance else {}
    if keys > bucketing.max_distance:
        # As fine within the old reach as before, and on from there.
        more = math.ceil(math.log2(keys / bucketing.max_distance)) + 1
        per_octave = (bucketing.per_direction - bucketing.num_exact) / math.log2(
            bucketing.max_distance / bucketing.num_exact
        )
        result[FARTHER] = Bucketing(
            bucketing.num_buckets + bucketing.directions * 2 * math.ceil(more * per_octave / 2),
            keys,
            bucketing.bidirectional,
        )
    return result


def _try_others(
    result: Fidelity, name: str, pairs: _RowPairs, biases: dict[str, RelativePositionBias], names: Sequence[str]
) -> None:
    own, at = biases[name], list(names).index(name)
    layout = ParameterLayout(own.bucketing, own.tail is not None)
    target = target_of(pairs, layout)
    near = {at - 2, at - 1, at, at + 1, at + 2, len(names) - 1 - at}
    for index, other in enumerate(names):
        same = biases[other].weight.shape == own.weight.shape and biases[other].bucketing == own.bucketing
        if same and (len(names) <= WHOLE or index in near):
            numbers = _numbers(biases[other])
            result.layers.setdefault(name, {})[other] = loss(numbers, target, pairs, layout, thin=None).kl.mean().item()


def best_order(cost: Tensor) -> tuple[list[int], float, float]:
    """The assignment of columns to the rows of a cost matrix (n, n) that is cheapest, its cost, that of no change."""
    _, columns = linear_sum_assignment(cost.nan_to_num(1e6).numpy())
    chosen = torch.as_tensor(columns)
    return chosen.tolist(), cost[torch.arange(len(cost)), chosen].sum().item(), cost.diagonal().sum().item()
