"""Opening the arms of an examination from their checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rpb_retrofit.checkpoint.load import open_causal_lm
from rpb_retrofit.diagnosis.arms import RETROFIT, Arms
from rpb_retrofit.errors import CheckpointError, DataError
from rpb_retrofit.files.json_file import read_object
from rpb_retrofit.training.identity import fingerprint
from rpb_retrofit.training.summary import SUMMARY, read_summary

SAMPLE = 2000
"""Characters of the text on which the tokenizers are compared."""


def open_arms(names: Mapping[str, str], sample: str) -> tuple[Arms, Any]:
    """The arms by role, and the retrofit's tokenizer; ``sample`` is some of the text.

    Raises what `open_causal_lm` raises, and DataError where two arms read the text as different tokens.
    """
    opened = {role: open_causal_lm(name, examined=True) for role, name in names.items()}
    tokenizer = opened[RETROFIT][1]
    own = tokenizer(sample[:SAMPLE], add_special_tokens=False)["input_ids"]
    for role, (_, other) in opened.items():
        if other(sample[:SAMPLE], add_special_tokens=False)["input_ids"] != own:
            raise DataError(
                f"the {role} '{names[role]}' reads the text as other tokens than the retrofit '{names[RETROFIT]}': "
                "give models of one tokenizer"
            )
    return Arms(**{role: model for role, (model, _) in opened.items()}), tokenizer


def known_source(retrofit: str) -> str | None:
    """The source that a retrofit's config names, where it is still there."""
    file = Path(retrofit).expanduser() / "config.json"
    if not file.exists():
        return None
    settings = read_object(file).get("rpb_retrofit")
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
    """What an examination depends on: the arms' weights, the text and the plan."""
    weights = {role: fingerprint(name) for role, name in names.items()}
    return {"arms": dict(names), "weights": weights, "text": text, "plan": dict(plan)}
