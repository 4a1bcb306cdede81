"""Whether a tensor has no values to look at, because a graph is being made of what is done to it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def traced(tensor: Tensor) -> bool:
    """Whether torch.compile, torch.export, torch.jit.trace, a FakeTensorMode or the meta device is at work: then no
    branch can go by values."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or not has_values(tensor)


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor holds numbers: not one on the meta device or of a FakeTensorMode."""
    return not tensor.is_meta and not isinstance(tensor, FakeTensor)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast computes in on a device; None where it is off, as on the meta device, which has none."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)
