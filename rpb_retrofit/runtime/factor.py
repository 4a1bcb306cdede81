"""A complex factor on the content term, for each query head and rotary frequency.

A rotary head scores a query at ``m`` and a key at ``n`` by the sum over frequencies of ``Re(q_f conj(k_f) e^{i f (m -
n)})``. Without the rotation the best stand-in that knows no positions is ``Re(c_f q_f conj(k_f))``: the mean turn, and
its length, of the frequency over the offsets that the head looks at. The factor belongs to the query, so it folds into
the query projection, unless a norm stands between: then it is this module, which the attention calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .bias import keep_dtype


class RotaryPairs(NamedTuple):
    """Which of a head's dimensions rotate together: ``half`` (f and f + F) or ``interleaved`` (2 f and 2 f + 1) for the
    F ``frequencies``, from the dimension ``start`` on."""

    layout: str
    start: int
    frequencies: int

    def dimensions(self) -> tuple[Tensor, Tensor]:
        """The first and the second dimension of each pair, int64 (F,)."""
        index = torch.arange(self.frequencies)
        first, second = (index, index + self.frequencies) if self.layout == "half" else (2 * index, 2 * index + 1)
        return first + self.start, second + self.start


def turned(x: Tensor, factor: Tensor, pairs: RotaryPairs) -> Tensor:
    """Vectors (heads, n, d), or with a batch before, with each pair of dimensions multiplied, as one complex number, by
    its head's factor (heads, F, 2)."""
    first, second = (index.to(x.device) for index in pairs.dimensions())
    real, imaginary = factor[:, None, :, 0], factor[:, None, :, 1]
    a, b = x[..., first].to(factor.dtype), x[..., second].to(factor.dtype)
    result = x.clone()
    result[..., first] = (a * real - b * imaginary).to(x.dtype)
    result[..., second] = (a * imaginary + b * real).to(x.dtype)
    return result


class ContentFactor(nn.Module):
    """Turns and stretches queries: ``weight`` (heads, F, 2), float32, holds real and imaginary parts, 1 at first."""

    def __init__(self, num_heads: int, pairs: RotaryPairs) -> None:
        super().__init__()
        self.pairs = pairs
        one = torch.tensor([1.0, 0.0])
        self.weight = nn.Parameter(one.expand(num_heads, pairs.frequencies, 2).clone())

    def forward(self, query: Tensor) -> Tensor:
        """Queries (batch, heads, Q, d) -> the same."""
        return turned(query, self.weight, self.pairs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return super()._apply(lambda tensor: keep_dtype(fn, tensor), recurse)
