"""Whether a tensor has no values to look at, because a graph is being made of what is done to it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def traced(tensor: Tensor) -> bool:
    """Whether torch.compile, torch.export, torch.jit.trace or a FakeTensorMode is at work: no branch on values."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or isinstance(tensor, FakeTensor)
