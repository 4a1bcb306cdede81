"""Tables of zeros: the source without positions, the yardstick of every other initialisation."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def zeros(heads: int, buckets: int) -> Tensor:
    """A float32 table (heads, buckets) of zeros."""
    import torch  # late: `rpb retrofit` starts copying before it

    return torch.zeros(heads, buckets)
