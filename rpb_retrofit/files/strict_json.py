"""JSON as its standard has it, which knows neither NaN nor infinity."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

NOT_FINITE = "not_finite"
"""The key under which a document says where a null stands for a number that is none."""


def json_text(document: Any, indent: int | None = 2) -> str:
    """``document`` for a reader: null for each number that is not finite, and, where it is an object, under
    `NOT_FINITE` what stood there: ``{"lengths.0.nll": "nan"}``."""
    odd = dict(_not_finite(document))
    if odd:
        document = _without(document)
        if isinstance(document, dict):
            document = {**document, NOT_FINITE: odd}
    return json.dumps(document, indent=indent, allow_nan=False) + "\n"


def _not_finite(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, float) and not math.isfinite(value):
        yield path, str(float(value))
    elif isinstance(value, Mapping | list | tuple):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in items:
            yield from _not_finite(item, f"{path}.{key}" if path else str(key))


def _without(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _without(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without(item) for item in value]
    return value
