"""Tables of zeros: the source without positions, the yardstick of every other initialisation."""

from __future__ import annotations

import torch
from torch import Tensor


def zeros(heads: int, buckets: int) -> Tensor:
    """A float32 table (heads, buckets) of zeros."""
    return torch.zeros(heads, buckets)
