"""Rows of one layer's attention: some queries of a text and all its keys, as a running model computed them.

The queries stand in reverse order and a fixed distance apart, so that the bias of all rows is one strided view of a
vector over offsets, as in ``runtime/blockwise.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rpb_retrofit.runtime.buckets import Bucketing, first_distances

BLOCK = 2**22
"""Scores that are computed at a time."""


@dataclass(frozen=True)
class AttentionRows:
    """The content scores of some queries, before any bias: either what they are made from, or the scores themselves.

    Shapes: ``query`` (heads, R, d), ``key`` (key-value heads, K, d), ``scores`` (heads, R, K) where a model hands out
    nothing else, ``sinks`` (heads,), ``seen`` (R, 2) the first and one past the last key that a query sees; ``value``
    (key-value heads, K, v) what is attended, ``output`` (heads, R, v) what came of it, where they were kept.
    ``positions`` are those of the queries, descending; keys have the positions 0 .. K - 1.
    """

    positions: range
    seen: Tensor
    keys: int
    query: Tensor | None = None
    key: Tensor | None = None
    scores: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    sinks: Tensor | None = None
    value: Tensor | None = None
    output: Tensor | None = None

    @property
    def heads(self) -> int:
        """Query heads."""
        held = self.query if self.scores is None else self.scores
        assert held is not None
        return held.shape[0]

    def blocks(self) -> Iterator[AttentionRows]:
        """The same rows, few enough at a time that their scores have `BLOCK` entries at most."""
        size = max(1, BLOCK // (self.heads * self.keys))
        for start in range(0, len(self.positions), size):
            yield self.part(slice(start, start + size))

    def part(self, rows: slice) -> AttentionRows:
        """Some of the rows, a fixed distance apart."""
        return replace(
            self,
            positions=self.positions[rows],
            seen=self.seen[rows],
            query=None if self.query is None else self.query[:, rows],
            scores=None if self.scores is None else self.scores[:, rows],
            output=None if self.output is None else self.output[:, rows],
        )

    def answered(self) -> AttentionRows:
        """The same rows with what attention without a bias makes of the values, in the place of the values."""
        if self.value is None:
            return self
        outputs = []
        for block in self.blocks():
            scores = block.content()
            outputs.append(block.attended((scores - block.log_normaliser(scores)[..., None]).exp_()))
        return replace(self, value=None, output=torch.cat(outputs, 1))

    def attended(self, weights: Tensor) -> Tensor:
        """The values under weights (heads, R, K): (heads, R, v)."""
        assert self.value is not None
        return self.ungrouped(self.grouped(weights) @ self.value.to(weights.dtype))

    def content(self, dtype: torch.dtype = torch.float32, turn: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The content scores (heads, R, K), minus infinity where a key is hidden; ``turn`` changes the queries."""
        if self.scores is not None:
            scores = self.scores.to(dtype)
        else:
            assert self.query is not None and self.key is not None
            query = self.query.to(dtype) * self.scale
            query = query if turn is None else turn(query)
            scores = self.ungrouped(self.grouped(query) @ self.key.to(dtype).transpose(1, 2))
            if self.softcap is not None:
                scores = self.softcap * torch.tanh(scores / self.softcap)
        at = torch.arange(self.keys, device=scores.device)
        hidden = (at < self.seen[:, :1]) | (at >= self.seen[:, 1:])
        return scores.masked_fill(hidden, -torch.inf)

    def grouped(self, x: Tensor) -> Tensor:
        """(heads, R, n) as (key-value heads, heads of a group * R, n)."""
        assert self.key is not None
        return x.reshape(len(self.key), -1, x.shape[-1])

    def ungrouped(self, x: Tensor) -> Tensor:
        """Undo `grouped`."""
        return x.reshape(self.heads, -1, x.shape[-1])

    def cap_slope(self, content: Tensor) -> Tensor | None:
        """How much a content score, as of `content`, changes with what the soft cap bends; None where there is none."""
        if self.softcap is None:
            return None
        return 1 - (content.masked_fill(content == -torch.inf, 0) / self.softcap) ** 2

    def log_normaliser(self, scores: Tensor) -> Tensor:
        """(heads, R): the logarithm of what the softmax of (heads, R, K) scores divides by; sinks are part of it."""
        if self.sinks is None:
            return scores.logsumexp(-1)
        return torch.logaddexp(scores.logsumexp(-1), self.sinks[:, None].to(scores.dtype))

    @property
    def offsets(self) -> Tensor:
        """All offsets between these queries and keys, descending and consecutive, int64."""
        step = -self.positions.step
        count = step * (len(self.positions) - 1) + self.keys
        return self.positions[0] - torch.arange(count, device=self.seen.device)

    def diagonals(self, line: Tensor) -> Tensor:
        """Numbers (n, offsets) of the `offsets` as (n, R, K), for every row and key: a view."""
        return line.unfold(1, self.keys, -self.positions.step)

    def masses(self, weights: Tensor, bucketing: Bucketing) -> Tensor:
        """(heads, R, buckets): what of each row of attention weights (heads, R, K) lies in each bucket."""
        sums = torch.nn.functional.pad(weights.cumsum(-1), (1, 0))
        first = torch.tensor(first_distances(bucketing), device=weights.device)
        position = torch.tensor(self.positions, device=weights.device)[:, None]

        def before(key: Tensor) -> Tensor:  # the sum of all weights before a key
            return sums.gather(2, key.clamp(0, self.keys).expand(len(sums), -1, -1))

        ends = before(position - first + 1)  # a bucket's keys end one past its nearest, and begin where the next ends
        masses = ends - torch.cat([ends[..., 1:], torch.zeros_like(ends[..., :1])], -1)
        if not bucketing.bidirectional:
            return masses
        starts = before(position + first.clamp(min=1))
        return torch.cat([masses, torch.cat([starts[..., 1:], sums[..., -1:]], -1) - starts], -1)
