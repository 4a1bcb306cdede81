"""Loss rises where the text is longer than what the model was trained on."""

from __future__ import annotations

from rpb_retrofit.diagnosis.arms import RETROFIT, SOURCE
from rpb_retrofit.diagnosis.finding import CauseKind, Finding, confirmed, excluded, unknown
from rpb_retrofit.diagnosis.measurements import Measurements
from rpb_retrofit.evaluation.statistics import paired

CAUSE = "loss rises outside the trained length"
PREDICTS = "tokens at positions beyond the trained context lose more than those inside it, in the same windows"
KIND = CauseKind.BEHAVIOUR
REMEDY = (
    "calibrate and train at the lengths that you use (--calibration-length, lengths in the recipe); if the highest "
    "frequencies were kept, keep fewer; or stay inside"
)

RISE = 0.1
"""Nats a token."""


def examine(measurements: Measurements) -> Finding:
    """Compare the loss beyond the trained context with that of its last half."""
    trained, longest = measurements.arms.trained_context, max(measurements.text.lengths)
    if trained is None:
        return unknown("nothing says how long the source's context was")
    if longest <= trained:
        return unknown(f"no length beyond the trained context of {trained} tokens was measured; give --lengths")
    rises = {}
    for role in (RETROFIT, SOURCE):
        losses = measurements.losses(role, longest)
        if losses is not None:
            inside, outside = losses.at(trained // 2, trained - 1), losses.at(trained, longest - 1)
            rise = outside.losses.double().mean(1) - inside.losses.double().mean(1)
            clusters = outside.clusters()[:, 0]
            rises[role] = paired(rise.tolist(), clusters.tolist())
    own = rises[RETROFIT]
    evidence = f"beyond {trained} tokens it loses {own} nats more than in the half before"
    if SOURCE in rises:
        evidence += f"; the source {rises[SOURCE]}"
    beyond = own.mean - max(rises[SOURCE].mean, 0.0) if SOURCE in rises else own.mean
    if beyond > RISE and own.real:
        return confirmed(evidence, REMEDY, gain=beyond)
    return excluded(evidence)
