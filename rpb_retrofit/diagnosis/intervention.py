"""Running a model with one thing about its attention changed: undoing a suspected cause, to see what it gives back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rpb_retrofit.runtime.bias import RelativePositionBias
from rpb_retrofit.runtime.families import TABLE, Family
from rpb_retrofit.runtime.mechanisms import hand_over, modules_named
from rpb_retrofit.runtime.modeling import attention_modules
from rpb_retrofit.tables.recording import Run, intercepted

HIDDEN = -1e4
"""What a bias is where a key is hidden: no score makes good for it, and unlike minus infinity it cannot give NaN."""


@dataclass(frozen=True)
class Change:
    """What is changed in every attention, in one forward pass without a cache.

    ``scale``: the content term is multiplied by it. ``trained``: beyond that many keys it also grows with the logarithm
    of their number, so that attention does not spread. ``window``: keys farther away than that are not seen.
    ``rope``: settings of ``rope_parameters`` that replace the model's own.
    """

    scale: float = 1.0
    trained: int | None = None
    window: int | None = None
    rope: Mapping[str, Any] | None = None


@contextmanager
def changed(model: PreTrainedModel, family: Family, change: Change) -> Iterator[None]:
    """Inside, the model runs with the change; afterwards as before."""
    attentions = attention_modules(model, family)
    with ExitStack() as undo:
        if change.rope is not None:
            undo.enter_context(_rotated_by(model, family, change.rope))
        if change.scale != 1 or change.trained is not None or change.window is not None:
            undo.enter_context(intercepted(model, attentions, partial(_with, change)))
        yield


def _with(change: Change, name: str, attend: Run) -> Run:
    def run(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        factor = torch.full((query.shape[2], 1), change.scale, device=query.device)
        if change.trained is not None:
            seen = torch.arange(1, query.shape[2] + 1, device=query.device)[:, None]
            factor = factor * (seen.log() / math.log(change.trained)).clamp(min=1)
        with _narrowed(module, change.window):
            return attend(module, query * factor.to(query.dtype), *args, **kwargs)

    return run


@contextmanager
def _narrowed(module: Any, window: int | None) -> Iterator[None]:
    """Inside, a module's bias hides the keys that are ``window`` or more away."""
    if window is None:
        yield
        return
    bias, owner = getattr(module, TABLE), module._modules if TABLE in module._modules else vars(module)

    def narrow(offset: Tensor) -> Tensor:
        return bias(offset).masked_fill(offset.abs() >= window, HIDDEN)

    owner[TABLE] = narrow
    try:
        yield
    finally:
        owner[TABLE] = bias


@contextmanager
def _rotated_by(model: PreTrainedModel, family: Family, settings: Mapping[str, Any]) -> Iterator[None]:
    """Inside, the rotary modules of a model are made from its config with other ``rope_parameters``."""
    holders: dict[str, Any] = modules_named(model, family.positions)
    with ExitStack() as undo:
        for name, holder in holders.items():
            config = deepcopy(holder.config)
            config.rope_parameters = {**config.rope_parameters, **settings}
            other = type(holder)(config=config).to(model.device)
            hand_over(holder, other)
            parent, _, child = name.rpartition(".")
            owner = model.get_submodule(parent)
            undo.callback(setattr, owner, child, holder)
            setattr(owner, child, other)
        yield


@contextmanager
def with_tables(
    biases: Mapping[str, RelativePositionBias], change: Callable[[str, RelativePositionBias], Tensor]
) -> Iterator[None]:
    """Inside, each table (heads, buckets) is what ``change`` makes of its name and module."""
    before = {name: bias.weight.detach().clone() for name, bias in biases.items()}
    new = {name: change(name, bias) for name, bias in biases.items()}
    with torch.no_grad():
        try:
            for name, table in new.items():
                biases[name].weight.copy_(table)
            yield
        finally:
            for name, table in before.items():
                biases[name].weight.copy_(table)
