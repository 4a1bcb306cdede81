"""What a hypothesis comes to: a verdict, with its evidence and the remedy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Any

from rpb_retrofit.diagnosis.effect import Effect


class Verdict(StrEnum):
    """What the evidence says of a hypothesis."""

    CONFIRMED = "confirmed"
    EXCLUDED = "excluded"
    UNKNOWN = "can't tell"


class CauseKind(IntEnum):
    """What kind of cause a hypothesis names, the deepest first: a deeper one explains what the later ones see.

    ``RUNNING``: the model does not compute what its weights and its config say. ``NUMBERS``: it does, but the numbers
    are not what they were meant to be. ``CHOICE``: they are, but the settings cannot express what the source did.
    ``BEHAVIOUR``: what the model as a whole does otherwise than its source, whatever the reason.
    """

    RUNNING = 0
    NUMBERS = 1
    CHOICE = 2
    BEHAVIOUR = 3


QUARTER = 0.25
"""Share of what was lost that undoing a cause must bring back to be the first one. Of a mistake in some layers, where
it is not known whether the numbers are what was written, it is the share of what those layers would have lost if all
lost the same: no mistake in one layer of thirty explains a quarter of what the thirty lost."""


@dataclass(frozen=True)
class Finding:
    """The outcome of one hypothesis.

    ``because``: the evidence in a sentence or two, with figures. ``effect``: what undoing it brings in the running
    model, where it can be undone; ``gain``: of it the loss, in nats a token, or what was lost to it. ``figures``: the
    numbers behind it, for the report's tables. ``failed``: the probe itself ended in an error, which ``because`` says.
    """

    verdict: Verdict
    because: str
    remedy: str = ""
    gain: float | None = None
    effect: Effect | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)
    failed: bool = False


@dataclass(frozen=True)
class Outcome:
    """A finding, and the hypothesis that it is about."""

    name: str
    cause: str
    predicts: str
    kind: CauseKind
    finding: Finding

    @property
    def confirmed(self) -> bool:
        """Whether the evidence names it."""
        return self.finding.verdict is Verdict.CONFIRMED

    @property
    def explains(self) -> bool:
        """Whether it may be the first cause: the model runs wrongly, or its numbers are not as meant, or undoing it
        brings back a quarter of what was lost, as far as that can be told. Others contribute."""
        effect = self.finding.effect
        return self.kind <= CauseKind.NUMBERS or effect is None or effect.at_least(QUARTER)


def ranked(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The confirmed ones, the first cause first: before all others those that explain enough to be a first cause; then
    the deeper kind, and of one kind as they were tested, special ones before general ones, since what is special
    explains what a general probe sees."""
    return sorted((o for o in outcomes if o.confirmed), key=lambda outcome: (not outcome.explains, outcome.kind))


def confirmed(
    because: str, remedy: str, effect: Effect | None = None, undoing: str | None = None, **more: Any
) -> Finding:
    """The evidence names it. ``effect``: what undoing it brings, where that was tried; where ``undoing`` says how, as
    `with_effect` takes it, it becomes a part of the evidence."""
    if effect is not None:
        more.setdefault("gain", -effect.loss.mean)
    if undoing is not None:
        because = with_effect(because, effect, undoing)
    return Finding(Verdict.CONFIRMED, because, remedy, effect=effect, **more)


def with_effect(because: str, effect: Effect | None, undoing: str = "") -> str:
    """The evidence, and behind it what undoing brought, where that is known. ``undoing`` says how: "fitted anew, "."""
    return because if effect is None else f"{because}; {undoing}{effect}"


def excluded(because: str, **more: Any) -> Finding:
    """The evidence speaks against it."""
    return Finding(Verdict.EXCLUDED, because, **more)


def unknown(because: str, **more: Any) -> Finding:
    """There is no evidence either way, and why."""
    return Finding(Verdict.UNKNOWN, because, **more)
