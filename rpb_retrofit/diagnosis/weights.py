"""The retrofit's weights beside the source's."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

from transformers import PreTrainedModel

from rpb_retrofit.runtime.families import is_own


def collinear(model: PreTrainedModel, source: PreTrainedModel) -> dict[str, float]:
    """The weights that are the source's times a number, and the number; all others are left out."""
    source_weights, factors = dict(source.named_parameters()), {}
    for name, own in model.named_parameters():
        other = source_weights.get(name)
        if other is None or other.shape != own.shape or own.dim() < 2:
            continue
        a, b = own.detach().flatten().double(), other.detach().flatten().double().to(own.device)
        factor = (a @ b / (b @ b).clamp(min=1e-30)).item()
        if (a - factor * b).norm() < 0.02 * a.norm():
            factors[name] = factor
    return factors


def drift(model: PreTrainedModel, source: PreTrainedModel) -> dict[str, float | None]:
    """By how much of its size each of the source's weights moved; None where the model has none of its shape."""
    weights, moved = dict(model.named_parameters()), dict[str, float | None]()
    for name, other in source.named_parameters():
        own = weights.get(name)
        if is_own(name):
            continue
        if own is None or own.shape != other.shape:
            moved[name] = None
            continue
        before = other.detach().to(own.device, own.dtype)  # a model that was only cast did not move
        distance = (own.detach().double() - before.double()).norm()
        moved[name] = (distance / other.detach().double().norm().clamp(min=1e-12)).item()
    return moved


def kind_of(name: str) -> str:
    """A weight's name without its layer's number."""
    return re.sub(r"\.\d+(?=\.)", ".*", name)


def trained(moved: Mapping[str, float | None]) -> set[str]:
    """The weights that training moved: those of a kind that moved in all layers, or of a layer that moved as a whole.
    Damage hits few.

    ``moved`` is what `drift` gives. A weight that is in no layer tells nothing.
    """
    kinds, layers = defaultdict[str, list[str]](list), defaultdict[str, list[str]](list)
    for name, far in moved.items():
        if far is not None and kind_of(name) != name:
            kinds[kind_of(name)].append(name)
            layers[re.match(r".*?\.\d+\.", name)[0]].append(name)  # type: ignore[index]
    groups = [names for names in (*kinds.values(), *layers.values()) if len(names) > 1]
    did = {name for name, far in moved.items() if far}
    return {name for names in groups if len(did & set(names)) >= WHOLE * len(names) for name in did & set(names)}


WHOLE = 0.9
"""Share of a kind, or of a layer, that must have moved: adapters may leave one or two out."""
