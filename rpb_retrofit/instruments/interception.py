"""Standing between a model and its attention: seeing what goes in, changing what comes out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rpb_retrofit.instruments.attributes import set_attribute
from rpb_retrofit.runtime.anatomy import Anatomy
from rpb_retrofit.runtime.families import TABLE
from rpb_retrofit.runtime.interface import ATTENTION, CAUSAL, RUN, biased_attention, plain_attention

Attend = Callable[..., tuple[Tensor, Tensor | None]]
"""An attention: what `runtime.interface.biased_attention` is."""

Wrap = Callable[[str, Attend], Attend]
"""Given the name of an attention and its run, what runs in its place."""


@contextmanager
def intercepted(
    anatomy: Anatomy, wrap: Wrap, names: Iterable[str] | None = None, with_bias: bool = True
) -> Iterator[None]:
    """Inside, the attentions of these ``names`` (by default all) run ``wrap(name, attend)`` in the place of ``attend``.

    For families that use the attention interface. A source's ``attend`` is the same attention as a retrofit's, with a
    bias of zero; not ``with_bias``, it is Transformers' own.
    """
    with ExitStack() as undo:
        if getattr(anatomy.model.config, "rpb_retrofit", None) is None:
            for config in anatomy.configs:
                set_attribute(undo, config, "_attn_implementation_internal", ATTENTION)
            for module in anatomy.every_attention:
                set_attribute(undo, module, RUN, plain_attention)
            if with_bias:
                _add_zero_bias(undo, anatomy)
        for name in anatomy.attentions if names is None else names:
            module = anatomy.attentions[name]
            set_attribute(undo, module, RUN, wrap(name, vars(module)[RUN]))
        yield


def _add_zero_bias(undo: ExitStack, anatomy: Anatomy) -> None:
    for name, module in anatomy.attentions.items():
        facts = anatomy.facts(name)
        set_attribute(undo, module, TABLE, partial(zero_bias, facts.heads))
        set_attribute(undo, module, CAUSAL, facts.causal)
        set_attribute(undo, module, RUN, biased_attention)


def zero_bias(heads: int, offset: Any) -> Tensor:
    """The bias (heads, n) of offsets (n,) that says nothing, as a bias module would give it."""
    return torch.zeros(heads, len(offset), device=getattr(offset, "device", None))
