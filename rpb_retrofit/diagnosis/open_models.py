"""The models of a diagnosis: opened from their checkpoints, or as they are in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from rpb_retrofit.checkpoint.load import open_causal_lm
from rpb_retrofit.diagnosis.arms import RETROFIT, Arms
from rpb_retrofit.errors import CheckpointError, ConfigError, DataError
from rpb_retrofit.files.json_file import read_object
from rpb_retrofit.training.identity import fingerprint
from rpb_retrofit.training.summary import SUMMARY, read_summary

SAMPLE = 2000
"""Characters of the text on which the tokenizers are compared."""


def check_tokenizer(retrofit: str | PreTrainedModel, tokenizer: Any | None) -> None:
    """ConfigError where the retrofit is a model in memory, which has no tokenizer, and none is given beside it; and
    where one is given beside a name, which has its own."""
    named = isinstance(retrofit, str)
    if tokenizer is None and not named:
        raise ConfigError("the retrofit is a model in memory: give its tokenizer, too, as tokenizer=...")
    if tokenizer is not None and named:
        raise ConfigError(f"tokenizer: '{retrofit}' is read with its own; give one beside a model in memory")


def open_arms(
    models: Mapping[str, str | PreTrainedModel], sample: str, tokenizer: Any | None = None
) -> tuple[Arms, Any]:
    """The arms by role, and the tokenizer: by default the retrofit's. ``models``: checkpoints, which are opened on the
    retrofit's device, or models in memory, which stay as they are; ``sample`` is some of the text.

    Raises what `open_causal_lm` and `check_tokenizer` raise, and DataError where two arms read the text as different
    tokens.
    """
    check_tokenizer(models[RETROFIT], tokenizer)
    names = {role: model for role, model in models.items() if isinstance(model, str)}
    opened = {role: open_causal_lm(name, examined=True) for role, name in names.items()}
    loaded = {role: model for role, model in models.items() if not isinstance(model, str)}
    chosen = opened[RETROFIT][1] if tokenizer is None else tokenizer
    own = chosen(sample[:SAMPLE], add_special_tokens=False)["input_ids"]
    for role, (_, other) in opened.items():
        if other(sample[:SAMPLE], add_special_tokens=False)["input_ids"] != own:
            reader = f"retrofit '{names[RETROFIT]}'" if RETROFIT in names else "tokenizer of the retrofit"
            raise DataError(
                f"the {role} '{names[role]}' reads the text as other tokens than the {reader}: give models of one "
                "tokenizer"
            )
    device = loaded[RETROFIT].device if RETROFIT in loaded else opened[RETROFIT][0].device
    return Arms(**{role: model.to(device) for role, (model, _) in opened.items()}, **loaded), chosen


def known_source(retrofit: str | PreTrainedModel) -> str | None:
    """The source that a retrofit's config names, where it is still there."""
    if isinstance(retrofit, str):
        file = Path(retrofit).expanduser() / "config.json"
        settings = read_object(file).get("rpb_retrofit") if file.exists() else None
    else:
        settings = getattr(retrofit.config, "rpb_retrofit", None)
    source = settings.get("source") if isinstance(settings, dict) else None
    return source if isinstance(source, str) and Path(source).expanduser().exists() else None


def trained_pairs(retrofit: str) -> Sequence[int] | None:
    """How many pairs of tokens trained each bucket, where the checkpoint's training.json says so."""
    file = Path(retrofit).expanduser() / SUMMARY
    if not file.exists():
        return None
    counts = [stage.pairs_by_bucket for stage in read_summary(file.parent).stages if stage.pairs_by_bucket]
    if len(set(map(len, counts))) > 1:
        raise CheckpointError(f"'{file}': its stages count pairs in different numbers of buckets")
    return [sum(column) for column in zip(*counts, strict=True)] or None


def identity(names: Mapping[str, str], text: str, plan: Mapping[str, Any]) -> dict[str, Any]:
    """What a diagnosis depends on: the arms' weights, the text and the plan."""
    weights = {role: fingerprint(name) for role, name in names.items()}
    return {"arms": dict(names), "weights": weights, "text": text, "plan": dict(plan)}
