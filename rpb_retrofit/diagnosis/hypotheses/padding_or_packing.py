"""Padding or packing changes what a text's own tokens get."""

from __future__ import annotations

from rpb_retrofit.diagnosis.finding import CauseKind, Finding
from rpb_retrofit.diagnosis.measurements import Measurements
from rpb_retrofit.diagnosis.shared_evidence import fed_otherwise

CAUSE = "padding or packing changes results"
PREDICTS = "the logits of a text depend on the padding beside it, or on another document in its row"
KIND = CauseKind.RUNNING


def examine(measurements: Measurements) -> Finding:
    """Feed a text alone, padded on either side, in a batch, and behind another document."""
    return fed_otherwise(
        measurements,
        ("left padding", "right padding", "batch", "packing"),
        "pass an attention mask with every padded batch, and do not replace the mask that the attention gets; until it "
        "is mended, run texts one at a time",
    )
