"""The model that is examined beside one built anew from its config and its very weights: module by module."""

from __future__ import annotations

from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from rpb_retrofit.runtime.modeling import retrofit_class

CLOSE = {torch.float32: 1e-3, torch.float64: 1e-6, torch.bfloat16: 0.1, torch.float16: 0.05}
"""Difference of a module's outputs, relative to the largest one, that rounding explains, by dtype. Both models run the
same operations on the same shapes: on a CPU they agree bit for bit, on a GPU but for the order of sums."""


@dataclass(frozen=True)
class Rebuilt:
    """``module``: the first in running order whose output differs, None where none does; ``difference``: by how much of
    the largest output, of all modules at most; ``again``: the same, between two passes of the examined model itself;
    ``allowed``: what rounding explains."""

    module: str | None
    difference: float
    again: float
    length: int
    allowed: float


@torch.no_grad()
def rebuilt(model: PreTrainedModel, window: Tensor, dtype: torch.dtype) -> Rebuilt:
    """Compare a retrofit, which computes in ``dtype``, with itself, built anew, on a window (n,) of token ids."""
    allowed = CLOSE.get(dtype, CLOSE[torch.float32])
    own, second, fresh = _outputs(model, window), _outputs(model, window), _outputs(anew(model), window)
    again = max((_apart(own[name], second[name]) for name in own), default=0.0)
    first, worst = None, 0.0
    for name, output in own.items():
        apart = _apart(output, fresh[name]) if name in fresh else 0.0
        worst = max(worst, apart)
        if apart > allowed and first is None:
            first = name
    return Rebuilt(first, worst, again, len(window), allowed)


def anew(model: Any, config: Any = None) -> Any:
    """A model of the same class and weights, which share their memory, and of the same config or another; nothing else
    is taken over."""
    cls = retrofit_class(getattr(type(model), "source_class", type(model)))
    with no_init_weights():
        fresh = cls(deepcopy(model.config if config is None else config))
    fresh.load_state_dict(model.state_dict(), assign=True)
    fresh.tie_weights()
    return fresh.to(model.device).eval()


def _outputs(model: nn.Module, window: Tensor) -> dict[str, Tensor]:
    """A fingerprint of the output of every module that gives one tensor first, by name, in the order they end: the
    numbers of at most `KEPT` entries, evenly spread."""
    outputs: dict[str, Tensor] = {}
    with ExitStack() as undo:
        for name, module in model.named_modules():
            if name:
                undo.callback(module.register_forward_hook(partial(_keep, outputs, name)).remove)
        ids = window[None].to(next(model.parameters()).device)
        output = model(input_ids=ids, use_cache=False)
        _keep(outputs, "the whole model", model, None, output[0])
    return outputs


KEPT = 65536


def _keep(kept: dict[str, Tensor], name: str, module: nn.Module, args: Any, output: Any) -> None:
    first = output[0] if isinstance(output, tuple) and output else output
    if isinstance(first, Tensor) and first.is_floating_point() and name not in kept:
        flat = first.detach().flatten()
        kept[name] = flat[:: max(1, len(flat) // KEPT)].float().cpu()


def _apart(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape or not bool(a.isfinite().all()) or not bool(b.isfinite().all()):
        return float("inf")
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-12)).item()
