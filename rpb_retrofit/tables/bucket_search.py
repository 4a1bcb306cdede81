"""How many buckets, and how far they reach: as few as text that the fit did not see allows.

Every candidate is fitted to some layers on most of the windows and scored on the rest: too few buckets, or too near
ones, cannot say what the source attends to; too many fit the text instead. Both show in the held-out divergence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rpb_retrofit.errors import ConfigError
from rpb_retrofit.runtime.buckets import Bucketing
from rpb_retrofit.tables.fit import fit
from rpb_retrofit.tables.loss import RowPairs, loss, target_of
from rpb_retrofit.tables.parameters import ParameterLayout

BUCKETS, REACHES = (16, 32, 64, 128), (64, 128, 512, 2048, 8192, 32768)
"""Candidates: of the reaches those below the longest window, and the first that is not."""

CLOSE, CLOSE_NATS = 0.01, 1e-4
"""Candidates whose held-out KL exceeds the best one's by less than this share, or by so few nats, count as good."""

LAYERS = 6
"""Layers that are tried, spread over the model."""

HELD_OUT = 4
"""One window in so many is held out."""


@dataclass(frozen=True)
class Candidate:
    """Buckets and reach, and the mean KL in nats over the heads of the layers tried, on windows that it was not fitted
    to."""

    num_buckets: int
    max_distance: int
    held_out: float

    def __str__(self) -> str:
        return f"{self.num_buckets} to {self.max_distance} ({self.held_out:.4f})"


TRIED_FIRST = Candidate(32, 128, float("nan"))
"""T5's own: what the model has while the others are tried on it."""


@dataclass(frozen=True)
class Choice:
    """What was chosen among what, the best held-out KL first."""

    chosen: Candidate
    candidates: list[Candidate]
    layers: int

    def __str__(self) -> str:
        best, worst = self.candidates[0], self.candidates[-1]
        why = "the best" if self.chosen is best else f"the fewest within {CLOSE:.0%} of the best, {best}"
        return (
            f"buckets auto: {self.chosen}: {why}; the worst of {len(self.candidates)} tried was {worst} (nats of "
            f"attention KL on windows that were held out, {self.layers} layers)"
        )


def sizes(longest: int, bidirectional: Sequence[bool]) -> list[tuple[int, int]]:
    """The candidates' (num_buckets, max_distance) for windows of ``longest`` tokens, valid in all directions."""
    reaches = [reach for reach in REACHES if reach < longest]
    reaches += [reach for reach in REACHES if reach >= longest][:1]

    def valid(size: tuple[int, int]) -> bool:
        try:
            return all(Bucketing(*size, both).validate() for both in bidirectional)
        except ConfigError:
            return False

    return [size for size in ((count, reach) for count in BUCKETS for reach in reaches) if valid(size)]


def held_out_divergence(train: RowPairs, held_out: RowPairs, layout: ParameterLayout) -> float:
    """Mean KL over a layer's heads on ``held_out`` of a fit to ``train``."""
    fitted = fit(train, layout)
    return float(loss(fitted.numbers, target_of(held_out, layout), held_out, layout).kl.mean())


class Trial:
    """Tries candidates on some of a model's layers, as a calibration passes them."""

    def __init__(self, names: Sequence[str], longest: int, bidirectional: Sequence[bool]) -> None:
        count = min(LAYERS, len(names))
        self.layers = {names[(2 * i + 1) * len(names) // (2 * count)] for i in range(count)}
        self.scores: dict[tuple[int, int], list[float]] = {size: [] for size in sizes(longest, bidirectional)}

    def __call__(
        self, name: str, pairs: Callable[[Sequence[int]], RowPairs], windows: int, layout: ParameterLayout
    ) -> None:
        """Score all candidates on a layer, if it is one of those to be tried; ``pairs`` gives those of some windows."""
        if name not in self.layers:
            return
        held_out = list(range(HELD_OUT - 1, windows, HELD_OUT)) or [windows - 1]
        train = [window for window in range(windows) if window not in held_out]
        for size, scores in self.scores.items():
            bucketing = Bucketing(*size, layout.bucketing.bidirectional)
            scores.append(held_out_divergence(pairs(train), pairs(held_out), ParameterLayout(bucketing, layout.tail)))

    def choice(self) -> Choice:
        """The fewest buckets among the good candidates, and of those the best."""
        candidates = [Candidate(*size, sum(scores) / len(scores)) for size, scores in self.scores.items()]
        candidates.sort(key=lambda candidate: candidate.held_out)
        limit = candidates[0].held_out
        good = [c for c in candidates if c.held_out <= max(limit * (1 + CLOSE), limit + CLOSE_NATS)]
        return Choice(min(good, key=lambda c: (c.num_buckets, c.held_out)), candidates, len(self.layers))
