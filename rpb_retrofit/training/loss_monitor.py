"""Steps that would ruin a model: found before they are taken, with the place where they went wrong."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

RECENT = 20
"""Steps whose mean loss a spike is measured from."""


class LossMonitor:
    """Judges each step by its loss and the norm of its gradients, which all processes have in common."""

    def __init__(self, spike: float | None) -> None:
        self.spike = spike
        self.recent: deque[float] = deque(maxlen=RECENT)

    def problem(self, loss: float, norm: float) -> str | None:
        """What is wrong with a step, or None; only good steps are remembered."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(norm):
            return f"the norm of the gradients is {norm}"
        if self.spike is not None and len(self.recent) == RECENT:
            usual = sum(self.recent) / RECENT
            if loss > usual + self.spike:
                return f"the loss is {loss:.3f}, where the last {RECENT} steps had {usual:.3f} (spike={self.spike})"
        self.recent.append(loss)
        return None


@torch.no_grad()
def first_nonfinite_module(model: nn.Module, run: Callable[[], Any]) -> str | None:
    """The name of the first module whose output has a value that is not finite, in a run of the model."""
    broken: list[str] = []
    hooks = []
    for name, module in model.named_modules():

        def look(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
            tensors = output if isinstance(output, tuple | list) else [output]
            wrong = any(isinstance(x, Tensor) and x.is_floating_point() and not x.isfinite().all() for x in tensors)
            if wrong and not broken:
                broken.append(name or type(module).__name__)

        hooks.append(module.register_forward_hook(look))
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return broken[0] if broken else None


def first_nonfinite_gradient(model: nn.Module) -> str | None:
    """The name of the last parameter whose gradient is not finite: as gradients flow, the first."""
    for name, parameter in reversed(list(model.named_parameters())):
        if parameter.grad is not None and not _local(parameter.grad).isfinite().all():
            return name
    return None


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
