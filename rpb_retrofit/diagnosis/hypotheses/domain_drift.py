"""What was lost was lost to the text that was trained on, not to the positions."""

from __future__ import annotations

from rpb_retrofit.diagnosis.arms import CONTROL
from rpb_retrofit.diagnosis.finding import CauseKind, Finding, confirmed, excluded, unknown
from rpb_retrofit.diagnosis.measurements import Measurements

CAUSE = "domain drift, not positions"
PREDICTS = "the control, the source after the same training, lost as much of the retrofit's loss, or most of it"
KIND = CauseKind.BEHAVIOUR
REMEDY = "train on text like what you care about, or on a mixture with the source's; the positions are not at fault"

NOTABLE, MOST = 0.03, 0.5
"""Nats a token that count, and the share of the retrofit's loss that the control must have lost as well."""


def examine(measurements: Measurements) -> Finding:
    """Subtract what the control lost."""
    if measurements.arms.control is None or measurements.arms.source is None:
        return unknown("only the control tells the text from the positions; give --source and --control")
    length = measurements.text.middle
    whole, drift, rest = (
        measurements.losses.cost(length),
        measurements.losses.cost(length, CONTROL),
        measurements.losses.cost(length, above=CONTROL),
    )
    if whole is None or drift is None or rest is None:
        return unknown(f"not all arms could be measured at {length} tokens")
    evidence = f"at {length} tokens the retrofit lost {whole} nats, the control {drift}: {rest} are the positions'"
    if drift.real and min(drift.mean, whole.mean) > NOTABLE and drift.mean > MOST * whole.mean:
        return confirmed(evidence, REMEDY, gain=drift.mean)
    return excluded(evidence)
