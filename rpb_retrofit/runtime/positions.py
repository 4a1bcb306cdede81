"""The positions that a caller gives: the bias follows ``position_ids``, those of cached keys included.

Without them a token's position is its index, and attention needs to know only how far the queries are ahead of the
keys: that is the fast way. It stays where positions are the index less a constant of the row, as with left padding,
and where they begin again behind a mask, as in packed documents. Elsewhere each pair's bias is looked up.
"""

from __future__ import annotations

import inspect
from functools import cache as memoised
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from .cached_positions import CONSECUTIVE, POSITIONS, continued, extended, known_slots, remember, self_attention
from .errors import ConfigError
from .tracing import traced
from .visibility import is_runs


class Positions:
    """The positions of one forward pass.

    ``query`` (batch or 1, Q) int64; ``slots`` (batch or 1, n) int64: of all keys, the cached ones first, or of all
    slots of a static cache; ``past``: the slots before the first query, a 0-dimensional tensor for a static cache.
    """

    def __init__(self, query: Tensor, slots: Tensor, past: int | Tensor) -> None:
        self.query, self.slots, self.past = query, slots, past
        self._seen: list[tuple[Tensor | None, int, int | None, bool]] = []

    def pairs(self, keys: int, first_key: int | None, device: torch.device) -> tuple[Tensor, Tensor]:
        """The positions of the queries, and of the ``keys`` slots from ``first_key`` on (None: of the last ones)."""
        first = self.slots.shape[1] - keys if first_key is None else first_key
        return self.query.to(device), continued(self.slots, first + keys)[:, first:].to(device)

    def are_indices(self, mask: Tensor | None, keys: int, first_key: int | None) -> bool:
        """Whether each query's position is its index less the constant that each key it sees has too.

        False also where it is not looked at: while a graph is traced, and for one query on a GPU, which would wait.
        """
        one = self.query.shape[1] == 1
        if traced(self.query) or (one and self.query.device.type != "cpu"):
            return False
        for seen, seen_keys, seen_first, answer in self._seen:  # a model has one mask, or two, for all its layers
            if seen is mask and (seen_keys, seen_first) == (keys, first_key):
                return answer
        answer = self._look(mask, keys, first_key)
        self._seen.append((mask, keys, first_key, answer))
        return answer

    def _look(self, mask: Tensor | None, keys: int, first_key: int | None) -> bool:
        device = self.query.device if mask is None else mask.device
        query, key = self.pairs(keys, first_key, device)
        first = self.slots.shape[1] - keys if first_key is None else first_key
        of_query = torch.arange(query.shape[1], device=device) + self.past - query
        of_key = torch.arange(keys, device=device) + first - key
        if mask is None:
            return bool((of_query == of_query[:, :1]).all() & (of_key == of_query[:, :1]).all())
        if not is_runs(mask):
            seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
            return not bool((seen & (of_query[:, None, :, None] != of_key[:, None, None, :])).any())
        # A run has one constant if no change lies between its first key and its last.
        changes = torch.nn.functional.pad((of_key.diff() != 0).cumsum(1), (1, 0))
        rows = max(len(mask), len(key), len(query))
        run = mask[:, 0].expand(rows, -1, -1).long()
        first_seen, last_seen = run[..., 0].clamp(max=keys - 1), (run[..., 1] - 1).clamp(min=0)
        changes, of_key = changes.expand(rows, -1), of_key.expand(rows, -1)
        same = changes.gather(1, first_seen) == changes.gather(1, last_seen)
        same &= of_key.gather(1, first_seen) == of_query
        return bool((same | (run[..., 0] >= run[..., 1])).all())


def takes_positions(model: Any) -> bool:
    """Whether a model's forward has an argument ``position_ids``."""
    return "position_ids" in parameters(type(model))


def read_positions(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Forward pre-hook of a model with ``position_ids``: hand its attentions `Positions`, where they need any."""
    if args:
        kwargs = {**dict(zip(parameters(type(module)), args, strict=False)), **kwargs}
    ids, cache = kwargs.get("position_ids"), self_attention(kwargs.get("past_key_values"))
    if ids is None and not hasattr(cache, POSITIONS):
        return (), kwargs
    if ids is not None and getattr(cache, CONSECUTIVE, None) is ids:
        return (), kwargs
    if (shape := _shape(kwargs)) is None:
        return (), kwargs
    batch, queries, device = shape
    past = cache.get_seq_length() if isinstance(cache, Cache) else 0
    if ids is None:
        ids = (torch.arange(queries, device=device) + past)[None]
    positions = positions_of(_checked(ids, batch, queries), cache, past, batch)
    if cache is not None:
        remember(cache, positions.slots)
    return (), {**kwargs, POSITIONS: positions}


def positions_of(ids: Tensor, cache: Any, past: int | Tensor, batch: int) -> Positions:
    """The positions of a pass of ``ids`` (batch or 1, Q) behind the ``past`` keys of a cache, or of none."""
    # A static cache has slots to spare, and does not tell a graph how many it has filled.
    length = cache.get_max_length() if isinstance(past, Tensor) else past + ids.shape[1]
    return Positions(ids, extended(known_slots(cache, batch, past), ids, past, length), past)


def _shape(kwargs: dict[str, Any]) -> tuple[int, int, torch.device] | None:
    """Rows, tokens in each, and the device of a model's input; None where it has none, as the model will say."""
    if (tokens := kwargs.get("input_ids")) is not None:
        return tokens.shape[:-1].numel(), tokens.shape[-1], tokens.device  # some heads take several rows a sample
    if (vectors := kwargs.get("inputs_embeds")) is not None:
        return vectors.shape[:-2].numel(), vectors.shape[-2], vectors.device
    return None


def tag_position_ids(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Forward pre-hook, after `read_positions`, of a model that hands its attentions nothing but ``position_ids``.

    They carry the `Positions`, or None where positions are the indices. Should a copy on the way lose that, their
    values still say it: see `tagged`.
    """
    positions, shape = kwargs.get(POSITIONS), _shape(kwargs)
    if shape is None:
        return args, kwargs
    if positions is not None:
        ids = positions.query.view(positions.query.shape)  # an object of our own
    else:
        cache = self_attention(kwargs.get("past_key_values"))
        past = cache.get_seq_length() if isinstance(cache, Cache) else 0
        given = kwargs.get("position_ids")
        ids = (torch.arange(shape[1], device=shape[2]) + past)[None] if given is None else given.view(given.shape)
    setattr(ids, POSITIONS, positions)
    return args, {**kwargs, "position_ids": ids}


def tagged(ids: Any, cache: Any, past: int | Tensor, batch: int) -> Positions | None:
    """What `tag_position_ids` put there, in the attention; None where positions are the indices."""
    if ids is None or hasattr(ids, POSITIONS):
        return getattr(ids, POSITIONS, None)
    return positions_of(ids.long(), cache, past, batch)


def refuse_positions(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of models that take no ``position_ids``, and would let them go without a word."""
    for name in ("position_ids", "decoder_position_ids"):
        if kwargs.get(name) is not None:
            raise ConfigError(
                f"{name}: {type(module).__name__} takes no positions, so a token's position is its index: leave "
                f"{name} out"
            )


def keep_positions(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Forward hook of the same model: a cache that it made itself remembers the positions too."""
    positions = kwargs.get(POSITIONS)
    if positions is None or kwargs.get("past_key_values") is not None:
        return
    made = output if isinstance(output, tuple) else output.values()
    for value in made:
        if isinstance(value, Cache):
            remember(self_attention(value), positions.slots)


def _checked(ids: Any, batch: int, queries: int) -> Tensor:
    if isinstance(ids, Tensor) and not ids.is_floating_point() and ids.dtype != torch.bool and ids.dim():
        rows = ids.reshape(-1, ids.shape[-1]) if ids.dim() < 3 or len(ids) != 3 else ids
        if rows.dim() == 2 and rows.shape[1] == queries and rows.shape[0] in (1, batch):
            return rows.long()
    received = f"shape {tuple(ids.shape)} and {ids.dtype}" if isinstance(ids, Tensor) else f"type {type(ids).__name__}"
    raise ConfigError(
        f"position_ids of {received}: the relative position bias takes integers, one for each of the {queries} tokens, "
        f"of shape ({batch}, {queries}) or (1, {queries})"
    )


@torch.compiler.assume_constant_result  # torch.compile runs it instead of tracing it
def parameters(cls: Any) -> tuple[str, ...]:
    """The names of a module class's forward arguments, in order."""
    return _parameters(cls)


@memoised
def _parameters(cls: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(cls.forward).parameters)[1:]
