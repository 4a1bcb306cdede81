"""What Transformers only logs when it loads a checkpoint, as errors: no number of a retrofit is made up at random."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from .errors import CheckpointError, ConfigError
from .families import is_own

_WHERE = ("cache_dir", "local_files_only", "token", "revision", "subfolder")


def check_loaded(model: Any, info: Mapping[str, Any], name: str, build: Callable[[Any], Any]) -> None:
    """Whether a retrofit was loaded whole; ``info`` is Transformers' loading report without missing tables.

    ``build`` gives the retrofitted class of a class of Transformers. Raises CheckpointError where weights are missing
    that the saved class has, and ConfigError for tables, tails and factors that the settings do not ask for.
    """
    if lost := _lost(model, info["missing_keys"], build):
        raise CheckpointError(
            f"'{name}' lacks {len(lost)} of its weights ({lost[0]}{', ...' * (len(lost) > 1)}): a damaged checkpoint"
        )
    modules = {path for path, _ in model.named_modules()}
    for key in sorted(filter(is_own, info["unexpected_keys"])):
        if _is_saved_class(model) or key.rsplit(".", 2)[0] in modules:  # else it is of a layer that this head has not
            raise ConfigError(f"'{name}' holds {key}, which the settings in its config.json do not ask for")


def check_numbers(model: Any, name: str) -> None:
    """ConfigError where a table, tail or factor holds NaN or infinity."""
    for key, value in model.named_parameters():
        if is_own(key) and not value.is_meta and not bool(value.isfinite().all()):
            raise ConfigError(f"'{name}': {key} holds NaN or infinity: a damaged checkpoint")


def check_shared(shared: Mapping[str, str], stored: Iterable[str], name: str) -> None:
    """ConfigError where a checkpoint holds a table of its own for a layer that shares another's, by its name."""
    for key in stored:
        if any(more == key or more.endswith(f".{key}") or key.endswith(f".{more}") for more in shared):
            raise ConfigError(f"'{name}': shared=true in its config.json, but it holds {key} beside the shared table")


def stored_names(path: Any, arguments: Mapping[str, Any]) -> list[str]:
    """Names of the tensors in a checkpoint that was just loaded with these arguments of ``from_pretrained``."""
    where = {key: arguments[key] for key in _WHERE if key in arguments}
    where["_raise_exceptions_for_missing_entries"] = False
    if (whole := cached_file(path, SAFE_WEIGHTS_NAME, **where)) is not None:
        with safe_open(whole, framework="pt") as file:
            return list(file.keys())
    index = cached_file(path, SAFE_WEIGHTS_INDEX_NAME, **where)
    return [] if index is None else list(json.loads(Path(index).read_text())["weight_map"])


def architectures(config: Any) -> list[str]:
    """The classes that a config names; none where it holds something else in their place."""
    listed = config.architectures
    return [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []


def _is_saved_class(model: Any) -> bool:
    return type(model).__name__ in architectures(model.config)


def _lost(model: Any, missing: Iterable[str], build: Callable[[Any], Any]) -> list[str]:
    """The missing weights that the class which was saved has; those of another head are for its training to fill."""
    missing = sorted(missing)
    if not missing or _is_saved_class(model):
        return missing
    saved = next(iter(architectures(model.config)), "")
    if (source := getattr(transformers, saved.removeprefix("Rpb"), None)) is None:
        return []
    with torch.device("meta"):
        whole = build(source)(copy.deepcopy(model.config))

    def bare(key: str, of: Any) -> str:
        return key.removeprefix(f"{of.base_model_prefix}.")

    had = {bare(key, whole) for key in whole.state_dict()}
    return [key for key in missing if bare(key, model) in had]
