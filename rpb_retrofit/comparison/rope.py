"""RoPE with other settings: what the arms that keep rotating have in common."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

from transformers import PreTrainedModel

from rpb_retrofit.comparison.arm import Apply, Situation
from rpb_retrofit.errors import ConfigError
from rpb_retrofit.runtime.anatomy import Anatomy

Settings = Callable[[float, float, int, int], Mapping[str, Any]]
"""Factor, the source's base, its context in tokens, and the dimensions that rotate, to ``rope_parameters``."""

LOCAL = ("sliding", "chunked")
"""What the name of a layer type holds whose layers see no farther than their window: their rotation stays as it is."""


def scaled(settings: Settings) -> Apply:
    """An arm that gives a plain RoPE other settings, by a factor: the target over the context unless a number says."""

    def apply(model: PreTrainedModel, situation: Situation) -> str:
        factor = situation.number or situation.target / situation.context
        if factor <= 1:
            raise ConfigError(
                f"a target of {situation.target} tokens lies within the context of {situation.context}, so there is "
                "nothing to scale: give a factor, as in 'yarn:2'"
            )
        return rotate_by(model, situation, lambda *about: settings(factor, *about))

    return apply


def rotate_by(
    model: PreTrainedModel, situation: Situation, settings: Callable[[float, int, int], Mapping[str, Any]]
) -> str:
    """Give the rotary modules of a twin the settings, made from base, context and dimensions; the config to write.

    ConfigError where the source has no RoPE, or one that is scaled already.
    """
    anatomy, config = Anatomy.of(model), model.config.get_text_config()
    if anatomy.family.mechanism != "rope":
        raise ConfigError(f"the source has {anatomy.family.mechanism} positions, and there is no RoPE to scale")
    frequencies = anatomy.inverse_frequencies
    parameters = deepcopy(config.rope_parameters)
    nested = isinstance(next(iter(parameters.values())), dict)
    for kind, own in parameters.items() if nested else [("", parameters)]:
        if any(word in kind for word in LOCAL):
            continue
        if (before := own.get("rope_type", "default")) != "default":
            raise ConfigError(f"the source's RoPE is scaled already (rope_type '{before}'): scaling twice is undefined")
        if (rotating := 2 * len(frequencies[f"{kind}_inv_freq" if kind else "inv_freq"])) < 4:
            raise ConfigError("the source's RoPE has one frequency, 1 radian a token, which no base changes")
        own |= settings(own["rope_theta"], situation.context, rotating)
    config.rope_parameters = parameters
    for name, holder in anatomy.position_modules.items():
        fresh: Any = type(holder)(config=config)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, fresh.to(model.device))
    return f'config.json: "rope_parameters": {json.dumps(shortened(parameters))}'


def shortened(parameters: Mapping[str, Any]) -> Mapping[str, Any]:
    """Settings for a sentence: a long list is its ends."""
    return {
        name: [*value[:2], "...", *value[-1:]] if isinstance(value, list) and len(value) > 4 else value
        for name, value in parameters.items()
    }


def ntk_base(base: float, factor: float, rotating: int) -> float:
    """The base with which the lowest frequency turns ``factor`` times more slowly and the highest as before."""
    return base * factor ** (rotating / (rotating - 2))


def ntk_factors(factor: float, rotating: int) -> list[float]:
    """By how much each frequency slows down with that base, the highest first."""
    return [math.pow(factor, 2 * i / (rotating - 2)) for i in range(rotating // 2)]
