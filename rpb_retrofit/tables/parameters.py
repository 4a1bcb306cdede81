"""What a fit may change in a head, and what it has to know of the data for it.

Everything that is fitted enters a score linearly: ``s_ij = content + sum_k x_k f_k(i, j)``. A bucket's feature is
whether the offset lies in it; a tail's, the logarithm of the distance beyond the maximum; and the features of a
factor's two parts are the real and the imaginary part of its pair's complex product of query and key. So of a row of
attention weights ``w`` only the *moments* ``sum_j w_j f_k`` are needed, and the features' covariance: sums over a row,
and nothing of size N x N.

(Under a soft cap the content's features are bent by its slope, and their covariance is Gauss and Newton's matrix.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rpb_retrofit.runtime.buckets import Bucketing, bucket_of, log_beyond
from rpb_retrofit.runtime.factor import RotaryPairs, turned
from rpb_retrofit.tables.attention_rows import AttentionRows

CHUNK = 2**22
"""Numbers of weighted keys at a time."""


@dataclass(frozen=True)
class ParameterLayout:
    """The numbers of a head, in this order: a table; with ``tail``, the slopes of a logarithmic tail; with ``pairs``,
    the real parts less one and then the imaginary parts of the factors of all frequencies but the ``kept`` highest."""

    bucketing: Bucketing
    tail: bool = False
    pairs: RotaryPairs | None = None
    kept: int = 0

    @property
    def num_bias(self) -> int:
        """Numbers that the bias is made of: buckets and slopes."""
        return self.bucketing.num_buckets + (self.bucketing.directions if self.tail else 0)

    @property
    def num_factors(self) -> int:
        """Frequencies that get a factor."""
        return 0 if self.pairs is None else self.pairs.frequencies - self.kept

    @property
    def size(self) -> int:
        """Numbers of a head."""
        return self.num_bias + 2 * self.num_factors

    @property
    def falling(self) -> slice:
        """The numbers that are kept at or below zero: the slopes, since a bias that rises with the distance would give
        all attention to the farthest keys of a longer text."""
        return slice(self.bucketing.num_buckets, self.num_bias)

    def table(self, numbers: Tensor) -> Tensor:
        """The table (heads, buckets) in numbers (heads, size)."""
        return numbers[:, : self.bucketing.num_buckets]

    def slopes(self, numbers: Tensor) -> Tensor:
        """The tail's slopes (heads, directions) in numbers (heads, size); (heads, 0) without a tail."""
        return numbers[:, self.falling]

    def factor(self, numbers: Tensor) -> Tensor:
        """The factors (heads, F, 2) of all frequencies; 1 for those that have none."""
        parts = numbers[:, self.num_bias :].unflatten(1, (2, -1)).transpose(1, 2)
        return F.pad(parts, (0, 0, self.kept, 0)) + torch.tensor([1.0, 0.0]).to(parts)

    def scores(self, rows: AttentionRows, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """The scores (heads, R, K), in the dtype of the numbers (heads, size), and the content term in them."""
        pairs, factor = self.pairs, self.factor(numbers) if self.num_factors else None

        def turn(query: Tensor) -> Tensor:
            return query if factor is None or pairs is None else turned(query, factor, pairs)

        content = rows.content(numbers.dtype, turn)
        return content + rows.diagonals(numbers[:, : self.num_bias] @ self._basis(rows, numbers.dtype)), content

    def moments(self, rows: AttentionRows, weights: Tensor, content: Tensor) -> Tensor:
        """The moments (heads, R, size) of rows of weights (heads, R, K)."""
        parts = [rows.masses(weights, self.bucketing)]
        if self.tail:
            parts.append(torch.einsum("hrk,trk->hrt", weights, rows.diagonals(self._reach(rows, weights.dtype))))
        if self.num_factors:
            query, key = self._rotary(rows, weights.dtype)
            bent = rows.grouped(weights if (slope := rows.cap_slope(content)) is None else weights * slope)
            parts.append(_products(query, rows.ungrouped(bent @ key)))
        return torch.cat(parts, -1)

    def covariance(self, rows: AttentionRows, weights: Tensor, content: Tensor, moments: Tensor) -> Tensor:
        """The covariance of the features under each row's weights, (heads, size, size), summed over rows whose moments
        are known; a sink's share counts as a key without features."""
        bias, buckets = self.num_bias, self.bucketing.num_buckets
        sums = moments.new_zeros(rows.heads, self.size, self.size)
        own = moments[..., :bias]
        sums[:, :bias, :bias] = torch.diag_embed(own.sum(1))
        if self.tail:  # whatever lies beyond the maximum distance lies in the last bucket of its direction
            squares = torch.einsum("hrk,trk->ht", weights, rows.diagonals(self._reach(rows, weights.dtype) ** 2))
            for tail in range(buckets, bias):
                last = (tail - buckets + 1) * self.bucketing.per_direction - 1
                sums[:, last, tail] = sums[:, tail, last] = sums[:, tail, tail]
                sums[:, tail, tail] = squares[:, tail - buckets]
        sums[:, :bias, :bias] -= own.transpose(1, 2) @ own
        if self.num_factors:
            self._add_content(sums, rows, weights, content, moments)
        return sums

    def _add_content(
        self, sums: Tensor, rows: AttentionRows, weights: Tensor, content: Tensor, moments: Tensor
    ) -> None:
        bias, slope = self.num_bias, rows.cap_slope(content)
        query, keys = self._rotary(rows, weights.dtype)
        basis = rows.diagonals(self._basis(rows, weights.dtype)).transpose(0, 1)  # (R, bias, K)
        size = max(1, CHUNK // keys[0].numel())
        for head in range(rows.heads):
            key = keys[head * len(keys) // rows.heads]
            for start in range(0, weights.shape[1], size):
                part = slice(start, start + size)
                weight, turn = weights[head, part], query[head, part, None]
                bent = key[None] if slope is None else slope[head, part, :, None] * key
                # Keys have a large mean in common, which would leave nothing of a small spread but rounding.
                share = weight.sum(-1)[:, None, None]
                centred = bent - weight[:, None] @ bent / share
                weighted = weight[..., None] * centred  # (R', K, 2 F)
                cross = _products(turn, basis[part] @ weighted).sum(0)
                once = _products(turn, centred.transpose(1, 2) @ weighted).transpose(1, 2)
                square = _products(turn, once).sum(0)
                if rows.sinks is not None:
                    mean = moments[head, part]
                    rest = (mean * (1 / share[:, 0] - 1)).T @ mean[:, bias:]
                    cross, square = cross + rest[:bias], square + rest[bias:]
                sums[head, :bias, bias:] += cross
                sums[head, bias:, :bias] += cross.T
                sums[head, bias:, bias:] += square

    def _rotary(self, rows: AttentionRows, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Queries (heads, R, 2 F), scaled, and keys (key-value heads, K, 2 F): of the pairs that get a factor, first
        all the first dimensions, then the second ones."""
        assert self.pairs is not None and rows.query is not None and rows.key is not None
        dimensions = torch.cat([index[self.kept :] for index in self.pairs.dimensions()]).to(rows.key.device)
        return rows.query[..., dimensions].to(dtype) * rows.scale, rows.key[..., dimensions].to(dtype)

    def _basis(self, rows: AttentionRows, dtype: torch.dtype) -> Tensor:
        """Every bias feature (num_bias, offsets) of the rows' offsets, descending."""
        bucket = bucket_of(rows.offsets, self.bucketing)
        one = F.one_hot(bucket, self.bucketing.num_buckets).T.to(dtype)
        return torch.cat([one, self._reach(rows, dtype)]) if self.tail else one

    def _reach(self, rows: AttentionRows, dtype: torch.dtype) -> Tensor:
        return log_beyond(rows.offsets, self.bucketing).to(dtype)


def _products(query: Tensor, vector: Tensor) -> Tensor:
    """Real and imaginary parts of the complex products of (..., 2 F) each: first halves real, second imaginary."""
    (a, b), (x, y) = query.chunk(2, -1), vector.chunk(2, -1)
    return torch.cat([a * x + b * y, a * y - b * x], -1)
