"""Whether the tables are, number for number, what a retrofit or a training wrote, and if not, what became of them.

The config holds a checksum of each table as it was written. Equal ones prove that nothing happened to the numbers; for
others the mistakes that can be taken back exactly are tried: the one that gives the checksum again is what happened.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from rpb_retrofit.diagnosis.arms import Arms
from rpb_retrofit.diagnosis.meanings import MADE_FOR, meanings_of
from rpb_retrofit.runtime.bias import RelativePositionBias
from rpb_retrofit.runtime.families import TABLE
from rpb_retrofit.tables.checksums import KEY, checksum, checksums

HEADS, LAYERS, UNKNOWN = "heads in another order", "another layer's table", "changed in no way that is known"


def alterations(arms: Arms, width: int) -> dict[str, str] | None:
    """The attentions whose tables are not what was written, and what became of each; empty where all are.

    None where the config has no checksums, as that of a retrofit that an older version wrote. Heads are ``width`` wide.
    """
    recorded: Mapping[str, str] = arms.settings.get(KEY, {})
    shared = next(iter(recorded.values()), None) if arms.settings.get("shared") else None
    written = {name: recorded.get(f"{name}.{TABLE}.weight", shared) for name in arms.biases}
    if not written or None in written.values():
        return None
    all_of = {sums.partition("-")[0] for sums in recorded.values()}
    return {
        name: _what_became(bias, str(written[name]), all_of, width)
        for name, bias in arms.biases.items()
        if checksums(bias.weight, bias.bucketing) != written[name]
    }


def is_written(arms: Arms, name: str, table: Tensor) -> bool:
    """Whether numbers (heads, buckets) are those that were written for an attention."""
    written: str = arms.settings.get(KEY, {}).get(f"{name}.{TABLE}.weight", "")
    return checksum(table, arms.biases[name].bucketing.max_distance) == written.partition("-")[0]


def _what_became(bias: RelativePositionBias, written: str, others: set[str], width: int) -> str:
    own, distance = bias.weight.detach().float(), bias.bucketing.max_distance
    whole, _, inner = written.partition("-")
    if checksum(own, distance) in others:
        return LAYERS
    for made_for in sorted({*DISTANCES, *(round(distance * factor) for factor in (0.25, 0.5, 2, 4))}):
        if checksum(own, made_for) == whole:
            return f"{MADE_FOR} {made_for}"
    for what, numbers in _undone(bias, own, width):
        if checksum(numbers, distance) == whole:
            return what
    parts = own.split(bias.bucketing.per_direction, 1)
    for what, part in (("shifted by one bucket", slice(2, None)), ("shifted by minus one bucket", slice(0, -2))):
        if checksum(torch.cat([table[:, part] for table in parts], 1), distance) == inner:
            return what
    return UNKNOWN


DISTANCES = [2**n for n in range(3, 18)]
"""Maximum distances that a table may have been made for."""


def _undone(bias: RelativePositionBias, own: Tensor, width: int) -> Iterator[tuple[str, Tensor]]:
    """What a table (heads, buckets) was before, by each mistake that loses no number."""
    yield from meanings_of(bias, own, width).items()
    yield HEADS, own.flip(0)
    for shift in range(1, len(own)):
        yield HEADS, own.roll(shift, 0)
