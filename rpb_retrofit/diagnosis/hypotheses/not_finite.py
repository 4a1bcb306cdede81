"""Numbers that are none: NaN or infinity in weights or logits, from damage or from a mask that overflows."""

from __future__ import annotations

from rpb_retrofit.diagnosis.finding import CauseKind, Finding, confirmed, excluded
from rpb_retrofit.diagnosis.measurements import Measurements

CAUSE = "weights or logits are no numbers"
PREDICTS = "a weight, or a logit of a text that is padded, packed or cached, is NaN or infinite"
KIND = CauseKind.RUNNING


def examine(measurements: Measurements) -> Finding:
    """Look at all weights, and at the logits of a text fed in every way."""
    broken = [
        name
        for name, parameter in measurements.arms.retrofit.named_parameters()
        if parameter.is_floating_point() and not bool(parameter.isfinite().all())
    ]
    if broken:
        return confirmed(
            f"{len(broken)} weights hold NaN or infinity: {', '.join(broken[:3])}{', ...' if len(broken) > 3 else ''}",
            "restore these weights from a checkpoint of before",
        )
    own = measurements.half_precision_ways if measurements.arms.causal else None
    wrong = measurements.ways.broken | (own.broken if own is not None else {}) if measurements.arms.causal else {}
    if wrong:
        return confirmed(
            f"logits are no numbers with {', '.join(f'{name} ({count})' for name, count in wrong.items())}",
            "a mask that hides keys must hold the smallest number of its dtype, not minus infinity, and the bias "
            "must be added before it is cast; or run in float32 or bfloat16, which do not overflow there",
        )
    return excluded("all weights and logits are finite")
