"""Weights are not the source's: another checkpoint's, damaged, or changed beyond what training does."""

from __future__ import annotations

from statistics import median

from rpb_retrofit.diagnosis.finding import CauseKind, Finding, confirmed, excluded, unknown
from rpb_retrofit.diagnosis.measurements import Measurements
from rpb_retrofit.diagnosis.shared_evidence import weights_back
from rpb_retrofit.diagnosis.weights import trained

CAUSE = "weights differ from the source's beyond what the retrofit changes"
PREDICTS = "before training, a weight differs at all; after it, some moved very much farther than the others"
KIND = CauseKind.NUMBERS
REMEDY = "restore these weights from the source or from the checkpoint of before"

FOREIGN = 0.7
"""Share of its size that the median weight is away from another model's: training moves it by hundredths."""

OUTLIER, FAR = 20.0, 0.3
"""A weight moved too far where it moved so many times as far as the median one, and by this share of its size."""


def examine(measurements: Measurements) -> Finding:
    """Compare every weight with the source's."""
    if measurements.arms.source is None:
        return unknown("there is nothing to compare with; give --source")
    moved = measurements.moved
    missing = [name for name, far in moved.items() if far is None]
    if missing:
        return confirmed(
            f"{len(missing)} weights are missing or of another shape than the source's: {', '.join(missing[:3])}",
            REMEDY,
        )
    sizes = {name: far for name, far in moved.items() if far is not None}
    changed = {name: far for name, far in sizes.items() if far > 0}
    folded = measurements.arms.folded
    attention = {n for n in changed if any(n.startswith(f"{a}.") for a in measurements.arms.attentions)}
    typical = median(sizes.values())
    if typical > FOREIGN:
        return confirmed(
            f"the median weight is {typical:.0%} of its size away from the source's: they are not this source's",
            "give the source that the retrofit was made from; its config names "
            f"'{measurements.arms.settings.get('source', 'none')}'",
            effect=weights_back(measurements, list(changed)),
        )
    tuned = trained(moved)
    odd = {name: far for name, far in changed.items() if name not in tuned and not (folded and name in attention)}
    if typical == 0 and odd:  # most weights are the source's, and training moved none of these
        return _damaged(measurements, odd, f"{len(odd)} of {len(sizes)} weights are not the source's, {_others(tuned)}")
    usual = typical or (median(sizes[name] for name in tuned) if tuned else 0.0)
    if not usual:
        rest = ", but for what makes the queries, into which something was folded" if changed else ""
        return excluded(f"all {len(sizes)} weights are the source's{rest}")
    odd = {name: far for name, far in changed.items() if far > max(FAR, OUTLIER * usual)}
    if odd:
        evidence = (
            f"{len(odd)} weights moved by up to {max(odd.values()):.0%} of their size, the median one by {usual:.1%}"
        )
        return _damaged(measurements, odd, evidence)
    return excluded(
        f"weights moved as training moves them: by {usual:.1%} of their size, at most {max(sizes.values()):.0%}"
    )


def _others(tuned: set[str]) -> str:
    return f"all others are but for {len(tuned)} that moved with their kind or layer" if tuned else "all others are"


def _damaged(measurements: Measurements, odd: dict[str, float], evidence: str) -> Finding:
    worst = sorted(odd, key=lambda name: -odd[name])
    evidence = f"{evidence}: {', '.join(worst[:3])} (by {odd[worst[0]]:.1%} of its size)"
    return confirmed(evidence, REMEDY, effect=weights_back(measurements, worst), undoing="")
