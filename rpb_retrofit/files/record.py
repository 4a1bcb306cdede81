"""Values on disk without pickle: tensors as safetensors, all else as JSON beside them.

Reading one makes numbers, texts, lists, tensors and instances of the data classes that the reader names, and can run
nothing else, whoever wrote the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from rpb_retrofit.errors import CheckpointError
from rpb_retrofit.files.printable import message_of

REST = "rest"
"""The name of what is not a tensor: JSON, as bytes."""


class DamagedError(CheckpointError):
    """Something on disk that was cut short, changed, or is no record at all."""


def pack(value: Any) -> dict[str, Tensor]:
    """A value as tensors. TypeError for what is neither a number, a text, None, a range, a tensor nor a list, a tuple,
    a dict or a data class of such."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    rest = json.dumps(_without_tensors(value, tensors, seen), allow_nan=False).encode()
    return {**tensors, REST: torch.frombuffer(bytearray(rest), dtype=torch.uint8)}


def _without_tensors(value: Any, tensors: dict[str, Tensor], seen: set[int]) -> Any:
    def inner(part: Any) -> Any:
        return _without_tensors(part, tensors, seen)

    if value is None or isinstance(value, bool | str) or type(value) is int:
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": repr(float(value))}
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = _own(value.detach(), seen)
        return {"tensor": name, "device": str(value.device)}
    if isinstance(value, list):
        return [inner(part) for part in value]
    if isinstance(value, tuple):
        return {"tuple": [inner(part) for part in value]}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    if isinstance(value, dict):
        return {"dict": [[inner(key), inner(part)] for key, part in value.items()]}
    if is_dataclass(value) and not isinstance(value, type):
        return {
            "record": type(value).__name__,
            "fields": {f.name: inner(getattr(value, f.name)) for f in fields(value)},
        }
    raise TypeError(f"a {type(value).__name__} cannot be recorded")


def _own(tensor: Tensor, seen: set[int]) -> Tensor:
    """The tensor in memory of its own, as safetensors wants it."""
    tensor = tensor.contiguous()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    if not whole or tensor.untyped_storage().data_ptr() in seen:
        tensor = tensor.clone()
    seen.add(tensor.untyped_storage().data_ptr())
    return tensor


def unpack(tensors: dict[str, Tensor], kinds: Sequence[type] = ()) -> Any:
    """The value that was packed; ``kinds``: the data classes that it may hold. DamagedError where it is none."""
    known = {kind.__name__: kind for kind in kinds}

    def value(part: Any) -> Any:
        if isinstance(part, list):
            return [value(inner) for inner in part]
        if not isinstance(part, dict):
            return part
        match part:
            case {"float": number}:
                return float(number)
            case {"tensor": name, "device": device}:
                return tensors[name].to(device)
            case {"tuple": list(parts)}:
                return tuple(map(value, parts))
            case {"range": [start, stop, step]}:
                return range(start, stop, step)
            case {"dict": list(pairs)}:
                return {value(key): value(inner) for key, inner in pairs}
            case {"record": name, "fields": dict(given)}:
                return known[name](**{key: value(inner) for key, inner in given.items()})
        raise ValueError(f"{list(part)[:3]} names no kind of value")

    try:
        return value(json.loads(tensors[REST].numpy().tobytes()))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, RuntimeError, SafetensorError) as error:
        raise DamagedError(f"it is no record of rpb_retrofit: {message_of(error)}") from error
