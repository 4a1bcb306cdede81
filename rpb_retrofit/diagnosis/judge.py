"""What several hypotheses ask of the same measurements."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from rpb_retrofit.diagnosis.consistency import CLOSE, Way
from rpb_retrofit.diagnosis.exam import Exam
from rpb_retrofit.diagnosis.finding import Finding, confirmed, excluded, unknown
from rpb_retrofit.diagnosis.words import some
from rpb_retrofit.runtime.modeling import SCALING

WON_BACK = 0.4
"""Share of the distance from the best tables that undoing a mistake must win back to be its cause."""

LEFT = 0.25
"""Share of what the best tables bring over none that may still be missing then: less of a wrong table also helps."""

NOTABLE = 0.02
"""Mean KL in nats between attentions below which nothing is made of it."""


def of_kind(exam: Exam, kind: str) -> list[str]:
    """The attentions whose acting bias is related to the table in this way."""
    return [name for name, comparison in exam.comparisons.items() if comparison.kind == kind]


def meant_otherwise(exam: Exam, meaning: str) -> str | None:
    """The evidence that tables were meant to be something else, by the source's attention; None where there is none.

    It counts where it brings back a good part of what the best tables of the same buckets would, in most layers or in
    some by far.
    """
    fidelity = exam.fidelity
    if fidelity is None or exam.arms.settings.get("shared"):  # a table for all layers is no single layer's best
        return None
    won = {}
    for name, own in fidelity.own.items():
        other = fidelity.meant[name].get(meaning)
        if other is None:
            continue
        excess, gain = (own - fidelity.refit[name]).mean().item(), (own - other).mean().item()
        missed = (other - fidelity.refit[name]).mean().item()
        brought = (fidelity.zeros[name] - fidelity.refit[name]).mean().item()
        if gain > NOTABLE and gain > WON_BACK * excess and missed < LEFT * brought:
            best = min(fidelity.meant[name], key=lambda what: fidelity.meant[name][what].mean().item())
            if best == meaning:
                won[name] = gain
    if not won:
        return None
    before = sum(fidelity.own[name].mean().item() for name in won) / len(won)
    after = before - sum(won.values()) / len(won)
    return (
        f"the source's attention says that the tables of {some(won)} are {meaning}: undone, the mean KL from it falls "
        f"from {before:.3f} to {after:.3f} nats"
    )


def fed_otherwise(exam: Exam, ways: Sequence[str], remedy: str) -> Finding:
    """Whether the logits depend on these ways to feed a text, where those of the family itself do not."""
    allowed = CLOSE.get(exam.arms.dtype, CLOSE[torch.float32])
    found: dict[str, Way] = {way: exam.ways[way] for way in ways if way in exam.ways}
    wrong, unable = {}, []
    if found and all(way.error for way in found.values()):
        return unknown(f"the model does not run: {next(iter(found.values())).error}")
    for name, way in found.items():
        if way.difference <= allowed and not way.error and not way.broken:
            continue
        theirs = exam.source_ways.get(name)
        if theirs is not None and (theirs.difference > allowed or theirs.error or theirs.broken):
            unable.append(name)
        else:
            wrong[name] = way
    figures = {name: way.difference for name, way in found.items()}
    if wrong:
        said = ", ".join(f"{name}: {_said(way)}" for name, way in wrong.items())
        return confirmed(
            f"{said}; the family itself shows no such difference",
            remedy,
            figures=figures,
        )
    good = [name for name in found if name not in unable]
    rest = f"; {', '.join(unable)}: the family itself cannot do that" if unable else ""
    if not good:
        return unknown(f"nothing to compare{rest}", figures=figures)
    largest = max(found[name].difference for name in good)
    return excluded(
        f"{', '.join(good)}: the same logits, within {largest:.0e} of the largest one{rest}", figures=figures
    )


FINER, SHARE = 0.05, 0.28
"""Mean KL in nats, and share of what the best tables of these buckets win over none, that others must win on top."""


def coarse(exam: Exam, other: str, described: str, remedy: str) -> Finding:
    """Whether other buckets would bring the tables notably nearer to the source's attention."""
    fidelity = exam.fidelity
    if fidelity is None:
        return unknown("only the source's attention tells what the buckets hide; give --source")
    richer = {name: kl[other] for name, kl in fidelity.richer.items() if other in kl}
    if not richer:
        return excluded("the buckets are as fine and reach as far as the text that was measured")
    refit, best = fidelity.mean({name: fidelity.refit[name] for name in richer}), fidelity.mean(richer)
    said = (
        f"mean KL from the source's attention: {refit:.3f} with the best tables of these buckets, {best:.3f} with "
        f"those of {other}{described}"
    )
    brought = fidelity.mean({name: fidelity.zeros[name] for name in richer}) - refit
    if refit - best > FINER and refit - best > SHARE * brought:
        return confirmed(said, remedy)
    return excluded(said)


def content_ratios(exam: Exam) -> dict[str, float]:
    """What multiplies query and key, over the same of the source, by attention.

    Where a retrofit is unscaled on purpose, what its weights hold counts as a part of it.
    """
    theirs = exam.source_still_life.portraits
    found = {}
    for name, portrait in exam.still_life.portraits.items():
        other = theirs.get(name)
        if portrait.scale is not None and other is not None and other.scale is not None:
            ratio = portrait.scale / other.scale * scale_in_weights(exam, name)
            worst = float(ratio[(ratio - 1).abs().argmax()])
            if math.isfinite(worst) and worst > 0:
                found[name] = worst
    return found


def scale_in_weights(exam: Exam, attention: str) -> float:
    """The scale that was folded into what makes an attention's queries; 1 where none was."""
    return float(getattr(exam.arms.attentions[attention], SCALING, 1.0))


def _said(way: Way) -> str:
    if way.error:
        return way.error
    if way.broken:
        return f"{way.broken} logits are no numbers"
    return f"logits differ by {way.difference:.1%} of the largest one"
