"""The bias is looked up at a neighbouring offset."""

from __future__ import annotations

from rpb_retrofit.diagnosis.finding import CauseKind, Finding, confirmed, excluded
from rpb_retrofit.diagnosis.layer_names import name_layers
from rpb_retrofit.diagnosis.measurements import Measurements
from rpb_retrofit.diagnosis.shared_evidence import meant_otherwise, of_kind

CAUSE = "the offset is off by one"
PREDICTS = (
    "what acts at each offset is what the table says of the next one or the one before; or the source's attention is "
    "nearer under a table that is moved by one bucket"
)
KIND = CauseKind.RUNNING
REMEDY = "count offsets from 0 for the query's own position: query position minus key position"

MEANINGS = ("shifted by one bucket", "shifted by minus one bucket")


def examine(measurements: Measurements) -> Finding:
    """Compare what acts with the table moved along."""
    shifted = of_kind(measurements, "shifted")
    if shifted:
        shift = measurements.bias_checks[shifted[0]].detail
        return confirmed(
            f"the bias that acts at an offset is the table's at the offset {shift:+d} in {name_layers(shifted)}",
            REMEDY,
        )
    for moved in MEANINGS:
        confirming = meant_otherwise(
            measurements, moved, f"{REMEDY}; put the tables back by one bucket, or calibrate them again"
        )
        if confirming is not None:
            return confirming
    return excluded("the bias that acts at each offset is that offset's own")
