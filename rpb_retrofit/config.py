"""The settings of a retrofit."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from rpb_retrofit.errors import ConfigError
from rpb_retrofit.tables import INITIALISATIONS


@dataclass(frozen=True)
class RetrofitConfig:
    """What to put in the place of a model's positional mechanism. Names follow Transformers' T5 where it has one.

    ``relative_attention_num_buckets``: scalars per head; a bidirectional table gives half to each direction.
    ``relative_attention_max_distance``: offsets from here on share the last bucket.
    ``init``: where the numbers in the tables come from; ``zeros`` is the only initialisation so far.
    ``shared``: one table for all layers (of one direction) instead of one per layer.
    """

    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    init: str = "zeros"
    shared: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            kind, value = type(field.default), getattr(self, field.name)
            if type(value) is not kind:
                raise ConfigError(f"{field.name}={value!r}: expected {kind.__name__}, got {type(value).__name__}")
        if self.init not in INITIALISATIONS:
            raise ConfigError(f"init='{self.init}': choose one of {', '.join(INITIALISATIONS)}")

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> RetrofitConfig:
        """A config from a mapping; ConfigError names an unknown key and the nearest known one."""
        known = [field.name for field in fields(cls)]
        for key in settings:
            if key not in known:
                close = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean '{close[0]}'?" if close else f"known keys: {', '.join(known)}"
                raise ConfigError(f"unknown config key '{key}': {hint}")
        return cls(**settings)
