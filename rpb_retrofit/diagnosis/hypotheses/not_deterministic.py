"""The model draws numbers as it runs: dropout, above all, in training mode."""

from __future__ import annotations

from rpb_retrofit.diagnosis.finding import CauseKind, Finding, confirmed, excluded
from rpb_retrofit.diagnosis.measurements import Measurements

CAUSE = "the model draws random numbers"
PREDICTS = "the same text gives other outputs the second time"
KIND = CauseKind.RUNNING


def examine(measurements: Measurements) -> Finding:
    """Run the same text twice."""
    anew = measurements.rebuilt
    if anew.again > anew.allowed:
        return confirmed(
            f"the same text gives outputs that differ by up to {anew.again:.1%} of their size the second time",
            "call model.eval(), which switches dropout off; if that was done, look for what else draws numbers",
        )
    return excluded(f"the same text gives the same outputs twice (largest difference {anew.again:.0e} of their size)")
