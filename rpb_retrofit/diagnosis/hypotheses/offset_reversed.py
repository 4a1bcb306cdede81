"""The offset has the wrong sign: key minus query, as Transformers' T5 counts, where query minus key is meant."""

from __future__ import annotations

from rpb_retrofit.diagnosis.finding import CauseKind, Finding, confirmed, excluded
from rpb_retrofit.diagnosis.layer_names import name_layers
from rpb_retrofit.diagnosis.measurements import Measurements
from rpb_retrofit.diagnosis.shared_evidence import meant_otherwise, of_kind

CAUSE = "the sign of the offset is reversed"
PREDICTS = (
    "what acts at an offset is what the table says of its negative: in a causal model one number for all keys; or the "
    "source's attention is nearer under a table whose two directions are exchanged"
)
KIND = CauseKind.RUNNING
REMEDY = "count offsets as query minus key; Transformers' T5 counts the other way: convert its tables by --init from:"

MEANINGS = ("before and after exchanged", "far and near exchanged")


def examine(measurements: Measurements) -> Finding:
    """Compare what acts with the table read backwards."""
    reversed_ = of_kind(measurements, "reversed")
    if reversed_:
        return confirmed(
            f"the bias that acts is the table's at the negative of each offset in {name_layers(reversed_)}",
            REMEDY,
        )
    for meaning in MEANINGS:
        if (exchanged := meant_otherwise(measurements, meaning, REMEDY)) is not None:
            return exchanged
    return excluded("the bias that acts follows the table from near to far, not its mirror image")
