"""What the key ``rpb_retrofit`` of a config may say: a reader that does not understand a checkpoint refuses it.

`rpb_retrofit.swap.stored_settings.describe` writes what is read here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from packaging.version import InvalidVersion, Version

from .anatomy import Anatomy
from .buckets import Bucketing
from .errors import ConfigError
from .families import FACTOR, UNSCALED
from .version import __version__


class Kind(NamedTuple):
    """What a setting's value must be: in words, and as a test."""

    words: str
    holds: Callable[[Any], bool]


def _is_whole(value: Any, least: int = 0) -> bool:
    return type(value) is int and value >= least


def _one_of(*choices: str) -> Kind:
    return Kind(" or ".join(map(repr, choices)), lambda value: value in choices)


def _is_pairs(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"layout", "start", "frequencies"}
        and value["layout"] in ("half", "interleaved")
        and _is_whole(value["start"])
        and _is_whole(value["frequencies"], 1)
    )


def _is_lengths(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(
        isinstance(pair, list | tuple)
        and len(pair) == 2
        and _is_whole(pair[0], 1)
        and type(pair[1]) in (int, float)
        and 0 <= pair[1] <= 1
        for pair in value
    )


_TEXT = Kind("a text", lambda value: isinstance(value, str))
_NUMBER = Kind("a whole number", lambda value: type(value) is int)
_COUNT = Kind("a whole number from 0 on", _is_whole)
_TRUTH = Kind("true or false", lambda value: type(value) is bool)

NEEDED: dict[str, Kind] = {
    "version": _TEXT,
    "source": _TEXT,
    "relative_attention_num_buckets": _NUMBER,
    "relative_attention_max_distance": _NUMBER,
    "shared": _TRUTH,
}
"""The settings of every retrofit."""

OPTIONAL: dict[str, Kind] = {
    "mechanism": _TEXT,
    "init": _TEXT,
    "calibrate": _one_of("tables", "tables+content"),
    "polish": _COUNT,
    "seed": _NUMBER,
    "tail": _one_of("flat", "log"),
    "scale": _one_of("source", UNSCALED),
    "keep_frequencies": Kind(
        "a whole number from 0 on, or a text", lambda value: isinstance(value, str) or _is_whole(value)
    ),
    "kept_frequencies": Kind(
        "whole numbers by the names of rotary buffers",
        lambda value: isinstance(value, dict) and all(isinstance(k, str) and _is_whole(v) for k, v in value.items()),
    ),
    "kept_in_layers": Kind(
        "a list of whole numbers", lambda value: isinstance(value, list) and bool(value) and all(map(_is_whole, value))
    ),
    "text_lengths": Kind("pairs of a length and its share", _is_lengths),
    "bidirectional": Kind(
        "a list of true and false",
        lambda value: isinstance(value, list) and bool(value) and all(type(item) is bool for item in value),
    ),
    "table_checksums": Kind(
        "checksums by the names of tables",
        lambda value: isinstance(value, dict) and all(isinstance(x, str) for pair in value.items() for x in pair),
    ),
    FACTOR: Kind("a layout, a start and a number of frequencies", _is_pairs),
}
"""The settings that a retrofit may have besides."""


def check_settings(settings: Any, name: str) -> Mapping[str, Any]:
    """The settings of the retrofit ``name``, where this version understands all of them.

    Raises ConfigError for a retrofit that a newer version wrote, for an unknown or a missing setting, and for a value
    without a meaning.
    """
    if not isinstance(settings, dict):
        raise ConfigError(f"'{name}': rpb_retrofit={settings!r} in its config.json is no retrofit's settings")
    writer = settings.get("version")
    by = f"'{name}', written by rpb_retrofit {writer}"
    try:
        if not isinstance(writer, str):
            raise InvalidVersion
        newer = Version(writer) > Version(__version__)
    except InvalidVersion:
        raise ConfigError(
            f"'{name}': rpb_retrofit.version={writer!r} in its config.json names no version: a damaged checkpoint"
        ) from None
    if newer:
        raise ConfigError(f"{by}, is newer than what reads it, rpb_retrofit {__version__}: install {writer} or later")
    if unknown := sorted(settings.keys() - NEEDED.keys() - OPTIONAL.keys(), key=str):
        raise ConfigError(f"{by}, has the setting {unknown[0]!r}, which rpb_retrofit {__version__} does not know")
    if missing := sorted(NEEDED.keys() - settings.keys()):
        raise ConfigError(f"{by}, lacks the setting '{missing[0]}': a damaged checkpoint")
    for key, value in settings.items():
        if not (kind := NEEDED.get(key) or OPTIONAL[key]).holds(value):
            raise ConfigError(f"{by}, has {key}={value!r} in its config.json: expected {kind.words}")
    for bidirectional in settings.get("bidirectional", [False]):
        Bucketing(
            settings["relative_attention_num_buckets"], settings["relative_attention_max_distance"], bidirectional
        ).validate()
    return settings


def check_against(settings: Mapping[str, Any], anatomy: Anatomy, name: str) -> None:
    """Whether settings have a meaning for a model of this anatomy.

    Raises ConfigError for another mechanism than the family's, and for kept frequencies that the model has not.
    """
    family = anatomy.family
    if (mechanism := settings.get("mechanism", family.mechanism)) != family.mechanism:
        raise ConfigError(
            f"'{name}': mechanism={mechanism!r} in its config.json, but the model's is {family.mechanism}"
        )
    kept, frequencies = settings.get("kept_frequencies") or {}, anatomy.rotary_counts
    for buffer, count in kept.items():
        if count > frequencies.get(buffer, -1):
            has = f"{frequencies[buffer]} frequencies" if buffer in frequencies else "no rotary buffer of that name"
            raise ConfigError(
                f"'{name}': kept_frequencies {buffer}={count} in its config.json, but the model has {has}"
            )
    if kept and (without := sorted(frequencies.keys() - kept.keys())):
        raise ConfigError(f"'{name}': kept_frequencies in its config.json say nothing of the buffer {without[0]}")
    if (in_layers := settings.get("kept_in_layers")) is not None:
        _check_layers(in_layers, kept, anatomy, f"'{name}': kept_in_layers in its config.json")


def _check_layers(in_layers: list[int], kept: Mapping[str, int], anatomy: Anatomy, what: str) -> None:
    """Whether no layer keeps more than the rotary buffer that it reads."""
    if len(in_layers) != len(anatomy.attentions):
        raise ConfigError(f"{what} has {len(in_layers)} numbers, but the model has {len(anatomy.attentions)} layers")
    for number, (count, attention) in enumerate(zip(in_layers, anatomy.attentions, strict=True)):
        most = kept.get(anatomy.rotary_buffers[attention], 0) if anatomy.family.mechanism == "rope" else 0
        if count > most:
            raise ConfigError(f"{what} keeps {count} frequencies in layer {number}, but kept_frequencies keep {most}")
