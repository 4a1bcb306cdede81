"""The config is not the source's, or a module not its config's: a setting that changed on the way."""

from __future__ import annotations

from typing import Any

from rpb_retrofit.diagnosis.finding import CauseKind, Finding, confirmed, excluded
from rpb_retrofit.diagnosis.measurements import Measurements
from rpb_retrofit.diagnosis.settings import other_settings
from rpb_retrofit.errors import ConfigError
from rpb_retrofit.frequencies import KeepFrequencies
from rpb_retrofit.runtime.anatomy import Anatomy
from rpb_retrofit.runtime.families import UNSCALED
from rpb_retrofit.swap.kept_frequencies import TURN, Kept, keep

CAUSE = "settings are not the source's"
PREDICTS = "config.json has settings that the source's has not; or a module has others than its config gives it"
KIND = CauseKind.RUNNING
REMEDY = "set them to the source's values in config.json, and load the checkpoint anew"


def examine(measurements: Measurements) -> Finding:
    """Compare the config with the source's, and the modules with the config."""
    other = other_settings(measurements.arms)
    if other:
        evidence = ", ".join(f"{key}={mine!r} (source: {its!r})" for key, (mine, its) in list(other.items())[:4])
        return confirmed(f"{len(other)} settings are not the source's: {evidence}", REMEDY)
    if (other_kept := _other_kept(measurements)) is not None:
        return confirmed(other_kept, REMEDY)
    odd = _odd_modules(measurements)
    if odd:
        evidence = ", ".join(f"{name}={mine!r} (by its config: {its!r})" for name, (mine, its) in list(odd.items())[:4])
        return confirmed(f"{len(odd)} modules do not have the settings that the config gives them: {evidence}", REMEDY)
    compared = "the config is the source's" if measurements.arms.source is not None else "not compared with a source"
    return excluded(f"{compared}, and every module has its config's settings")


def _other_kept(measurements: Measurements) -> str | None:
    """How the frequencies that the config keeps differ from what it was asked to keep; None where they do not."""
    settings, anatomy = measurements.arms.settings, Anatomy.of(measurements.arms.plain)
    asked = settings.get("keep_frequencies", 0)
    kept = Kept(settings.get("kept_frequencies") or {}, settings.get("kept_in_layers") or [])
    try:
        wanted = KeepFrequencies.of(asked)
        if wanted.more:
            wanted = wanted.chosen(_chosen(keep(anatomy, wanted), kept, wanted.more))
        meanings = [keep(anatomy, wanted, turn) for turn in (TURN, WHOLE)]
    except ConfigError as error:  # loading reads what is kept, not what was asked for
        return f"the config asks for what has no meaning: {error}"
    if kept in meanings:
        return None
    (has, by_layer), (means, means_by_layer) = kept, meanings[0]
    if has != means:
        return f"kept_frequencies is {has or 'empty'} in the config, keep_frequencies={asked!r} means {means or 'none'}"
    return (
        f"kept_in_layers is {by_layer or 'empty'} in the config, keep_frequencies={asked!r} means "
        f"{means_by_layer or 'as many in every layer'}"
    )


def _chosen(without: Kept, kept: Kept, more: int) -> list[int]:
    """The layers that keep more than they would if none had been chosen, but no more of them than were asked for."""
    unchosen = without.in_layers or [max(without.by_buffer.values(), default=0)] * len(kept.in_layers)
    pairs = zip(kept.in_layers, unchosen, strict=False)
    return [number for number, (count, least) in enumerate(pairs) if count > least][:more]


def _odd_modules(measurements: Measurements) -> dict[str, tuple[Any, Any]]:
    """Plain attributes (numbers, words, truth values) of modules that are otherwise in a model made from the config."""
    fresh = dict(measurements.arms.plain.named_modules())
    differing = {}
    states = _STATES | (
        {"scaling"} if measurements.arms.settings.get("scale") == UNSCALED else set()
    )  # wrong_scale's concern
    for name, module in measurements.arms.retrofit.named_modules():
        for key, value in vars(module).items():
            other = vars(fresh[name]).get(key) if name in fresh else value
            plain = isinstance(value, int | float | str) and isinstance(other, int | float | str)
            if plain and key not in states and not key.startswith(("_", "rpb_")) and value != other:
                differing[f"{name}.{key}"] = (value, other)
    return differing


WHOLE = 1.0
"""Turns that ``auto`` asked for in retrofits of older versions."""

_STATES = {
    "training",
    "has_relative_attention_bias",
    "name_or_path",
    "gradient_checkpointing",
    "original_inv_freq",
    "max_seq_len_cached",
}
