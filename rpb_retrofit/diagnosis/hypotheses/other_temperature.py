"""Attention is too sharp or too flat as a whole, whatever made it so."""

from __future__ import annotations

import math

from rpb_retrofit.diagnosis.effect import Effect
from rpb_retrofit.diagnosis.finding import CauseKind, Finding, confirmed, excluded, unknown
from rpb_retrofit.diagnosis.intervention import Change
from rpb_retrofit.diagnosis.measurements import Measurements

CAUSE = "attention is too sharp or too flat"
PREDICTS = "the loss falls when the content term is multiplied by 1/sqrt(d), or by sqrt(d), or by a little"
KIND = CauseKind.BEHAVIOUR
REMEDY = (
    "look for a scale that was applied twice or not at all, in the weights or in a norm; a small factor is best "
    "learned: train all weights for a while"
)

NOTABLE = 0.05
"""Nats a token that another temperature must win."""


def examine(measurements: Measurements) -> Finding:
    """Try other temperatures."""
    if not measurements.arms.causal or not measurements.arms.family.uses_interface:
        return unknown("this family keeps its queries to itself: no other temperature can be tried")
    undoing, root = measurements.undoing, math.sqrt(measurements.arms.width)

    def attempt(*factors: float) -> dict[float, Effect]:
        return {
            factor: undoing.effect(f"content-{factor:.3f}", undoing.with_change(Change(scale=factor)))
            for factor in factors
        }

    tried = attempt(0.8, 1.25)
    if any(change.loss.mean < 0 for change in tried.values()):  # what is far off by a factor is helped by a little, too
        tried |= attempt(1 / root, root)
    best = min(tried, key=lambda factor: tried[factor].loss.mean)
    changes = ", ".join(f"times {factor:.3g}: {change.loss.mean:+.3f}" for factor, change in tried.items())
    evidence = f"the content term multiplied by a number changes the loss, in nats a token: {changes}"
    if tried[best].sure and tried[best].loss.mean < -NOTABLE:
        return confirmed(evidence, REMEDY, effect=tried[best])
    return excluded(evidence)
