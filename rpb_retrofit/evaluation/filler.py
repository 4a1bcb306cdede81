"""Pieces of the user's text, to lie between the things that are looked for."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, count
from math import gcd
from random import Random

from torch import Tensor

from rpb_retrofit.errors import DataError


def pieces(filler: Sequence[Tensor], size: int, number: int, random: Random) -> list[Tensor]:
    """``number`` pieces (size,) of token ids, each from another place, none across documents.

    ``random`` decides where the first begins; the next lie far from it and from each other. Asking for more pieces
    leaves the first as they were. Raises DataError where the text has fewer places.
    """
    places = [max(0, len(document) - size + 1) for document in filler]
    total = sum(places)
    if total < number:
        longest = max(map(len, filler), default=0)
        raise DataError(
            f"filler: {number} pieces of {size} tokens from different places take a document of {size + number - 1} "
            f"tokens, the longest has {longest}: give longer text, shorter lengths or fewer items"
        )
    # Steps of the golden section spread any number of places; with no common divisor none comes twice.
    step = next(step for step in count(round(0.618 * total)) if gcd(step, total) == 1)
    first = random.randrange(total)
    ends = list(accumulate(places))
    chosen = []
    for i in range(number):
        place = (first + i * step) % total
        document = next(j for j, end in enumerate(ends) if place < end)
        start = place - (ends[document] - places[document])
        chosen.append(filler[document][start : start + size])
    return chosen
