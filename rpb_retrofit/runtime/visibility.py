"""Which keys a query sees, in linear memory: a run of keys per query, and the pieces that such runs fall into.

Causality, sliding windows, chunks, packed documents and padding at either end all give each query one run of keys.
So an integer tensor (batch, 1, Q, 2) of first and one-past-last keys says what otherwise takes a Q x K mask. It is
cut into pieces in which visibility is a plain rule: a range of keys, and a range of offsets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .tracing import traced

BLOCK = 2**20
"""Entries of a mask that are evaluated at a time: what a CPU's cache holds."""

DEVICE_BLOCK = 2**25
"""The same on a GPU, where every launch takes its time."""


class Piece(NamedTuple):
    """Queries that see keys by one rule: those in a range of keys whose offset lies in a range of offsets.

    ``rows``, ``queries`` and ``keys`` are half-open ranges; offsets ``lowest .. highest`` are inclusive, None on
    either side where nothing is cut off.
    """

    rows: tuple[int, int]
    queries: tuple[int, int]
    keys: tuple[int, int]
    lowest: int | None
    highest: int | None

    def blocks(self, size: int, first_offset: int) -> Iterator[tuple[int, int, int, int]]:
        """Blocks of at most ``size`` queries with the keys that they can see: (start, end, first key, end of keys)."""
        for start in range(self.queries[0], self.queries[1], size):
            end = min(start + size, self.queries[1])
            first, last = self.keys
            if self.highest is not None:
                first = max(first, first_offset + start - self.highest)
            if self.lowest is not None:
                last = min(last, first_offset + end - self.lowest)
            if first < last:
                yield start, end, first, last

    def offsets(self, first_offset: int) -> tuple[int, int]:
        """The lowest and highest offset that occur; lowest > highest where none does."""
        low = first_offset + self.queries[0] - (self.keys[1] - 1)
        high = first_offset + self.queries[1] - 1 - self.keys[0]
        return (
            low if self.lowest is None else max(low, self.lowest),
            high if self.highest is None else min(high, self.highest),
        )


def pieces_of(runs: Tensor, first_offset: int) -> list[Piece]:
    """The pieces of ``runs``, (batch, Q, 2) integers: first key and one past the last key of each query.

    Queries whose run is empty are in no piece. Consecutive batch rows with equal runs share their pieces.
    """
    runs = runs.cpu()
    pieces: list[Piece] = []
    equal = (runs[1:] == runs[:-1]).flatten(1).all(1).tolist()
    row = 0
    while row < len(runs):
        end = row + 1
        while end < len(runs) and equal[end - 1]:
            end += 1
        pieces += _pieces_of_row(runs[row], (row, end), first_offset)
        row = end
    return pieces


def _pieces_of_row(run: Tensor, rows: tuple[int, int], first_offset: int) -> list[Piece]:
    """Cut where the way in which runs change from query to query changes: an end stays, or moves by one key."""
    seen = run[:, 1] > run[:, 0]
    step = run.diff(dim=0)
    regular = ((step == 0) | (step == 1)).all(1) & seen[1:] & seen[:-1]
    kind = torch.where(regular, 2 * step[:, 0] + step[:, 1], -1)
    # Candidates for a piece's last query: where the kind of step changes, and the very last.
    turns = [*((kind[1:] != kind[:-1]).nonzero()[:, 0] + 1).tolist(), len(kind)] if len(kind) else [0]
    irregular = (kind < 0).nonzero()[:, 0].tolist()  # after each of these queries a piece ends
    pieces = []
    start = 0
    for end in sorted({*turns, *irregular, len(run) - 1}):
        if end < start:
            continue
        (first_key, first_end), (_, last_end) = run[start].tolist(), run[end].tolist()
        if first_end > first_key:
            moves = int(kind[start]) if end > start else 0
            pieces.append(
                Piece(
                    rows,
                    (start, end + 1),
                    (first_key, last_end),
                    first_offset + start - (first_end - 1) if moves & 1 else None,
                    first_offset + start - first_key if moves & 2 else None,
                )
            )
        start = end + 1
    return pieces


def runs_of(visible: Callable[[int, int], Tensor], queries: int, keys: int) -> Tensor | None:
    """The runs (batch, 1, Q, 2), int32, of a mask that is evaluated in blocks of queries; None if a row has gaps, and
    where there is nothing to look at.

    ``visible`` maps a half-open range of queries to a boolean (batch, 1, end - start, K). It takes the time of the
    whole mask, once, and the memory of one block.
    """
    parts: list[Tensor] = []
    start, size = 0, max(1, BLOCK // max(keys, 1))
    while start < queries:
        seen = visible(start, min(start + size, queries))
        if traced(seen):
            return None
        count = seen.sum(-1)
        bits = seen.to(torch.uint8)
        first = bits.argmax(-1)
        last = keys - bits.flip(-1).argmax(-1)
        last = torch.where(count == 0, first, last)
        if not torch.equal(last - first, count):
            return None
        parts.append(torch.stack([first, last], -1))
        start += seen.shape[2]
        size = size if seen.device.type == "cpu" else max(1, DEVICE_BLOCK // max(keys * len(seen), 1))
    return torch.cat(parts, 2).to(torch.int32)


def dense(runs: Tensor, keys: int) -> Tensor:
    """The boolean mask (batch, 1, Q, K) of runs (batch, 1, Q, 2), for what takes no runs."""
    at = torch.arange(keys, device=runs.device)
    return (at >= runs[..., :1]) & (at < runs[..., 1:])


def is_runs(mask: Tensor) -> bool:
    """Whether a mask is one of runs: integers, two for each query."""
    return mask.dtype == torch.int32 and mask.shape[-1] == 2
