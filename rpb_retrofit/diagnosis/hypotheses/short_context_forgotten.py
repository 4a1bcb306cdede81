"""Training on long texts made short ones worse."""

from __future__ import annotations

from rpb_retrofit.diagnosis.arms import RETROFIT, SOURCE, UNTRAINED
from rpb_retrofit.diagnosis.finding import CauseKind, Finding, confirmed, excluded, unknown
from rpb_retrofit.diagnosis.measurements import Measurements

CAUSE = "short contexts are forgotten"
PREDICTS = "after training, short windows lose more than before it or than the source, and more than long windows do"
KIND = CauseKind.BEHAVIOUR
REMEDY = "mix short lengths into the training (lengths: {128: 1, 2048: 1} in the recipe)"

NOTABLE = 0.05
"""Nats a token."""


def examine(measurements: Measurements) -> Finding:
    """Compare what the shortest and the longest windows lost."""
    before = UNTRAINED if measurements.arms.untrained is not None else SOURCE
    if not measurements.trained_since:
        return (
            unknown("as far as the arms tell, nothing was trained")
            if measurements.arms.source is None
            else excluded("nothing was trained: the weights are the source's")
        )
    if len(measurements.text.lengths) < 2:
        return unknown("one length was measured; give a short and a long one")
    shortest, longest = measurements.text.lengths[0], measurements.text.lengths[-1]
    short, long = (measurements.losses.cost(length, RETROFIT, before) for length in (shortest, longest))
    if short is None or long is None:
        return unknown(f"the {before} could not be measured at both lengths")
    evidence = f"against the {before}: {short} nats at {shortest} tokens, {long} at {longest}"
    if short.real and short.mean > NOTABLE and short.mean > 2 * max(long.mean, 0.0) and short.low > long.mean:
        return confirmed(evidence, REMEDY, gain=short.mean)
    return excluded(evidence)
