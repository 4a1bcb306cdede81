"""What the demo measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from rpb_retrofit.evaluation.losses import Losses, difference
from rpb_retrofit.evaluation.nll import LengthResult
from rpb_retrofit.evaluation.statistics import controlled
from rpb_retrofit.swap.report import RetrofitReport

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Variant:
    """One model's measurements; ``folder`` beside the report holds it, the source's none.

    ``gains``: what each repeated span gained, in nats a token, by its distance in tokens. ``continuations``: of the
    beginnings, in their order.
    """

    name: str
    folder: str | None
    report: RetrofitReport | None
    results: list[LengthResult]
    gains: dict[int, list[float]]
    continuations: list[str]


@dataclass(frozen=True)
class Demo:
    """All that the report shows, but for the pictures. ``seconds`` is the wall time by step; ``by_position`` the rows
    of `differences`; ``beginnings`` are what the models went on from, by ``new_tokens`` tokens."""

    source: str
    text: str
    policy: str
    arms: list[Variant]
    seconds: dict[str, float]
    by_position: list[Row]
    beginnings: Sequence[str] = field(default=())
    new_tokens: int = 0

    @property
    def costs(self) -> dict[str, list[float]]:
        """Loss of each retrofit above its source, in nats, by length."""
        source, *retrofits = self.arms
        return {
            arm.name: [b.nll - a.nll for a, b in zip(source.results, arm.results, strict=True)] for arm in retrofits
        }

    @property
    def kept(self) -> dict[str, dict[int, float]]:
        """What a repeated span gains each retrofit, as a share of what it gains the source, by distance."""
        source, *retrofits = self.arms
        return {
            arm.name: {at: fmean(arm.gains[at]) / fmean(gains) for at, gains in source.gains.items()}
            for arm in retrofits
        }


def differences(losses: Mapping[str, Sequence[Losses]]) -> list[Row]:
    """How much more each model loses than the first one, in nats a token, by position in the window.

    ``losses``: of each model, by ascending length of the windows, all of one text. Positions come in bins of powers of
    two; a bin is taken from the shortest windows that reach it, of which the text gives most. All are controlled
    together.
    """
    (_, source), *others = losses.items()
    places, gaps, first = [], [], 1
    for number, windows in enumerate(source):
        while first < windows.length:
            last = min(2 * first, windows.length) - 1
            for name, own in others:
                places.append({"arm": name, "first": first, "last": last, "length": windows.length})
                gaps.append(difference(windows.at(first, last), own[number].at(first, last)))
            first = last + 1
    return [
        {**place, "mean": gap.mean, "low": gap.low, "high": gap.high, "real": gap.real, "detectable": gap.detectable}
        for place, gap in zip(places, controlled(gaps), strict=True)
    ]
