"""Decoding with a cache gives other logits than the whole text at once."""

from __future__ import annotations

from rpb_retrofit.diagnosis.finding import CauseKind, Finding
from rpb_retrofit.diagnosis.measurements import Measurements
from rpb_retrofit.diagnosis.shared_evidence import fed_otherwise

CAUSE = "cached decoding differs from the full pass"
PREDICTS = "the logits of a text depend on whether it is fed at once or token by token with a cache"
KIND = CauseKind.RUNNING


def examine(measurements: Measurements) -> Finding:
    """Feed a text both ways, with a dynamic and with a static cache."""
    return fed_otherwise(
        measurements,
        ("dynamic cache", "static cache", "far decoding"),
        "the offset of a new token has to count the keys that are cached, of a static cache only those in use; until "
        "it is mended, generate with use_cache=False",
    )
