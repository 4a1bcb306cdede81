"""A causal model sees tokens that come later: a mask that is off by one, or none at all."""

from __future__ import annotations

from rpb_retrofit.diagnosis.finding import CauseKind, Finding
from rpb_retrofit.diagnosis.measurements import Measurements
from rpb_retrofit.diagnosis.shared_evidence import fed_otherwise

CAUSE = "a token sees later ones"
PREDICTS = "another last token changes the logits of those before it"
KIND = CauseKind.RUNNING


def examine(measurements: Measurements) -> Finding:
    """Replace the last token, and compare the logits of all before."""
    return fed_otherwise(
        measurements,
        ("another last token",),
        "hide every key whose offset is negative; its losses look better than they are, and its training was in vain",
    )
