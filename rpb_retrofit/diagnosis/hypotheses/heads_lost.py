"""Heads that did the source's positional work no longer do: previous-token and induction heads."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from rpb_retrofit.diagnosis.arms import RETROFIT, SOURCE
from rpb_retrofit.diagnosis.effect import Effect
from rpb_retrofit.diagnosis.finding import CauseKind, Finding, confirmed, excluded, unknown
from rpb_retrofit.diagnosis.intervention import attending_as
from rpb_retrofit.diagnosis.layer_names import name_layers
from rpb_retrofit.diagnosis.measurements import Measurements

CAUSE = "heads that did the source's positional work no longer do"
PREDICTS = "a head that looked at the token before, or at what followed the same token, looks elsewhere"
KIND = CauseKind.BEHAVIOUR
REMEDY = (
    "calibrate again (--calibrate tables+content, --keep-frequencies auto help such heads most), then heal by "
    "distilling with attention relations"
)

WORKING, LOST = 0.3, 0.4
"""Mean weight from which a head counts as doing it, and the share of it below which it no longer does."""


def examine(measurements: Measurements) -> Finding:
    """Compare where each head looks."""
    own, source = measurements.attention_patterns(RETROFIT), measurements.attention_patterns(SOURCE)
    if source is None or own is None:
        return unknown("only the source tells which heads did it; give --source")
    lost: dict[str, list[str]] = {}
    which: dict[str, Tensor] = {}
    count, evidence = 0, []
    for kind, before, after in (
        ("previous-token", source.previous, own.previous),
        ("induction", source.induction, own.induction),
    ):
        names = list(before)
        first, then = (torch.stack([weights[name] for name in names]) for weights in (before, after))
        working = first > WORKING
        gone = working & (then < LOST * first)
        count += int(working.sum())
        lost[kind] = _heads(names, gone)
        for name, heads in zip(names, gone, strict=True):
            if bool(heads.any()):
                which[name] = which.get(name, torch.zeros_like(heads)) | heads
        evidence.append(
            f"{int(gone.sum())} of {int(working.sum())} {kind} heads"
            + (
                f" ({', '.join(lost[kind][:4])}: mean weight {first[gone].mean():.2f} to {then[gone].mean():.2f})"
                if gone.any()
                else ""
            )
        )
    if not count:
        return unknown("the source has no such heads on this text")
    text = f"no longer do it: {'; '.join(evidence)}"
    gone_count = sum(map(len, lost.values()))
    if gone_count:
        effect = _given_back(measurements, which)
        return confirmed(text, REMEDY, effect=effect, undoing="looking where the source's do, ")
    return excluded(f"all {count} previous-token and induction heads of the source still do it")


def _given_back(measurements: Measurements, heads: dict[str, Tensor]) -> Effect | None:
    """What it brings when these heads look where the source's do; None where no other attention can be put in."""
    source = measurements.arms.source_anatomy
    if source is None or not measurements.arms.family.uses_interface:
        return None
    return measurements.undoing.attempt("heads-given-back", partial(attending_as, measurements.arms, source, heads))


def _heads(names: list[str], gone: Tensor) -> list[str]:
    return [f"{name_layers([names[layer]])} head {head}" for layer, head in gone.nonzero().tolist()]
