"""Attention spreads as the text grows, and with it what the model takes in."""

from __future__ import annotations

from functools import partial

from rpb_retrofit.diagnosis.arms import RETROFIT, SOURCE
from rpb_retrofit.diagnosis.finding import Finding, Kind, confirmed, excluded, unknown
from rpb_retrofit.diagnosis.intervention import Change, changed
from rpb_retrofit.diagnosis.measurements import Measurements

CAUSE = "attention spreads with length"
PREDICTS = (
    "the entropy of attention grows faster with the number of keys than the source's; and the loss of long texts falls "
    "when the content grows with log n"
)
KIND = Kind.BEHAVIOUR
REMEDY = (
    "train at the lengths that you use; or give the scores a factor that grows with log n beyond the trained length"
)

NOTABLE = 0.03
"""Nats a token that the factor must win."""

FASTER = 0.1
"""Nats per doubling of the keys by which entropy must grow faster than the source's."""


def examine(measurements: Measurements) -> Finding:
    """Compare the growth of entropy, and try the factor."""
    own, theirs = measurements.attention_patterns(RETROFIT), measurements.attention_patterns(SOURCE)
    if own is None or not measurements.arms.family.uses_interface or not measurements.causal:
        return unknown("this family keeps its queries to itself: no factor can be tried")
    longest = max(measurements.lengths)
    grows = own.slopes().mean().item()
    said = f"entropy grows by {grows:.2f} nats as the keys double"
    if theirs is not None:
        said += f", the source's by {theirs.slopes().mean().item():.2f}"
    trained = min(measurements.trained or longest, longest // 2)
    change = Change(trained=max(trained // 2, 8))
    undone = measurements.undone("length-factor", partial(changed, measurements.arms.anatomy, change), longest)
    said += f"; a factor that grows with log n from {change.trained} keys on: at {longest} tokens {undone}"
    faster = theirs is None or grows > theirs.slopes().mean().item() + FASTER
    if undone.sure and undone.loss.mean < -NOTABLE and faster:
        return confirmed(said, REMEDY, effect=undone)
    return excluded(said)
