"""The retrofit's config beside the source's."""

from __future__ import annotations

from typing import Any

from rpb_retrofit.diagnosis.arms import WRITTEN, Arms

_OURS = {
    *WRITTEN,
    *("torch_dtype", "dtype"),
    *("transformers_version", "_name_or_path", "use_cache", "output_attentions", "output_hidden_states", "return_dict"),
    *("name_or_path", "model_type", "max_position_embeddings"),
    *("id2label", "label2id", "problem_type", "finetuning_task", "task_specific_params"),
}
"""What a retrofit writes itself, and what no forward pass reads."""


def other_settings(arms: Arms) -> dict[str, tuple[Any, Any]]:
    """The settings of the retrofit's config that are not the source's, and both values; empty without a source."""
    if arms.source is None:
        return {}
    own, source = _flat(arms.retrofit.config.to_dict()), _flat(arms.source.config.to_dict())
    return {key: (own.get(key), source.get(key)) for key in sorted({*own, *source}) if own.get(key) != source.get(key)}


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names, those that say nothing left out."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if key in _OURS or key.endswith(("token_id", "token_ids")):
            continue
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        elif value is not None:
            flat[f"{prefix}{key}"] = value
    return flat
