"""The tables were made for other buckets: their numbers are right, and looked up at the wrong distances."""

from __future__ import annotations

from rpb_retrofit.diagnosis.finding import CauseKind, Finding, excluded, unknown
from rpb_retrofit.diagnosis.meanings import MADE_FOR
from rpb_retrofit.diagnosis.measurements import Measurements
from rpb_retrofit.diagnosis.shared_evidence import meant_otherwise

CAUSE = "the tables were made for other buckets"
PREDICTS = "the source's attention is nearer when the same numbers are spread to another maximum distance"
KIND = CauseKind.NUMBERS
REMEDY = (
    "set relative_attention_max_distance in config.json to what the tables were made for, or convert them: rpb "
    "retrofit SOURCE OUT --init from:CHECKPOINT --max-distance N"
)


def examine(measurements: Measurements) -> Finding:
    """Look the same numbers up in buckets that reach less far, or farther."""
    known = measurements.alterations
    if known == {}:
        return excluded("every table is what was written, for the buckets that it has")
    if known is not None:
        meanings = {what for what in known.values() if what.startswith(MADE_FOR)}
    elif measurements.fidelity is None:
        return unknown("only the source's attention tells which distances its numbers are for; give --source")
    else:
        meanings = {what for kl in measurements.fidelity.meant.values() for what in kl if what.startswith(MADE_FOR)}
    for meaning in sorted(meanings):
        if (confirming := meant_otherwise(measurements, meaning, REMEDY)) is not None:
            return confirming
    return excluded("under no other maximum distance are the tables nearer to the source's attention")
