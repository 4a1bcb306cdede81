"""The tables were never fitted to this source, or on other text: others would bring back much of what was lost."""

from __future__ import annotations

from rpb_retrofit.diagnosis.exam import Exam
from rpb_retrofit.diagnosis.finding import Finding, Kind, confirmed, excluded, unknown
from rpb_retrofit.diagnosis.judge import with_best
from rpb_retrofit.tables import CALIBRATED

CAUSE = "the tables were not fitted to this source, or on other text"
PREDICTS = "tables of the same buckets that are fitted on this text bring back a quarter of what was lost, or more"
KIND = Kind.CHOICE
REMEDY = "retrofit again with --init calibrated and --calibration TEXT, text like that on which you use the model"


def examine(exam: Exam) -> Finding:
    """Fit tables on other windows of the text, and run the model with them."""
    fidelity = exam.fidelity
    if fidelity is None or not exam.causal:
        return unknown("only a source that predicts next tokens tells what fitted tables would bring; give --source")
    if exam.trained_since:
        return excluded("the model was trained since: its tables fit its weights, not the source's attention")
    effect = with_best(exam, list(exam.arms.biases))
    if effect is None:
        return unknown("the model could not be run with fitted tables")
    init = exam.arms.settings.get("init", CALIBRATED)
    said = f"the tables began with init='{init}'; with those that are best for the source's attention: {effect}"
    if effect.sure:
        return confirmed(said, REMEDY, effect=effect)
    return excluded(said)
