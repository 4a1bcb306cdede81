"""What a fault is, how one is registered, and what faults change."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

import rpb_retrofit as rpb
from rpb_retrofit.diagnosis.arms import Arms
from tests.diagnosis.small_model import language


@dataclass(frozen=True)
class Fault:
    """``plant`` spoils a healthy retrofit in place, or gives other arms; ``cause`` is the hypothesis that has to name
    it first, where a text of the language is read at ``lengths``."""

    name: str
    cause: str
    plant: Callable[[Arms], Arms | None]
    lengths: tuple[int, ...] = (64, 256)
    text: Callable[[int, int], Tensor] = language

    def __str__(self) -> str:
        return self.name


FAULTS: list[Fault] = []


def fault(name: str, cause: str, settings: dict[str, Any] | None = None, **severities: Any) -> Callable[[Any], Any]:
    """Register a function as one fault, or as one for each severity; ``settings`` are of the `Fault`."""

    def register(plant: Any) -> Any:
        if not severities:
            FAULTS.append(Fault(name, cause, plant, **(settings or {})))
        for how, value in severities.items():
            FAULTS.append(
                Fault(f"{name}, {how}", cause, lambda arms, value=value: plant(arms, value), **(settings or {}))
            )
        return plant

    return register


EVERYWHERE: dict[str, Any] = {"in all layers": None, "in one layer": 1}
"""The two severities of what a layer can have."""


def tables(arms: Arms, count: int | None = None) -> list[nn.Parameter]:
    return [bias.weight for bias in _some(arms.biases.values(), count)]


def layers(arms: Arms, count: int | None) -> list[Any]:
    return _some(arms.attentions.values(), count)


def _some(things: Any, count: int | None) -> list[Any]:
    """All of a list by layers, or so many from its first third on."""
    things = list(things)
    return things if count is None else things[len(things) // 3 :][:count]


def root(arms: Arms) -> float:
    """sqrt(d) of a head."""
    config = arms.retrofit.config
    return math.sqrt(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def reloaded(model: Any, **settings: Any) -> Any:
    """A retrofit, saved, its config.json changed, and loaded again."""
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        file = Path(folder) / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
        return rpb.load(folder).eval()


def answer(arms: Arms, change: Callable[[Any, Any], Any], count: int | None = None) -> None:
    """Every bias module (of the first ``count`` layers) answers ``change(module, offsets)``."""
    for module in layers(arms, count):
        bias = module.relative_attention_bias
        inner = type(bias).forward
        bias.forward = lambda offset, bias=bias, inner=inner: change(
            lambda o: inner(bias, o), torch.tensor(list(offset)) if isinstance(offset, range) else offset
        )
