"""What is left of a rotary source's rotation: none of it, or its highest frequencies, in all layers or in some.

A rotary module makes the rotation once for all layers of a type, with as many frequencies as any of them keeps. An
attention that keeps fewer takes the others back to position 0 before it rotates anything: its cached keys are its own,
and nothing is remembered from call to call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

KEPT = "rpb_kept"
"""Attribute of rotary modules: how many of their highest frequencies go on rotating, by the name of their buffer."""

FEWER = "rpb_fewer"
"""Attribute of attention modules that keep fewer than their rotary module does: `Fewer`."""

ROTATION = "position_embeddings"
"""Forward argument of an attention that carries the rotation."""


@dataclass(frozen=True)
class Fewer:
    """The ``kept`` highest of ``frequencies`` rotate; ``scaling``: what cosines are multiplied by, by the rope type."""

    kept: int
    frequencies: int
    scaling: float


def position_zero(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Forward pre-hook of a rotary module, called as ``(x, position_ids, ...)``: all positions become 0."""
    if "position_ids" in kwargs:
        return args, {**kwargs, "position_ids": torch.zeros_like(kwargs["position_ids"])}
    x, position_ids, *rest = args
    return (x, torch.zeros_like(position_ids), *rest), kwargs


def rotate_highest(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of a rotary module: all but the highest frequencies stand as at position 0.

    Its output, a tensor (complex) or several (cosines, sines), has one column for each frequency, or twice over.
    """
    buffer = called_buffer(args, kwargs)
    frequencies, kept = len(getattr(module, buffer)), getattr(module, KEPT)[buffer]
    return output if kept == frequencies else rotate_fewer(output, Fewer(kept, frequencies, scaling_of(module, buffer)))


def take_fewer(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Forward pre-hook of an attention: the frequencies that it does not keep stand as at position 0."""
    fewer: Fewer = getattr(module, FEWER)
    return args, {**kwargs, ROTATION: rotate_fewer(kwargs[ROTATION], fewer)}


def rotate_fewer(rotation: Any, fewer: Fewer) -> Any:
    """A rotary module's output, a tensor (complex) or cosines and sines, with fewer frequencies than it has."""
    if isinstance(rotation, Tensor):
        return _highest(rotation, rotation.new_full((), fewer.scaling), fewer.kept, fewer.frequencies)
    cosine, sine = rotation
    return (
        _highest(cosine, cosine.new_full((), fewer.scaling), fewer.kept, fewer.frequencies),
        _highest(sine, sine.new_zeros(()), fewer.kept, fewer.frequencies),
    )


def _highest(real: Tensor, still: Tensor, kept: int, frequencies: int) -> Tensor:
    column = torch.arange(real.shape[-1], device=real.device)
    return torch.where(column % frequencies < kept, real, still)


def called_buffer(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """The buffer whose frequencies a call of a rotary module, ``(x, position_ids, layer_type)``, asks for."""
    layer_type = kwargs.get("layer_type", args[2] if len(args) > 2 else None)
    return "inv_freq" if layer_type is None else f"{layer_type}_inv_freq"


def scaling_of(rotary: Any, buffer: str) -> float:
    """What a rotary module multiplies the cosines by that come of this buffer."""
    return float(getattr(rotary, buffer.removesuffix("inv_freq") + "attention_scaling", 1.0))
