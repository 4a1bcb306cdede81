"""The two terms of a score are out of proportion: the bias scaled by 1/sqrt(d), or the content not scaled by it."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from functools import partial

from rpb_retrofit.diagnosis.effect import Effect
from rpb_retrofit.diagnosis.exam import Exam
from rpb_retrofit.diagnosis.finding import Finding, Kind, confirmed, excluded, unknown
from rpb_retrofit.diagnosis.intervention import Change, changed
from rpb_retrofit.diagnosis.judge import content_ratios, meant_otherwise, scale_in_weights, weights_back
from rpb_retrofit.diagnosis.weights import collinear
from rpb_retrofit.diagnosis.words import some

CAUSE = "the bias is scaled, or the content is not"
PREDICTS = (
    "the bias that acts is the table's times a number; or what multiplies query and key is not what it is in the source"
)
KIND = Kind.RUNNING
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


def examine(exam: Exam) -> Finding:
    """Compare both scales with what they should be, and try whether others would do better."""
    scaled = {n: c for n, c in exam.comparisons.items() if c.kind.startswith("scaled") or c.kind == "negated"}
    if scaled:
        kind = next(iter(scaled.values()))
        return confirmed(
            f"the bias that acts is the table's {kind.kind} (times {kind.detail:.4g}) in {some(scaled)}",
            REMEDY,
        )
    root = math.sqrt(exam.width)
    ratios = content_ratios(exam)
    wrong = {name: ratio for name, ratio in ratios.items() if abs(ratio - 1) > APART}
    if wrong:
        ratio = next(iter(wrong.values()))
        known = f", which is {'sqrt(d)' if ratio > 1 else '1/sqrt(d)'}" if _near(ratio, root) else ""
        return confirmed(
            f"the product of query and key is multiplied by {ratio:.3g} times what the "
            f"{'source' if exam.arms.source is not None else 'family'} multiplies it by{known}, in {some(wrong)}",
            REMEDY,
        )
    if exam.arms.source is not None:
        if unfolded := _unfolded(exam):
            return confirmed(
                f"the config says that the scale is in the weights, but those of {some(unfolded)} are the source's",
                "retrofit again with --scale unscaled, or set scale in the config to 'source'",
                effect=_effect(exam, scale_in_weights(exam, unfolded[0])),
            )
        if stretched := _stretched(exam):
            factor = next(iter(stretched.values()))
            known = f" ({'sqrt(d)' if factor > 1 else '1/sqrt(d)'})" if _near(factor, root) else ""
            return confirmed(
                f"{len(stretched)} weights of the attention are the source's times {factor:.3g}{known}: "
                f"{', '.join(list(stretched)[:3])}{', ...' if len(stretched) > 3 else ''}",
                REMEDY,
                effect=weights_back(exam, list(stretched)),
            )
    for meaning in MEANINGS:
        if (found := meant_otherwise(exam, meaning, REMEDY)) is not None:
            return found
    if not ratios:
        return unknown("the bias acts unscaled; this family keeps its queries to itself, so their scale cannot be seen")
    return excluded(
        f"the bias acts unscaled, the content is multiplied by what the "
        f"{'source' if exam.arms.source is not None else 'family'} multiplies it by"
    )


def _with(exam: Exam, factor: float) -> AbstractContextManager[None]:
    return changed(exam.arms.retrofit, exam.arms.family, Change(scale=factor))


def _effect(exam: Exam, factor: float) -> Effect | None:
    return exam.brings(f"content-{factor:.3f}", partial(_with, exam, factor))


def _stretched(exam: Exam) -> dict[str, float]:
    """The weights of attentions that are the source's times another number than one, or than what was folded in."""
    assert exam.arms.source is not None
    factors, found = collinear(exam.arms.retrofit, exam.arms.source), {}
    for attention in exam.arms.attentions:
        meant = (1.0, scale_in_weights(exam, attention))
        for name, factor in factors.items():
            if name.startswith(f"{attention}.") and all(abs(factor / one - 1) > APART for one in meant):
                found[name] = factor
    return found


def _unfolded(exam: Exam) -> list[str]:
    """Attentions of an unscaled retrofit without a weight that differs from the source's."""
    assert exam.arms.source is not None
    moved = exam.moved
    return [
        attention
        for attention in exam.arms.attentions
        if scale_in_weights(exam, attention) != 1
        and not any(far for name, far in moved.items() if name.startswith(f"{attention}."))
    ]


def _near(ratio: float, root: float) -> bool:
    return min(abs(ratio / root - 1), abs(ratio * root - 1)) < 2 * APART
