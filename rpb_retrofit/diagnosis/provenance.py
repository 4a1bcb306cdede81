"""Whether the tables are, number for number, what a retrofit or a training wrote, and if not, what became of them.

The config holds a checksum of each table as it was written. Equal ones prove that nothing happened to the numbers; for
others each mistake that can be taken back is taken back: the one that gives the checksum again is what happened.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations

from torch import Tensor

from rpb_retrofit.diagnosis.arms import Arms
from rpb_retrofit.diagnosis.meanings import MADE_FOR, meanings_of
from rpb_retrofit.runtime.bias import RelativePositionBias
from rpb_retrofit.runtime.families import TABLE
from rpb_retrofit.tables.checksums import KEY, Checksums, checksum, checksums, inner

HEADS, LAYERS, UNKNOWN = "heads in another order", "another layer's table", "changed in no way that is known"
ROW = "spoiled in the row of one head"


def alterations(arms: Arms, width: int) -> dict[str, str] | None:
    """The attentions whose tables are not what was written, and what became of each; empty where all are.

    None where the config has no checksums, as that of a retrofit that an older version wrote. Heads are ``width`` wide.
    """
    written = _written(arms)
    if not written or written.keys() != arms.biases.keys():
        return None
    all_of = {sums.whole for sums in written.values()}
    return {
        name: _what_became(bias, written[name], all_of, width)
        for name, bias in arms.biases.items()
        if not _is(written[name], bias)
    }


def is_written(arms: Arms, name: str, table: Tensor) -> bool:
    """Whether numbers (heads, buckets) are those that were written for an attention; also where none were recorded."""
    written = _written(arms).get(name)
    return written is None or checksum(table, arms.biases[name].bucketing.max_distance) == written.whole


def _written(arms: Arms) -> dict[str, Checksums]:
    """The checksums by attention. Attentions that share a table share its record."""
    recorded: Mapping[str, str] = arms.settings.get(KEY, {})
    owners = {id(b.weight): f"{n}.{TABLE}.weight" for n, b in reversed(arms.biases.items())}
    owners |= {id(b.weight): name for n, b in arms.biases.items() if (name := f"{n}.{TABLE}.weight") in recorded}
    recorded_texts = {name: recorded.get(owners[id(bias.weight)]) for name, bias in arms.biases.items()}
    try:
        return {name: Checksums.read(text) for name, text in recorded_texts.items() if text is not None}
    except ValueError:
        return {}


def _is(written: Checksums, bias: RelativePositionBias) -> bool:
    own = checksums(bias.weight, bias.tail, bias.bucketing)
    return own[:3] == written[:3]


def _what_became(bias: RelativePositionBias, written: Checksums, others: set[str], width: int) -> str:
    own, distance = bias.weight.detach().float(), bias.bucketing.max_distance
    if (now := checksum(own, distance)) != written.whole and now in others:
        return LAYERS
    for made_for in sorted({*DISTANCES, *(round(distance * factor) for factor in (0.25, 0.5, 2, 4))}):
        if made_for != distance and checksum(own, made_for) == written.whole:
            return f"{MADE_FOR} {made_for}"
    for what, numbers in meanings_of(bias, own, width).items():
        if checksum(numbers, distance) == written.whole or (now != written.whole and written.nearly(numbers)):
            return what
    if any(checksum(numbers, distance) == written.whole for numbers in _orders(own)):
        return HEADS
    if any(checksum(numbers, distance) == written.whole for numbers in _rows(bias, own, width)):
        return ROW
    for what, part in (("shifted by one bucket", slice(2, None)), ("shifted by minus one bucket", slice(0, -2))):
        if checksum(inner(own, bias.bucketing, part), distance) == written.inner:
            return what
    return UNKNOWN


DISTANCES = [2**n for n in range(3, 18)]
"""Maximum distances that a table may have been made for."""


def _orders(own: Tensor) -> Iterator[Tensor]:
    """A table (heads, buckets) with its heads reversed, rolled, or two of them exchanged."""
    yield own.flip(0)
    for shift in range(1, len(own)):
        yield own.roll(shift, 0)
    for first, second in combinations(range(len(own)), 2):
        order = list(range(len(own)))
        order[first], order[second] = second, first
        yield own[order]


def _rows(bias: RelativePositionBias, own: Tensor, width: int) -> Iterator[Tensor]:
    """A table (heads, buckets) in which one head's row is what it may have been meant to be."""
    for meant in meanings_of(bias, own, width).values():
        for head in range(len(own)):
            numbers = own.clone()
            numbers[head] = meant[head]
            yield numbers
