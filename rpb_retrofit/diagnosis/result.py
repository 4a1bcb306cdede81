"""The outcome of a diagnosis: its causes, its figures, and what they come to in words."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from rpb_retrofit.diagnosis.arms import CONTROL, SOURCE, UNTRAINED, baseline
from rpb_retrofit.diagnosis.costs import Figures, retrofit_costs
from rpb_retrofit.diagnosis.finding import CauseKind, Outcome, Verdict, ranked
from rpb_retrofit.diagnosis.summary import summary
from rpb_retrofit.version import __version__

MISSING = {
    SOURCE: "whether the tables suit the source, what the retrofit costs, which heads it lost",
    CONTROL: "what the text that was trained on did, apart from the positions",
    UNTRAINED: "what training changed",
}
"""What cannot be concluded without an arm."""


@dataclass(frozen=True)
class Diagnosis:
    """The outcome of a diagnosis; losses are in nats a token.

    ``arms``: what the models are called, by role. ``text``: what the text is. ``plan``: how much was measured.
    ``outcomes``: every hypothesis that was tested, with its verdict, evidence and remedy. ``figures``: what a report
    shows, as plain numbers; empty where they were not asked for. ``skipped``: what was not measured, and why.
    ``broken``: figures that could not be measured, since that ended in an error. ``mechanism``: the source's.
    """

    arms: dict[str, str]
    text: str
    plan: dict[str, Any]
    outcomes: list[Outcome]
    figures: Figures
    skipped: dict[str, str]
    seconds: float
    broken: dict[str, str] = field(default_factory=dict)
    mechanism: str = ""
    version: str = __version__

    @property
    def causes(self) -> list[Outcome]:
        """The confirmed hypotheses, the first cause first."""
        return ranked(self.outcomes)

    @property
    def missing(self) -> dict[str, str]:
        """The arms that were not given, and what cannot be told without each."""
        return {role: what for role, what in MISSING.items() if role not in self.arms}

    @property
    def failed(self) -> dict[str, str]:
        """The hypotheses and figures whose probe ended in an error, and in which."""
        return {o.name: o.finding.because for o in self.outcomes if o.finding.failed} | self.broken

    @property
    def headline(self) -> str:
        """The verdict in a sentence."""
        if not self.causes:
            untold = sum(outcome.finding.verdict is Verdict.UNKNOWN for outcome in self.outcomes)
            rest = f"; {untold} could not be told" if untold else ""
            failed = [outcome.name for outcome in self.outcomes if outcome.finding.failed]
            rest += f", {len(failed)} of them because a probe failed ({', '.join(failed)})" if failed else ""
            cost = self.cost
            lost = (
                f" It loses {cost['mean']:+.3f} nats a token against the {cost['above']} at {cost['length']} tokens."
                if cost is not None and cost["real"] and cost["mean"] > 0
                else ""
            )
            return f"No cause of a regression found: {len(self.outcomes) - untold} were excluded{rest}.{lost}"
        first, *others = self.causes
        if not first.explains:
            lost = "; ".join(f"{o.cause}{_part(o)}" for o in self.causes)
            return f"It runs as it should, and no cause explains a quarter of what was lost. Contributing: {lost}."
        also = f" Also confirmed: {'; '.join(o.cause for o in others)}." if others else ""
        return f"First cause: {first.cause}{_part(first)}.{also}"

    @property
    def baseline(self) -> str:
        """What the retrofit's loss is held against: the control, or else the source."""
        return baseline(self.arms)

    @property
    def cost(self) -> Figures | None:
        """What the retrofit loses above the control, or else the source, at the longest length; None where that was not
        measured."""
        return next(reversed(retrofit_costs(self.figures)), None)

    def regressions(self, tolerance: float) -> list[Figures]:
        """The lengths at which the retrofit loses more than ``tolerance`` nats a token above control or source."""
        return [cost for cost in retrofit_costs(self.figures, self.baseline) if cost["mean"] > tolerance]

    def blind(self, tolerance: float) -> list[Figures]:
        """The lengths at which a loss of ``tolerance`` nats a token could have gone unnoticed."""
        return [cost for cost in retrofit_costs(self.figures, self.baseline) if cost["detectable"] > tolerance]

    def unmeasured(self) -> dict[str, str]:
        """What a judgement of regressions needs and could not be measured, and why: the loss above control or source
        at every length of the plan, and whether the model runs as it should."""
        running = {outcome.name for outcome in self.outcomes if outcome.kind is CauseKind.RUNNING}
        reasons = {name: why for name, why in self.failed.items() if name in running}
        costs = retrofit_costs(self.figures, self.baseline)
        known = {cost["length"] for cost in costs if math.isfinite(cost["mean"])}
        for length in self.plan["lengths"]:
            if length not in known:
                reasons[f"the loss above the {self.baseline} at {length} tokens"] = self._why_unmeasured(length)
        return reasons

    def _why_unmeasured(self, length: int) -> str:
        if self.baseline not in self.arms:
            return f"no {self.baseline} was given or found: give --{self.baseline}"
        losses = (f"length {length}", f"loss-retrofit-{length}", f"loss-{self.baseline}-{length}")
        reasons = {**self.skipped, **self.broken}
        names = ("the figures", "the figures of loss", *losses)
        return next((reasons[name] for name in names if name in reasons), "it is not a number")

    @cached_property
    def summary(self) -> dict[str, list[str]]:
        """By question, the answers in a sentence or more each: does it run right, what was lost and where, the most
        likely cause, what to type next."""
        return summary(self._facts())

    def to_dict(self) -> Figures:
        """All of it, as JSON takes it."""
        return {**self._facts(), "summary": self.summary}

    def _facts(self) -> Figures:
        return {
            "version": self.version,
            "headline": self.headline,
            "causes": [outcome.name for outcome in self.causes],
            "arms": self.arms,
            "mechanism": self.mechanism,
            "missing": self.missing,
            "failed": self.failed,
            "text": self.text,
            "plan": self.plan,
            "hypotheses": [
                {
                    **asdict(outcome),
                    "kind": outcome.kind.name.lower(),
                    "confirmed": outcome.confirmed,
                    "explains": outcome.explains,
                    "share": None if outcome.finding.effect is None else outcome.finding.effect.share,
                }
                for outcome in self.outcomes
            ],
            "figures": self.figures,
            "skipped": self.skipped,
            "seconds": self.seconds,
        }


def _part(outcome: Outcome) -> str:
    """How much of what was lost it explains, in words; nothing where that is not known."""
    effect = outcome.finding.effect
    return f" ({effect.share:.0%} of what was lost)" if effect is not None and (effect.share or 0) > 0.005 else ""
