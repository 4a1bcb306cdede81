"""The model still predicts text as well, but no longer finds what it has read."""

from __future__ import annotations

from rpb_retrofit.diagnosis.arms import RETROFIT, SOURCE
from rpb_retrofit.diagnosis.finding import CauseKind, Finding, confirmed, excluded, unknown
from rpb_retrofit.diagnosis.measurements import Measurements
from rpb_retrofit.evaluation.statistics import controlled, paired

CAUSE = "retrieval is lost while perplexity holds"
PREDICTS = "a repeated span is predicted worse than by the source, at some distance, though text is predicted as well"
KIND = CauseKind.BEHAVIOUR
REMEDY = (
    "fine-tune on text with far repetitions, at lengths that reach your distances; calibrate with a farther reach or "
    "keep high frequencies, which previous-token heads live on"
)

LOST, HOLDS = 0.25, 0.1
"""Share of the source's induction gain that must be lost, and the nats a token at which perplexity holds no more."""


def examine(measurements: Measurements) -> Finding:
    """Compare the gain of repetition by distance, item by item, with the cost of text."""
    own, source = measurements.tasks.inductions(RETROFIT), measurements.tasks.inductions(SOURCE)
    if source is None:
        return unknown("only the source tells what it could find; give --source")
    if not own or not source:
        return unknown("the text is too short for repeated spans")
    distances = sorted({row["distance"] for row in own})
    changes, gains = [], []
    for distance in distances:
        pairs = [(a["gain"], b["gain"]) for a, b in zip(source, own, strict=True) if a["distance"] == distance]
        changes.append(paired([b - a for a, b in pairs], list(range(len(pairs)))))
        gains.append(sum(a for a, _ in pairs) / len(pairs))
    changes = controlled(changes)
    cost = measurements.losses.cost(measurements.text.middle)
    evidence = "induction gain against the source: " + ", ".join(
        f"{change.mean:+.2f} of {gain:.2f} nats at distance {distance}"
        for distance, change, gain in zip(distances, changes, gains, strict=True)
    )
    lost = [
        (change, distance)
        for change, gain, distance in zip(changes, gains, distances, strict=True)
        if change.real and gain > 0.3 and -change.mean > LOST * gain
    ]
    if cost is not None:
        evidence += f"; text costs {cost.mean:+.3f} nats a token"
    if lost and cost is not None and cost.mean < HOLDS:
        return confirmed(evidence, REMEDY, gain=max(-change.mean for change, _ in lost))
    return excluded(evidence if not lost else f"{evidence}: both are lost, not retrieval alone")
