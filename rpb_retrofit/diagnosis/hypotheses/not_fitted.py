"""The tables were never fitted to this source, or on other text: others would bring back much of what was lost."""

from __future__ import annotations

from rpb_retrofit.diagnosis.finding import CauseKind, Finding, confirmed, excluded, unknown, with_effect
from rpb_retrofit.diagnosis.measurements import Measurements
from rpb_retrofit.diagnosis.shared_evidence import with_best
from rpb_retrofit.tables import CALIBRATED

CAUSE = "the tables were not fitted to this source, or on other text"
PREDICTS = "tables of the same buckets that are fitted on this text bring back a quarter of what was lost, or more"
KIND = CauseKind.CHOICE
REMEDY = "retrofit again with --init calibrated and --calibration TEXT, text like that on which you use the model"


def examine(measurements: Measurements) -> Finding:
    """Fit tables on other windows of the text, and run the model with them."""
    fidelity = measurements.fidelity
    if fidelity is None or not measurements.arms.causal:
        return unknown("only a source that predicts next tokens tells what fitted tables would bring; give --source")
    if measurements.trained_since:
        return excluded("the model was trained since: its tables fit its weights, not the source's attention")
    effect = with_best(measurements, list(measurements.arms.biases))
    if effect is None:
        return unknown("the model could not be run with fitted tables")
    init = measurements.arms.settings.get("init", CALIBRATED)
    evidence, undoing = f"the tables began with init='{init}'", "with those that are best for the source's attention: "
    if effect.sure:
        return confirmed(evidence, REMEDY, effect=effect, undoing=undoing)
    return excluded(with_effect(evidence, effect, undoing))
