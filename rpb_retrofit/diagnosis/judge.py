"""What several hypotheses ask of the same measurements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor

from rpb_retrofit.diagnosis.consistency import CLOSE, Way
from rpb_retrofit.diagnosis.exam import Exam
from rpb_retrofit.diagnosis.fidelity import NOTABLE, Fidelity, meanings_of
from rpb_retrofit.diagnosis.finding import Finding, confirmed, excluded, unknown
from rpb_retrofit.diagnosis.intervention import with_tables
from rpb_retrofit.diagnosis.words import some
from rpb_retrofit.runtime.bias import RelativePositionBias
from rpb_retrofit.runtime.modeling import SCALING

WON_BACK = 0.4
"""Share of the distance from the best tables that undoing a mistake must win back to be its cause."""

LEFT = 0.25
"""Share of what the best tables bring over none that may still be missing then: less of a wrong table also helps."""

HANDED_ON = 0.1
"""Share of what a layer's heads miss of the source's outputs that undoing a mistake must bring back. It is a layer's
own share, since one of thirty layers explains little of what a whole model lost. Planted mistakes bring back a quarter
and more; tables that were fitted to outputs and are nearer in attention when moved bring back next to nothing."""


def of_kind(exam: Exam, kind: str) -> list[str]:
    """The attentions whose acting bias is related to the table in this way."""
    return [name for name, comparison in exam.comparisons.items() if comparison.kind == kind]


def meant_otherwise(exam: Exam, meaning: str, remedy: str) -> Finding | None:
    """The finding that tables were meant to be something else; None where that is not borne out.

    Three things must agree. By the source's attention the meaning brings back a good part of what the best tables of
    the same buckets would, in most layers or in some by far. The heads then hand on what is nearer to the source's,
    which is what calibration fits. And the loss falls when it is undone in the running model, on other text.
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
            if best == meaning and _hands_on_more(fidelity, name, meaning):
                won[name] = gain
    if not won:
        return None
    before = sum(fidelity.own[name].mean().item() for name in won) / len(won)
    after = before - sum(won.values()) / len(won)
    said = (
        f"the source's attention says that the tables of {some(won)} are {meaning}: undone, the mean KL from it falls "
        f"from {before:.3f} to {after:.3f} nats"
    )
    if not exam.causal or meaning not in meanings_of(*_table(exam, next(iter(won))), exam.width):
        return confirmed(said, remedy)
    undone = exam.undone(f"{meaning}-{len(won)}", partial(_meant, exam, list(won), meaning))
    if not (undone.real and undone.mean < 0):
        return None
    return confirmed(f"{said}, and the loss changes by {undone} nats a token", remedy, gain=-undone.mean)


def _hands_on_more(fidelity: Fidelity, name: str, meaning: str) -> bool:
    """Whether the heads of an attention hand on notably more of the source's under a meaning; True where the model
    hands out no values, or the meaning is of other buckets."""
    if name not in fidelity.missed or meaning not in fidelity.missed_if_meant[name]:
        return True
    own, meant = (x.mean().item() for x in (fidelity.missed[name], fidelity.missed_if_meant[name][meaning]))
    return own - meant > HANDED_ON * own


def _table(exam: Exam, name: str) -> tuple[RelativePositionBias, Tensor]:
    bias = exam.arms.biases[name]
    return bias, bias.weight.detach().float()


def _meant(exam: Exam, names: Sequence[str], meaning: str) -> AbstractContextManager[None]:
    """Inside, the tables of these attentions are what they may have been meant to be."""

    def change(name: str, bias: RelativePositionBias) -> Tensor:
        return meanings_of(bias, bias.weight.detach().float(), exam.width)[meaning].to(bias.weight.dtype)

    return with_tables({name: exam.arms.biases[name] for name in names}, change)


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
