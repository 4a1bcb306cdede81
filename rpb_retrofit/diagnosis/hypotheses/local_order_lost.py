"""The buckets are too wide near by: neighbours are all alike."""

from __future__ import annotations

from rpb_retrofit.diagnosis.fidelity import FINE
from rpb_retrofit.diagnosis.finding import CauseKind, Finding
from rpb_retrofit.diagnosis.measurements import Measurements
from rpb_retrofit.diagnosis.shared_evidence import coarse

CAUSE = "local order is lost: buckets are too wide"
PREDICTS = "the source attends otherwise at offsets that share a bucket: finer buckets bring tables nearer to it"
KIND = CauseKind.CHOICE
REMEDY = (
    "give the tables more buckets (--buckets auto), or, of a source with RoPE, keep its highest frequencies, "
    "which tell neighbours apart (--keep-frequencies auto)"
)


def examine(measurements: Measurements) -> Finding:
    """Fit tables of finer buckets and the same reach, and see how much nearer they come."""
    return coarse(measurements, FINE, " and the same reach", REMEDY)
