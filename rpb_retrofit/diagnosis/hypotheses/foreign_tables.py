"""The tables are not this source's: another model's, a random start, or numbers that something spoiled, be it in the
row of one head."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from rpb_retrofit.diagnosis.fidelity import Fidelity
from rpb_retrofit.diagnosis.finding import QUARTER, CauseKind, Finding, confirmed, excluded, unknown, with_effect
from rpb_retrofit.diagnosis.intervention import with_tables
from rpb_retrofit.diagnosis.layer_names import name_layers
from rpb_retrofit.diagnosis.measurements import Measurements
from rpb_retrofit.diagnosis.provenance import ROW, UNKNOWN
from rpb_retrofit.diagnosis.shared_evidence import NOTABLE, altered, explains, unfitted, with_best
from rpb_retrofit.runtime.bias import RelativePositionBias
from rpb_retrofit.tables import CALIBRATED

CAUSE = "the tables do not suit this source"
PREDICTS = (
    "the tables are not what was written; or the source's attention is nearer without any table than with these, and "
    "the loss falls when they are fitted anew"
)
KIND = CauseKind.NUMBERS
REMEDY = "fit them to this source: rpb retrofit --init calibrated, with text like yours; or restore them"

LOST = 0.5
"""Share of what fitted tables bring that these must miss to be suspected."""

WORSE, FEW = 0.1, 0.25
"""Nats of KL by which a head's row must be worse than none, while what the head hands on is farther from the source's,
too (fitted rows are hardly ever farther in both); and the share of all heads that may be: more is what training the
tables alone can bring."""


def examine(measurements: Measurements) -> Finding:
    """Compare the tables with what was written, or else with none and with the best of the same buckets."""
    if measurements.as_written:
        return excluded("every table is what a retrofit or a training wrote, number for number")
    if changed := altered(measurements, UNKNOWN):
        return _changed(measurements, changed)
    if rows := altered(measurements, ROW):
        evidence = f"in {name_layers(rows)} the row of one head is not what was written, by the checksums"
        return confirmed(evidence, REMEDY, effect=with_best(measurements, rows), undoing="fitted anew, ")
    if measurements.alterations is not None:
        return excluded("what became of the tables since they were written is known, and another hypothesis'")
    if (fidelity := measurements.fidelity) is None:
        return unknown("only the source's attention tells what its tables should be; give --source")
    if (asked := unfitted(measurements)) is not None:
        return excluded(asked)
    before, zeros, refit = (fidelity.mean(kl) for kl in (fidelity.own, fidelity.zeros, fidelity.refit))
    evidence = (
        f"mean KL from the source's attention: these tables {before:.3f}, none {zeros:.3f}, the best of the same "
        f"buckets {refit:.3f}"
    )
    poor = _poor(fidelity)
    if not poor:
        return _spoiled(measurements, fidelity, evidence)
    effect = with_best(measurements, poor)
    evidence = f"{evidence}; they miss most of what tables can bring in {name_layers(poor)}"
    undoing = "with the best ones, "
    if effect is not None and not explains(measurements, effect, poor):
        return excluded(f"{with_effect(evidence, effect, undoing)}: they are other ones, and no worse")
    return confirmed(evidence, REMEDY, effect=effect, undoing=undoing)


def _spoiled(measurements: Measurements, fidelity: Fidelity, evidence: str) -> Finding:
    """Whether some rows alone are spoiled: far worse than none, and fitted ones in their place bring something back."""
    rows = _spoiled_rows(measurements, fidelity)
    if not rows:
        return excluded(evidence)
    worse = {name: heads for name, heads in _worse(fidelity).items() if bool(heads.any())}
    biases = {name: measurements.arms.biases[name] for name in worse}

    def fitted(name: str, bias: RelativePositionBias) -> Tensor:
        return torch.where(
            worse[name][:, None].to(bias.weight.device), fidelity.tables[name].to(bias.weight), bias.weight
        )

    effect = measurements.undoing.attempt("fitted-rows", partial(with_tables, biases, fitted))
    evidence = f"{evidence}; far worse than none are the rows of {rows}"
    part = sum(int(heads.sum()) for heads in worse.values()) / sum(len(own) for own in fidelity.own.values())
    undoing = "with fitted ones, "
    if effect is None or not (effect.sure and effect.at_least(QUARTER * part)):
        return excluded(with_effect(evidence, effect, undoing))
    return confirmed(evidence, REMEDY, effect=effect, undoing=undoing)


def _changed(measurements: Measurements, names: list[str]) -> Finding:
    """Of tables that something changed in no way that is known: training may have, and wrote no checksums."""
    evidence = f"the numbers of {name_layers(names)} changed since they were written, in no way that is known"
    effect, fidelity = with_best(measurements, names), measurements.fidelity
    evidence = with_effect(evidence, effect, "fitted anew, ")
    if effect is not None and explains(measurements, effect, names):
        return confirmed(evidence, REMEDY, effect=effect)
    if fidelity is not None and (rows := _rows(_worse(fidelity), names)):
        return confirmed(f"{evidence}; far worse than none are the rows of {rows}", REMEDY, effect=effect)
    return unknown(f"{evidence}: by training, or by damage that costs little")


def _poor(fidelity: Fidelity) -> list[str]:
    """The attentions whose tables miss most of what tables can bring, in most heads."""
    poor = []
    for name, own in fidelity.own.items():
        if fidelity.hands_on_better(name):
            continue
        missed, brought = own - fidelity.refit[name], fidelity.zeros[name] - fidelity.refit[name]
        heads = (missed > 2 * NOTABLE) & (missed > LOST * brought)  # one head alone is another hypothesis'
        if missed.mean() > 2 * NOTABLE and missed.mean() > LOST * brought.mean() and heads.float().mean() > 0.5:
            poor.append(name)
    return poor


def _spoiled_rows(measurements: Measurements, fidelity: Fidelity) -> str:
    """The few heads whose rows are far worse than none, where rows were fitted and no weight was trained since.

    Not of an encoder: on windows unlike those of its calibration (its marks at their ends are missing) a fitted row may
    be such a one, and there is no loss that tells it from a spoiled one.
    """
    source, settings = measurements.arms.source, measurements.arms.settings
    if source is None or not measurements.arms.causal:
        return ""
    if settings.get("init") != CALIBRATED or settings.get("shared") or settings.get("polish"):
        return ""
    within = tuple(f"{attention}." for attention in measurements.arms.attentions)
    moved = [name for name, far in measurements.moved.items() if far]
    if any(not (measurements.arms.folded and name.startswith(within)) for name in moved):
        return ""
    worse = _worse(fidelity)
    if torch.cat(list(worse.values())).float().mean() > FEW:
        return ""
    return _rows(worse, list(worse))


def _worse(fidelity: Fidelity) -> dict[str, Tensor]:
    """Heads (heads,), bool, whose rows are far worse than none, in attention and in what they hand on."""
    worse = {name: own - fidelity.zeros[name] > WORSE for name, own in fidelity.own.items()}
    for name, missed in fidelity.missed.items():
        worse[name] &= missed > fidelity.missed_without[name]
    return worse


def _rows(worse: Mapping[str, Tensor], names: list[str]) -> str:
    """Those of these attentions, in words; empty where there are none."""
    heads = {name_layers([name]): worse[name].nonzero().flatten().tolist() for name in names}
    named = [f"{layer}: {', '.join(map(str, which))}" for layer, which in heads.items() if which]
    return "heads " + "; ".join(named) if named else ""
