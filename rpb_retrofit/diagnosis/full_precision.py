"""Running a half-precision model in float32 for a while: what is equal on paper then is equal in its logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import psutil
import torch
from torch import Tensor, nn

SHARE = 0.5
"""Of the memory that is free, the copies may take so much: a forward pass needs the rest."""


@contextmanager
def in_float32(model: nn.Module) -> Iterator[torch.dtype]:
    """Inside, half-precision weights and buffers are float32, where memory allows; afterwards their very bits are back.

    Gives the dtype that it then computes in. Modules, hooks and parameters stay the same objects.
    """
    halves, dtype = _halves(model), computes_in(model)
    if not halves or dtype != torch.float32:
        yield dtype
        return
    kept = [x.data for x in halves]
    try:
        for x in halves:
            x.data = x.data.float()
        yield torch.float32
    finally:
        for x, data in zip(halves, kept, strict=True):
            x.data = data


def computes_in(model: nn.Module) -> torch.dtype:
    """The dtype in which a model computes within `in_float32`."""
    halves = _halves(model)
    if not halves:
        return next((x.dtype for x in model.parameters() if x.is_floating_point()), torch.float32)
    return torch.float32 if _fits(halves) else halves[0].dtype


def _halves(model: nn.Module) -> list[Tensor]:
    tensors = chain(model.parameters(), model.buffers())
    return [x for x in tensors if x.is_floating_point() and x.element_size() == 2]


def _fits(halves: list[Tensor]) -> bool:
    needed = sum(2 * x.nbytes for x in halves)
    device = halves[0].device
    if device.type == "cuda":
        return needed < SHARE * torch.cuda.mem_get_info(device)[0]
    return device.type == "cpu" and needed < SHARE * psutil.virtual_memory().available
