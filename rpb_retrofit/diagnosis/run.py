"""A diagnosis: every hypothesis tested, every figure measured, and what comes first."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rpb_retrofit.diagnosis.arms import CONTROL, SOURCE
from rpb_retrofit.diagnosis.finding import Kind, Outcome, ranked
from rpb_retrofit.diagnosis.hypotheses import HYPOTHESES, Hypothesis
from rpb_retrofit.diagnosis.measurements import Measurements
from rpb_retrofit.diagnosis.repair import HOPELESS, with_gains
from rpb_retrofit.diagnosis.report_data import Figures, all_figures
from rpb_retrofit.diagnosis.summary import summary
from rpb_retrofit.runtime.modeling import UNSAVED
from rpb_retrofit.version import __version__

MISSING = {
    SOURCE: "whether the tables suit the source, what the retrofit costs, which heads it lost",
    CONTROL: "what the text that was trained on did, apart from the positions",
    "untrained": "what training changed",
}
"""What cannot be concluded without an arm."""


@dataclass(frozen=True)
class Diagnosis:
    """The outcome of an examination. ``causes``: the confirmed hypotheses, the first cause first. ``broken``: figures
    that could not be measured, since that ended in an error; ``mechanism``: the source's."""

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
            untold = sum(outcome.finding.verdict == "can't tell" for outcome in self.outcomes)
            rest = f"; {untold} could not be told" if untold else ""
            failed = [outcome.name for outcome in self.outcomes if outcome.finding.failed]
            rest += f", {len(failed)} of them because a probe failed ({', '.join(failed)})" if failed else ""
            cost = self.cost()
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

    def cost(self, length: int | None = None) -> Figures | None:
        """What the retrofit loses above the control, or else the source, at a length, by default the longest."""
        losses = self.figures.get("loss") or {"costs": []}
        for above in (CONTROL, SOURCE):
            found = [c for c in losses["costs"] if c["arm"] == "retrofit" and c["above"] == above]
            found = [c for c in found if length is None or c["length"] == length]
            if found:
                return found[-1]
        return None

    def regressions(self, tolerance: float) -> list[Figures]:
        """The lengths at which the retrofit loses more than ``tolerance`` nats a token above control or source."""
        losses = self.figures.get("loss") or {"costs": []}
        above = CONTROL if CONTROL in self.arms else SOURCE
        return [c for c in losses["costs"] if c["arm"] == "retrofit" and c["above"] == above and c["mean"] > tolerance]

    def unmeasured(self) -> dict[str, str]:
        """What a judgement of regressions needs and could not be measured, and why: the loss above control or source
        at every length of the plan, and whether the model runs as it should."""
        running = {outcome.name for outcome in self.outcomes if outcome.kind is Kind.RUNNING}
        found = {name: why for name, why in self.failed.items() if name in running}
        above = CONTROL if CONTROL in self.arms else SOURCE
        losses = self.figures.get("loss") or {"costs": []}
        known = {
            c["length"]
            for c in losses["costs"]
            if c["arm"] == "retrofit" and c["above"] == above and math.isfinite(c["mean"])
        }
        for length in self.plan["lengths"]:
            if length not in known:
                names = (
                    "the figures",
                    "the figures of loss",
                    f"length {length}",
                    f"loss-retrofit-{length}",
                    f"loss-{above}-{length}",
                )
                told = {**self.skipped, **self.broken}
                why = next((told[name] for name in names if name in told), "it is not a number")
                why = why if above in self.arms else f"no {above} was given or found: give --{above}"
                found[f"the loss above the {above} at {length} tokens"] = why
        return found

    def blind(self, tolerance: float) -> list[Figures]:
        """The lengths at which a loss of ``tolerance`` could have gone unnoticed."""
        losses = self.figures.get("loss") or {"costs": []}
        above = CONTROL if CONTROL in self.arms else SOURCE
        return [
            c for c in losses["costs"] if c["arm"] == "retrofit" and c["above"] == above and c["detectable"] > tolerance
        ]

    def to_dict(self) -> Figures:
        """All of it, as JSON takes it."""
        result = {
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
        return {**result, "summary": summary(result)}


def _part(outcome: Outcome) -> str:
    """How much of what was lost it explains, in words; nothing where that is not known."""
    effect = outcome.finding.effect
    return f" ({effect.share:.0%} of what was lost)" if effect is not None and (effect.share or 0) > 0.005 else ""


def diagnose(
    measurements: Measurements,
    text: str = "",
    progress: Callable[[str], None] = lambda line: None,
    hypotheses: Sequence[Hypothesis] = HYPOTHESES,
    figures: bool = True,
) -> Diagnosis:
    """Test ``hypotheses`` on the models of ``measurements`` and measure the ``figures`` of a report.

    ``text`` is what the documents are called; ``progress`` is told what is being done. DataError where the text is
    shorter than the shortest length.
    """
    start = time.perf_counter()
    assert measurements.lengths, "text that is too short for all of them is an error of its own"
    outcomes = []
    for number, hypothesis in enumerate(hypotheses, 1):
        progress(f"[{number}/{len(hypotheses)}] is it that {hypothesis.cause}?")
        outcomes.append(hypothesis(measurements))
    outcomes = with_gains(measurements, outcomes)
    measured: Figures = {}
    hopeless = [outcome for outcome in outcomes if outcome.confirmed and outcome.name in HOPELESS]
    if hopeless and figures:
        measurements.skipped["the figures"] = f"{hopeless[0].cause}: there is nothing to measure"
    elif figures:
        progress("measuring what the report shows")
        measured = all_figures(measurements)
    nameless = (None, "", UNSAVED)
    names = {
        role: type(m).__name__ if m.name_or_path in nameless else str(m.name_or_path) for role, m in measurements.arms
    }
    return Diagnosis(
        names,
        text,
        asdict(measurements.plan),
        outcomes,
        measured,
        dict(measurements.skipped),
        time.perf_counter() - start,
        dict(measurements.failed),
        measurements.arms.family.mechanism,
    )
