"""How much each direction of a head's output counts: by the linear layer that reads it.

Which layer that is is not looked up but seen: the first one after an attention that is given just what the heads hand
on. What it does is read off by giving it unit vectors, so a Linear, a Conv1D, and either with an adapter are one case.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rpb_retrofit.instruments.interception import Attend, intercepted
from rpb_retrofit.instruments.modes import evaluating
from rpb_retrofit.runtime.anatomy import Anatomy
from rpb_retrofit.tables.recording import run

TOKENS = 64
"""Tokens of the text on which outputs and inputs are compared."""


@torch.no_grad()
def metrics(anatomy: Anatomy, window: Tensor) -> dict[str, Tensor]:
    """By attention: (heads, v, v), float32, the inner products of what the dimensions of each head's output add up to.

    Attentions whose outputs nothing linear reads as they are, are left out; so are those of a model that does not use
    the attention interface.
    """
    if not anatomy.family.uses_interface:
        return {}
    last: list[tuple[str, Tensor]] = []  # the attention that ran last, until its reader is found
    readers: dict[str, tuple[nn.Module, torch.Size]] = {}

    def keep(name: str, attend: Attend, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        output, weights = attend(*args, **kwargs)
        last[:] = [(name, output)]
        return output, weights

    def compare(module: nn.Module, args: tuple[Any, ...]) -> None:
        for (name, output), given in zip(last, args, strict=False):
            if isinstance(given, Tensor) and torch.equal(given, output.flatten(2)):
                readers[name] = module, output.shape
                last.clear()

    hooks = [
        module.register_forward_pre_hook(compare)
        for module in anatomy.model.modules()
        if getattr(getattr(module, "weight", None), "ndim", 0) == 2 and not isinstance(module, nn.Embedding)
    ]
    try:
        with evaluating(anatomy.model), intercepted(anatomy, lambda name, attend: partial(keep, name, attend)):
            run(anatomy.model, window[:TOKENS])
    finally:
        for hook in hooks:
            hook.remove()
    return {name: _inner_products(module, *shape[2:]) for name, (module, shape) in readers.items()}


def _inner_products(reader: nn.Module, heads: int, width: int) -> Tensor:
    some = next(reader.parameters())
    units = torch.eye(heads * width, device=some.device, dtype=some.dtype)
    answers = (reader(units) - reader(torch.zeros_like(units[:1]))).float().unflatten(0, (heads, width))
    return answers @ answers.mT
