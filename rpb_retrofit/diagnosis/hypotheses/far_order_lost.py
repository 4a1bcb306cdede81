"""The last bucket holds too much: what lies far away is all alike."""

from __future__ import annotations

from rpb_retrofit.diagnosis.fidelity import FARTHER
from rpb_retrofit.diagnosis.finding import CauseKind, Finding
from rpb_retrofit.diagnosis.measurements import Measurements
from rpb_retrofit.diagnosis.shared_evidence import coarse

CAUSE = "far order is lost: the last bucket holds too much"
PREDICTS = (
    "the source attends otherwise at offsets that share the last bucket: a farther reach brings tables nearer to it"
)
KIND = CauseKind.CHOICE
REMEDY = "let the tables reach farther: --buckets auto, or --max-distance as long as your texts, or --tail log"


def examine(measurements: Measurements) -> Finding:
    """Fit tables that reach farther, and see how much nearer they come."""
    return coarse(measurements, FARTHER, ", as long as the text", REMEDY)
