"""The settings of a retrofit, and how the command line writes them."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields
from decimal import Decimal, InvalidOperation
from typing import Any, Literal

from rpb_retrofit.errors import ConfigError
from rpb_retrofit.frequencies import KeepFrequencies
from rpb_retrofit.runtime.families import UNSCALED
from rpb_retrofit.tables import CALIBRATED, CONTENT, FROM, INITIALISATIONS

_OPTIONS = {"relative_attention_num_buckets": "buckets", "relative_attention_max_distance": "max-distance"}
"""The command line's names of settings where they are not the settings' own."""

_FLAGS = ("shared",)
"""Settings that are options without a value."""

_POWERS = {"k": 1, "m": 2, "g": 3}


@dataclass(frozen=True)
class RetrofitConfig:
    """What to put in the place of a model's positional mechanism. Names follow Transformers' T5 where it has one.

    ``relative_attention_num_buckets``: scalars per head; a bidirectional table gives half to each direction. ``auto``:
    as few, and of such a reach, as text that calibration did not see allows.
    ``relative_attention_max_distance``: offsets from here on share the last bucket.
    ``init``: where the numbers in the tables come from: ``calibrated`` fits them to what the source attends to and
    hands on, on text; ``zeros``, ``normal`` (as Transformers' T5 initialises) and ``alibi`` need no text;
    ``from:CHECKPOINT`` takes the tables of a model of the T5 family or of another retrofit.
    ``polish``: so many steps then train the tables alone to predict what the source predicts, on text.
    ``calibrate``: what calibration fits: ``tables`` leaves all weights as they are; ``tables+content`` also multiplies
    the content term by a factor for each query head and rotary frequency, which folds into the query projection.
    ``tail``: beyond the maximum distance the bias is constant (``flat``, as T5's), or falls on with the logarithm of
    the distance (``log``), at a slope that each head begins at zero, fits or learns. To lead beyond the trained context
    it must begin well inside it: only there is its slope fitted and trained.
    ``scale``: of the products of queries and keys, beside which the bias stands: ``source``, as the model has it, or
    ``unscaled``, as T5 has none: it is folded into the weights that make the queries, exactly but for rounding. Tables
    are the same for both, as the bias is added to what the softmax sees.
    ``keep_frequencies``: how many of RoPE's highest frequencies go on rotating, beside the bias; ``auto``: those that
    turn within the trained context, or nearly; ``all``. Layers may differ: ``"20,17-18:28,sliding_attention:all"``
    (see `rpb_retrofit.frequencies`); ``"auto+4"`` keeps all in the four layers that far copies need most, by text.
    ``shared``: one table for all layers (of one direction) instead of one per layer.
    ``seed``: of whatever is drawn: ``normal``'s numbers, the queries that calibration compares.
    """

    relative_attention_num_buckets: int | Literal["auto"] = 32
    relative_attention_max_distance: int = 128
    init: str = CALIBRATED
    calibrate: str = "tables"
    keep_frequencies: int | str = 0
    polish: int = 0
    tail: str = "flat"
    scale: str = "source"
    shared: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            kind, value = type(field.default), getattr(self, field.name)
            if type(value) is not kind and not _may_be_text(field.name, value):
                raise ConfigError(f"{field.name}={value!r}: expected {kind.__name__}, got {type(value).__name__}")
        if KeepFrequencies.of(self.keep_frequencies).more and self.init != CALIBRATED:
            raise ConfigError(
                f"keep_frequencies='{self.keep_frequencies}' needs init='calibrated', which has text to choose layers "
                f"by, not init='{self.init}'"
            )
        if self.polish < 0:
            raise ConfigError(f"polish={self.polish}: a number of steps, 0 for none")
        for name, either in (
            ("calibrate", ("tables", CONTENT)),
            ("tail", ("flat", "log")),
            ("scale", ("source", UNSCALED)),
        ):
            if (value := getattr(self, name)) not in either:
                raise ConfigError(f"{name}='{value}': choose {' or '.join(either)}")
        if self.calibrate == CONTENT and self.init != CALIBRATED:
            raise ConfigError(f"calibrate='{CONTENT}' needs init='calibrated', not init='{self.init}'")
        if self.relative_attention_num_buckets == "auto" and self.init != CALIBRATED:
            raise ConfigError(
                f"relative_attention_num_buckets='auto' needs init='calibrated', which has text to choose by, not "
                f"init='{self.init}'"
            )
        if self.init not in (CALIBRATED, *INITIALISATIONS) and not self.init.startswith(FROM):
            choices = ", ".join((CALIBRATED, *INITIALISATIONS, f"{FROM}CHECKPOINT"))
            raise ConfigError(f"init='{self.init}': choose one of {choices}")

    @property
    def changes_weights(self) -> bool:
        """Whether weights of the source change: those that make queries."""
        return self.calibrate == CONTENT or self.scale == UNSCALED

    @property
    def takes_text(self) -> bool:
        """Whether ``init`` uses calibration text: to fit tables, or to match the heads of another checkpoint's."""
        return self.init == CALIBRATED or self.init.startswith(FROM)

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


def _may_be_text(name: str, value: Any) -> bool:
    """Whether a setting that is a number may be this text, too."""
    if name == "keep_frequencies":
        return isinstance(value, str)
    return name == "relative_attention_num_buckets" and value == "auto"


def command_of(settings: Mapping[str, Any], source: str = "SOURCE") -> str:
    """The ``rpb retrofit`` that settings come from, those of a `RetrofitConfig` or of a checkpoint's config.json.

    What is as by default, or not among them, is left out; the text to calibrate on never is among them.
    """
    words = ["rpb", "retrofit", source, "OUT"]
    for name, default in vars(RetrofitConfig()).items():
        value, option = settings.get(name, default), f"--{_OPTIONS.get(name, name.replace('_', '-'))}"
        if value != default:
            words += [option] if name in _FLAGS else [option, str(value)]
    return shlex.join(words)


def parse_count(text: str, thousand: int = 1000) -> int | None:
    """``5M``, ``32k`` or ``4096`` as a number that fits 63 bits; None for anything else. ``k`` is a ``thousand``."""
    digits, power = text.strip(), 0
    if digits[-1:].lower() in _POWERS:
        digits, power = digits[:-1], _POWERS[digits[-1].lower()]
    try:
        value = Decimal(digits)  # a float would round what has more than 15 digits
    except InvalidOperation:
        return None
    if not value.is_finite() or not 0 <= value < 2**63:
        return None
    whole = value * thousand**power
    return int(whole) if whole < 2**63 and whole == int(whole) else None


def written_count(number: int) -> str:
    """A count as people write it, the inverse of `parse_count`: ``5M``, ``32k`` or ``4096``; ``k`` is 1,000."""
    for letter, power in (("G", 3), ("M", 2), ("k", 1)):
        if number and number % 1000**power == 0:
            return f"{number // 1000**power}{letter}"
    return str(number)
