"""What a cache remembers of the positions of its keys, and what generation need not look at again.

A cache remembers them from the first pass on that was given any. What it remembers follows its rows when they are
reordered, and its length is the cache's own. Slots behind the last one that it remembers go on counting, so generation,
once it was looked at, leaves no trace at any further token.
"""

from __future__ import annotations

from contextvars import ContextVar
from functools import cache as memoised
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import EncoderDecoderCache

from .errors import ConfigError
from .tracing import traced

POSITIONS = "rpb_positions"
"""Keyword that carries `Positions` from a model to its attentions, and attribute of a cache: those of its keys."""

CONSECUTIVE = "rpb_consecutive"
"""Attribute of a cache: the very ``position_ids`` of a generation step that only go on counting from its last key."""

JUDGED = "rpb_judged"
"""Attribute of a cache: the call of `generate` all of whose steps do that."""

_generation: ContextVar[object | None] = ContextVar("rpb_generation", default=None)


def continued(slots: Tensor, length: int) -> Tensor:
    """The positions of ``length`` slots: those of ``slots`` (batch or 1, n), which go on counting."""
    if length <= slots.shape[1]:
        return slots[:, :length]
    more = torch.arange(1, length - slots.shape[1] + 1, device=slots.device)
    return torch.cat([slots, slots[:, -1:] + more], 1)


def extended(slots: Tensor | None, ids: Tensor, past: int | Tensor, length: int) -> Tensor:
    """The positions of ``length`` slots: before ``past`` those of ``slots`` (None: the indices), from there on ``ids``
    (batch or 1, Q), both of which go on counting."""
    index = torch.arange(length, device=ids.device)
    before = index if slots is None else continued(slots, length).to(ids.device)
    behind = index - past
    last = ids.shape[1] - 1
    return torch.where(behind < 0, before, ids[:, behind.clamp(0, last)] + (behind - last).clamp(min=0))


def self_attention(cache: Any) -> Any:
    """The cache of the self-attention, of an encoder-decoder's two."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def remember(cache: Any, slots: Tensor) -> None:
    """Let a cache know the positions (batch or 1, n) of its slots.

    A graph cannot change the class of an object: a cache that only graphs have met knows its positions, but not when
    its rows are reordered.
    """
    if not isinstance(cache, PositionedCache) and not traced(slots):
        source: Any = type(cache)
        cache.__class__ = _positioned(source)
    for name, value in ((POSITIONS, slots), (CONSECUTIVE, None), (JUDGED, None)):
        setattr(cache, name, value)


def known_slots(cache: Any, batch: int, past: int | Tensor) -> Tensor | None:
    """What a cache remembers of its ``past`` slots; None: nothing, they are the indices."""
    slots = getattr(cache, POSITIONS, None)
    if slots is None or (isinstance(past, int) and past == 0):
        return None
    if len(slots) in (1, batch):
        return slots
    if isinstance(past, Tensor) and int(past) == 0:  # it was reset
        return None
    raise ConfigError(
        f"past_key_values knows the position_ids of {len(slots)} rows, and the batch has {batch}: change a cache's "
        "rows by its own methods, batch_repeat_interleave, batch_select_indices and reorder_cache"
    )


class PositionedCache(Cache):
    """Mixed into the class of a cache that remembers positions: what changes its rows changes theirs."""

    source_class: type[Cache]

    def reorder_cache(self, beam_idx: Any) -> None:
        """As of `Cache`."""
        super().reorder_cache(beam_idx)
        self._follow(lambda slots: slots.index_select(0, beam_idx.to(slots.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """As of `Cache`."""
        super().batch_repeat_interleave(repeats)
        self._follow(lambda slots: slots.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """As of `Cache`."""
        super().batch_select_indices(indices)
        self._follow(lambda slots: slots[indices.to(slots.device)])

    def _follow(self, change: Any) -> None:
        slots = getattr(self, POSITIONS)
        if len(slots) > 1:  # one row stands for all
            setattr(self, POSITIONS, change(slots))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _new_positioned, (type(self).source_class,), self.__dict__


@memoised
def _positioned(source: Any) -> Any:
    return type(f"Positioned{source.__name__}", (PositionedCache, source), {"source_class": source})


def _new_positioned(source: Any) -> Any:
    cls = _positioned(source)
    return cls.__new__(cls)


def of_generation(method: Any) -> Any:
    """`generate` of a class, in which each step may know what the first one saw."""

    @wraps(method)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        token = _generation.set(object())
        try:
            return method(self, *args, **kwargs)
        finally:
            _generation.reset(token)

    return generate


def of_step(method: Any) -> Any:
    """`prepare_inputs_for_generation` of a class, after which the cache knows ids that need no look.

    Those of a step whose positions only go on counting from the last key, at one distance from their index. The first
    step of a `generate` finds that out for all that follow.
    """

    @wraps(method)  # Transformers reads in the signature what a model can begin with
    def prepare_inputs_for_generation(self: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = method(self, *args, **kwargs)
        cache, ids = self_attention(inputs.get("past_key_values")), inputs.get("position_ids")
        current = _generation.get()
        if current is not None and ids is not None and isinstance(cache, Cache):
            if kwargs.get("is_first_iteration"):
                counts = _go_on_counting(cache, ids, kwargs.get("attention_mask"))
                setattr(cache, JUDGED, current if counts else None)
            setattr(cache, CONSECUTIVE, ids if getattr(cache, JUDGED, None) is current else None)
        return inputs

    return prepare_inputs_for_generation


def _go_on_counting(cache: Any, ids: Tensor, padding: Any) -> bool:
    """Whether all tokens that ``padding`` (batch, slots; None: all) shows lie at one distance from their index, up to
    the last of ``ids`` (batch or 1, Q), from which generation counts."""
    if ids.dim() != 2 or (padding is not None and padding.dim() != 2):
        return False
    past = int(cache.get_seq_length())
    slots = extended(known_slots(cache, len(ids), past), ids, past, past + ids.shape[1])
    shift = torch.arange(slots.shape[1], device=slots.device) - slots
    other = shift != shift[:, -1:]
    if padding is not None:
        other = other & (padding[:, : slots.shape[1]].to(slots.device) != 0)
    several, shifted = torch.stack([other.any(), shift.any()]).tolist()
    if not several and (shifted or hasattr(cache, POSITIONS)):
        remember(cache, slots)
    return not several
