"""Whether the tables are, number for number, what a retrofit or a training wrote, and if not, what became of them.

The config holds a checksum of each table as it was written. Equal ones prove that nothing happened to the numbers; for
others the mistakes that can be taken back exactly are tried: the one that gives the checksum again is what happened.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from rpb_retrofit.diagnosis.arms import Arms
from rpb_retrofit.diagnosis.meanings import MADE_FOR, meanings_of
from rpb_retrofit.runtime.bias import RelativePositionBias
from rpb_retrofit.runtime.families import TABLE
from rpb_retrofit.tables.checksums import KEY, checksum

HEADS, LAYERS, UNKNOWN = "heads in another order", "another layer's table", "changed in no way that is known"


def alterations(arms: Arms, width: int) -> dict[str, str] | None:
    """The attentions whose tables are not what was written, and what became of each; empty where all are.

    None where the config has no checksums, as that of a retrofit that an older version wrote. Heads are ``width`` wide.
    """
    recorded: Mapping[str, str] = arms.settings.get(KEY, {})
    known = {name: recorded.get(f"{name}.{TABLE}.weight") for name in arms.biases}
    shared = next(iter(recorded.values()), None) if arms.settings.get("shared") else None
    written = {name: own or shared for name, own in known.items()}
    if not written or None in written.values():
        return None
    return {
        name: _what_became(bias, written[name], set(recorded.values()), width)
        for name, bias in arms.biases.items()
        if _own(bias) != written[name]
    }


def _own(bias: RelativePositionBias) -> str:
    return checksum(bias.weight, bias.bucketing.max_distance)


def _what_became(bias: RelativePositionBias, written: str | None, others: set[str], width: int) -> str:
    own, distance = bias.weight.detach().float(), bias.bucketing.max_distance
    if _own(bias) in others:
        return LAYERS
    for made_for in sorted({*DISTANCES, *(round(distance * factor) for factor in (0.25, 0.5, 2, 4))}):
        if checksum(own, made_for) == written:
            return f"{MADE_FOR} {made_for}"
    return next(
        (what for what, numbers in _undone(bias, own, width) if checksum(numbers, distance) == written), UNKNOWN
    )


DISTANCES = [2**n for n in range(3, 18)]
"""Maximum distances that a table may have been made for."""


def _undone(bias: RelativePositionBias, own: Tensor, width: int) -> Iterator[tuple[str, Tensor]]:
    """What a table (heads, buckets) was before, by each mistake that loses no number."""
    yield from meanings_of(bias, own, width).items()
    yield HEADS, own.flip(0)
    for shift in range(1, len(own)):
        yield HEADS, own.roll(shift, 0)
