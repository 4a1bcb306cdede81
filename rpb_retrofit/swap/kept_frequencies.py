"""Which of RoPE's frequencies a retrofit keeps: what ``keep_frequencies`` means for a model, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from rpb_retrofit.errors import ConfigError
from rpb_retrofit.frequencies import ALL, AUTO, Amount, KeepFrequencies
from rpb_retrofit.runtime.anatomy import Anatomy

TURN = 0.9
"""Turns within the trained context from which on ``auto`` keeps a frequency: one that turns nearly once leaves no angle
far from one that training showed. In SmolLM2, one that turns 0.98 times is what a head tells far keys from the first
token by: without it, a third of what is copied from 2,048 tokens above is lost."""


class Kept(NamedTuple):
    """How many of the highest frequencies go on rotating: the most that any layer keeps, by rotary buffer, empty where
    none do; and what each attention keeps, in their order, empty where all keep as many as their buffer."""

    by_buffer: dict[str, int]
    in_layers: list[int]


def keep(anatomy: Anatomy, wanted: KeepFrequencies, turn: float = TURN) -> Kept:
    """What a model keeps; ``turn``: turns within the context that ``auto`` asks for.

    ConfigError where the model has no frequencies, or fewer, or where a rule is for no layer.
    """
    if wanted.nothing:
        return Kept({}, [])
    source, mechanism = anatomy.model.name_or_path or type(anatomy.model).__name__, anatomy.family.mechanism
    if mechanism != "rope":
        raise ConfigError(f"keep_frequencies: '{source}' has {mechanism} positions and no frequencies: leave it out")
    types = anatomy.layer_types
    if (rule := wanted.unused(list(types.values()))) is not None:
        known = sorted({layer_type for layer_type in types.values() if layer_type})
        layers = f"layers 0 to {len(types) - 1}" + (f", of the types {', '.join(known)}" if known else "")
        raise ConfigError(f"keep_frequencies: '{rule.layers}' is for no layer: '{source}' has {layers}")
    frequencies, buffers = anatomy.inverse_frequencies, anatomy.rotary_buffers
    in_layers = []
    for number, (name, layer_type) in enumerate(types.items()):
        count = _count(wanted.of_layer(number, layer_type), frequencies[buffers[name]], anatomy.context or 0, turn)
        if count > (has := len(frequencies[buffers[name]])):
            raise ConfigError(f"keep_frequencies={count}: '{source}' has {has} in {buffers[name]}; keep fewer")
        in_layers.append(count)
    most = dict.fromkeys(frequencies, 0)
    for name, count in zip(types, in_layers, strict=True):
        most[buffers[name]] = max(most[buffers[name]], count)
    differ = any(count != most[buffers[name]] for name, count in zip(types, in_layers, strict=True))
    return Kept(most if any(most.values()) else {}, in_layers if differ else [])


def _count(amount: Amount, frequencies: Tensor, context: int, turn: float) -> int:
    if amount == ALL:
        return len(frequencies)
    if amount == AUTO:
        return int((frequencies * context >= turn * 2 * math.pi).sum())
    return int(amount)


def kept_by_attention(anatomy: Anatomy, settings: Mapping[str, Any]) -> dict[str, int]:
    """How many frequencies each attention keeps, by its name, as the settings of a retrofit say."""
    if in_layers := settings.get("kept_in_layers"):
        return dict(zip(anatomy.attentions, in_layers, strict=True))
    kept = settings.get("kept_frequencies") or {}
    return {name: kept[buffer] for name, buffer in anatomy.rotary_buffers.items()} if kept else {}
