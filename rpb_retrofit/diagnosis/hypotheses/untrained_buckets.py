"""Buckets that no training reached: they hold what they began with, and longer texts fall into them."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from rpb_retrofit.diagnosis.finding import CauseKind, Finding, confirmed, excluded, unknown, with_effect
from rpb_retrofit.diagnosis.intervention import with_tables
from rpb_retrofit.diagnosis.meanings import continued
from rpb_retrofit.diagnosis.measurements import Measurements
from rpb_retrofit.diagnosis.shared_evidence import LEFT, NOTABLE, WON_BACK, explains
from rpb_retrofit.runtime.bias import RelativePositionBias
from rpb_retrofit.runtime.buckets import first_distances

CAUSE = "buckets that training never reached"
PREDICTS = (
    "from some bucket on the numbers are as they were before training, or the source's attention is nearer when they "
    "continue the last bucket before; and the loss falls then"
)
KIND = CauseKind.NUMBERS
REMEDY = (
    "train at lengths that reach them (lengths: {...} in the recipe), or calibrate again on windows as long as your "
    "texts; until then let them continue the last trained bucket"
)


def examine(measurements: Measurements) -> Finding:
    """Find where untouched buckets begin, and see what continuing the one before gives back."""
    told = _untouched(measurements)
    start = told if told is not None else _by_the_source(measurements)
    if start is None:
        if measurements.as_written:
            return excluded("every table is what was written, number for number")
        if measurements.fidelity is None and measurements.arms.untrained is None:
            return unknown("the source's attention or the untrained retrofit would tell; give --source or --untrained")
        return excluded("no run of buckets to the far end is better replaced by the bucket before it")
    bias = next(iter(measurements.arms.biases.values()))
    distance = first_distances(bias.bucketing)[start]
    how = "training left as they were" if told is not None else "the source's attention says are out of place"
    evidence = (
        f"buckets {start} to {bias.bucketing.per_direction - 1} (distances from {distance} on) hold numbers that {how}"
    )
    if not measurements.arms.causal:
        return confirmed(evidence, REMEDY)
    longest = max(measurements.text.lengths)
    if distance >= longest:
        return excluded(f"{evidence}, but no text that was measured ({longest} tokens) reaches them")
    effect = measurements.undoing.effect(
        f"continued-{start}", partial(with_tables, measurements.arms.biases, partial(_continued, start)), longest
    )
    undoing = f"continuing bucket {start - 1} instead: "
    far = 1 - start / bias.bucketing.per_direction
    if effect.loss.mean < 0 and explains(measurements, effect, list(measurements.arms.biases), far):
        return confirmed(evidence, REMEDY, effect=effect, undoing=undoing)
    return excluded(with_effect(evidence, effect, undoing))


def _continued(start: int, name: str, bias: RelativePositionBias) -> Tensor:
    return continued(bias.weight.detach(), start, bias.bucketing)


def _untouched(measurements: Measurements) -> int | None:
    """The first of the far buckets that are what they were in the untrained retrofit, though others are not."""
    if measurements.pairs is not None:
        counts = measurements.pairs[: next(iter(measurements.arms.biases.values())).bucketing.per_direction]
        still = [not count for count in counts]
    elif measurements.arms.untrained is not None:
        before = dict(measurements.arms.untrained.named_parameters())
        moved = torch.stack(
            [
                (bias.weight.detach() != before[f"{name}.relative_attention_bias.weight"].detach()).any(0)
                for name, bias in measurements.arms.biases.items()
            ]
        ).any(0)
        still = [not bool(m) for m in moved[: next(iter(measurements.arms.biases.values())).bucketing.per_direction]]
    else:
        return None
    start = len(still)
    while start and still[start - 1]:
        start -= 1
    return start if 0 < start < len(still) else None


def _by_the_source(measurements: Measurements) -> int | None:
    """The bucket from which on the tables are better continued, by the source's attention."""
    if measurements.alterations is not None or measurements.fidelity is None:
        return None
    fidelity = measurements.fidelity
    own, refit = fidelity.mean(fidelity.own), fidelity.mean(fidelity.refit)
    kl = {start: fidelity.mean(by_name) for start, by_name in fidelity.continued.items()}
    best = min(kl, key=lambda start: kl[start], default=0)
    gain = own - kl.get(best, own)
    left = 2 * LEFT * (fidelity.mean(fidelity.zeros) - refit)
    return best if gain > NOTABLE and gain > WON_BACK * (own - refit) and kl[best] - refit < left else None
