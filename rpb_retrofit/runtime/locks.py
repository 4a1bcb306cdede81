"""What keeps a plain class from loading a retrofit: locks in its config, which every release refuses."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedConfig, PreTrainedModel

from .families import Family, family_of
from .interface import ATTENTION

LOCK = (
    "none: this is an rpb_retrofit checkpoint, which plain classes cannot run. Load it with rpb_retrofit.load(path), "
    "or with AutoModel...from_pretrained(path, trust_remote_code=True)"
)
"""Stands in config.json as the attention and the experts implementation. From Transformers 5.4 on every model checks
both when it is built and refuses unknown ones with an error that prints them, so no plain class loads a retrofit by
mistake."""

WEIGHTS = "transformers_weights"

FILE_LOCKS = (WEIGHTS, "_attn_implementation_internal")
"""Where `LOCK` stands in the file only, for older releases and for both arguments given by hand: a config drops them
when it is written. To every ``from_pretrained`` since 4.52 the first is the name of the file with the weights, and it
prints what cannot be one. Before 5.3 a model checks the second when it is built. scripts/check_lock.py tries them."""


def unlock(config: Any, family: Family) -> None:
    """Let a config be run: by the attention implementation that its family needs."""
    config._attn_implementation = ATTENTION if family.uses_interface else "eager"
    if config._experts_implementation == LOCK:
        config._experts_implementation = None


def lock(model: PreTrainedModel) -> None:
    """Let a model run, and lock what is saved of it."""
    config = model.config
    unlock(config, family_of(config))
    # The public attributes only exist to be written to config.json.
    config.attn_implementation = config.experts_implementation = LOCK
    if not cast(Any, type(model)).source_class._can_set_experts_implementation():
        config._experts_implementation_internal = LOCK  # nothing reads it, but a plain class would check it


HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies", "subfolder")
_MODEL_ARGUMENTS = ("dtype", "torch_dtype", "attn_implementation", "experts_implementation", "quantization_config")


def without_file_locks(cls: Any, path: str | os.PathLike[str], kwargs: dict[str, Any]) -> Any:
    """The config for ``cls.from_pretrained(path, **kwargs)``, out of which is taken what goes into it."""
    config = kwargs.pop("config", None)
    if not isinstance(config, PreTrainedConfig):
        where = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        config = cls.config_class.from_pretrained(path if config is None else config, **where)
    config = copy.copy(config)
    for name in [name for name in kwargs if name not in _MODEL_ARGUMENTS and hasattr(config, name)]:
        setattr(config, name, kwargs.pop(name))  # num_labels=3 and the like
    vars(config).pop(WEIGHTS, None)
    return config


def save_config(config: Any, folder: str | os.PathLike[str], **kwargs: Any) -> None:
    """``config.save_pretrained``, and the locks that only the file has."""
    type(config).save_pretrained(config, folder, **kwargs)
    file = Path(folder) / "config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) | dict.fromkeys(FILE_LOCKS, LOCK)
    file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def writing_file_locks(config: Any) -> Iterator[None]:
    """Within, the next ``config.save_pretrained`` is `save_config`: a model saves its config, then may upload it."""

    def save(folder: str | os.PathLike[str], **kwargs: Any) -> None:
        vars(config).pop("save_pretrained")
        save_config(config, folder, **kwargs)

    vars(config)["save_pretrained"] = save
    try:
        yield
    finally:
        vars(config).pop("save_pretrained", None)
