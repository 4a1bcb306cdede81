"""What can be retrofitted, told from a model's config alone: before any weight, or Transformers itself, is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from rpb_retrofit.errors import AlreadyRetrofittedError, CheckpointError, UnsupportedModelError
from rpb_retrofit.runtime.families import Family, family_of


def check_eligible(settings: Mapping[str, Any], name: str) -> Family:
    """The family of a config (the content of config.json, or ``config.to_dict()``), called ``name`` in messages.

    Raises AlreadyRetrofittedError for a retrofit, UnsupportedModelError for a quantised model or one whose mechanism is
    not known, CheckpointError for a config that is not a model's.
    """
    if retrofit := settings.get("rpb_retrofit"):
        source = retrofit.get("source", "?") if isinstance(retrofit, dict) else "?"
        raise AlreadyRetrofittedError(f"'{name}' is a retrofit already (of '{source}'): retrofit that source instead")
    if quantisation := settings.get("quantization_config"):
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation
        raise UnsupportedModelError(
            f"'{name}' is quantised ({getattr(method, 'value', method)}): take the unquantised checkpoint (or "
            "model.dequantize()), and quantise the retrofit"
        )
    if not isinstance(settings.get("model_type"), str):
        raise CheckpointError(f"'{name}': its config.json names no model_type: not a Transformers checkpoint")
    return family_of(SimpleNamespace(**settings))
