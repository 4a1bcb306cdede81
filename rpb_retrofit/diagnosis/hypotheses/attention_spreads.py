"""Attention spreads as the text grows, and with it what the model takes in."""

from __future__ import annotations

from rpb_retrofit.diagnosis.arms import RETROFIT, SOURCE
from rpb_retrofit.diagnosis.finding import CauseKind, Finding, confirmed, excluded, unknown, with_effect
from rpb_retrofit.diagnosis.intervention import Change
from rpb_retrofit.diagnosis.measurements import Measurements

CAUSE = "attention spreads with length"
PREDICTS = (
    "the entropy of attention grows faster with the number of keys than the source's; and the loss of long texts falls "
    "when the content grows with log n"
)
KIND = CauseKind.BEHAVIOUR
REMEDY = (
    "train at the lengths that you use; or give the scores a factor that grows with log n beyond the trained length"
)

NOTABLE = 0.03
"""Nats a token that the factor must win."""

FASTER = 0.1
"""Nats per doubling of the keys by which entropy must grow faster than the source's."""


def examine(measurements: Measurements) -> Finding:
    """Compare the growth of entropy, and where it is faster than the source's, try the factor."""
    own, source = measurements.attention_patterns(RETROFIT), measurements.attention_patterns(SOURCE)
    if own is None or not measurements.arms.family.uses_interface or not measurements.arms.causal:
        return unknown("this family keeps its queries to itself: no factor can be tried")
    growth = own.slopes().mean().item()
    evidence = f"entropy grows by {growth:.2f} nats as the keys double"
    if source is not None:
        source_growth = source.slopes().mean().item()
        evidence += f", the source's by {source_growth:.2f}"
        if not growth > source_growth + FASTER:
            return excluded(evidence)
    longest = max(measurements.text.lengths)
    trained = min(measurements.arms.trained_context or longest, longest // 2)
    change = Change(trained=max(trained // 2, 8))
    effect = measurements.undoing.effect("length-factor", measurements.undoing.with_change(change), longest)
    undoing = f"a factor that grows with log n from {change.trained} keys on: at {longest} tokens "
    if effect.sure and effect.loss.mean < -NOTABLE:
        return confirmed(evidence, REMEDY, effect=effect, undoing=undoing)
    return excluded(with_effect(evidence, effect, undoing))
