"""The two terms of a score are out of proportion: the bias scaled by 1/sqrt(d), or the content not scaled by it."""

from __future__ import annotations

import math

from rpb_retrofit.diagnosis.effect import Effect
from rpb_retrofit.diagnosis.finding import CauseKind, Finding, confirmed, excluded, unknown
from rpb_retrofit.diagnosis.intervention import Change
from rpb_retrofit.diagnosis.layer_names import name_layers
from rpb_retrofit.diagnosis.measurements import Measurements
from rpb_retrofit.diagnosis.shared_evidence import content_ratios, meant_otherwise, scale_in_weights, weights_back
from rpb_retrofit.diagnosis.weights import collinear

CAUSE = "the bias is scaled, or the content is not"
PREDICTS = (
    "the bias that acts is the table's times a number; or what multiplies query and key is not what it is in the source"
)
KIND = CauseKind.RUNNING
REMEDY = (
    "the content term keeps the source's scale (mostly 1/sqrt(d)) and the bias is added after it, unscaled; a table "
    "made for the other convention is multiplied once, when it is loaded"
)

APART = 0.03
"""Relative difference of two scales that is more than rounding."""

MEANINGS = (
    *("scaled by 1/sqrt(d)", "scaled by sqrt(d)", "negated"),
    *("halved", "doubled", "made smaller by a third"),
)


def examine(measurements: Measurements) -> Finding:
    """Compare both scales with what they should be, and try whether others would do better."""
    scaled = {n: c for n, c in measurements.bias_checks.items() if c.kind.startswith("scaled") or c.kind == "negated"}
    if scaled:
        check = next(iter(scaled.values()))
        return confirmed(
            f"the bias that acts is the table's {check.kind} (times {check.detail:.4g}) in {name_layers(scaled)}",
            REMEDY,
        )
    root = math.sqrt(measurements.arms.width)
    ratios = content_ratios(measurements)
    wrong = {name: ratio for name, ratio in ratios.items() if abs(ratio - 1) > APART}
    if wrong:
        ratio = next(iter(wrong.values()))
        known = f", which is {'sqrt(d)' if ratio > 1 else '1/sqrt(d)'}" if _near(ratio, root) else ""
        return confirmed(
            f"the product of query and key is multiplied by {ratio:.3g} times what the {_meant(measurements)} "
            f"multiplies it by{known}, in {name_layers(wrong)}",
            REMEDY,
        )
    if measurements.arms.source is not None:
        if unfolded := _unfolded(measurements):
            return confirmed(
                f"the config says that the scale is in the weights, but those of {name_layers(unfolded)} are the "
                "source's",
                "retrofit again with --scale unscaled, or set scale in the config to 'source'",
                effect=_effect(measurements, scale_in_weights(measurements, unfolded[0])),
            )
        if stretched := _stretched(measurements):
            factor = next(iter(stretched.values()))
            known = f" ({'sqrt(d)' if factor > 1 else '1/sqrt(d)'})" if _near(factor, root) else ""
            return confirmed(
                f"{len(stretched)} weights of the attention are the source's times {factor:.3g}{known}: "
                f"{', '.join(list(stretched)[:3])}{', ...' if len(stretched) > 3 else ''}",
                REMEDY,
                effect=weights_back(measurements, list(stretched)),
            )
    for meaning in MEANINGS:
        if (confirming := meant_otherwise(measurements, meaning, REMEDY)) is not None:
            return confirming
    if not ratios:
        return unknown("the bias acts unscaled; this family keeps its queries to itself, so their scale cannot be seen")
    return excluded(
        f"the bias acts unscaled, the content is multiplied by what the {_meant(measurements)} multiplies it by"
    )


def _effect(measurements: Measurements, factor: float) -> Effect | None:
    return measurements.undoing.attempt(f"content-{factor:.3f}", measurements.undoing.with_change(Change(scale=factor)))


def _stretched(measurements: Measurements) -> dict[str, float]:
    """The weights of attentions that are the source's times another number than one, or than what was folded in."""
    assert measurements.arms.source is not None
    factors, confirming = collinear(measurements.arms.retrofit, measurements.arms.source), {}
    for attention in measurements.arms.attentions:
        meant = (1.0, scale_in_weights(measurements, attention))
        for name, factor in factors.items():
            if name.startswith(f"{attention}.") and all(abs(factor / one - 1) > APART for one in meant):
                confirming[name] = factor
    return confirming


def _unfolded(measurements: Measurements) -> list[str]:
    """Attentions of an unscaled retrofit without a weight that differs from the source's."""
    assert measurements.arms.source is not None
    moved = measurements.moved
    return [
        attention
        for attention in measurements.arms.attentions
        if scale_in_weights(measurements, attention) != 1
        and not any(far for name, far in moved.items() if name.startswith(f"{attention}."))
    ]


def _meant(measurements: Measurements) -> str:
    """What the scale is held against."""
    return "family" if measurements.arms.source is None else "source"


def _near(ratio: float, root: float) -> bool:
    return min(abs(ratio / root - 1), abs(ratio * root - 1)) < 2 * APART
