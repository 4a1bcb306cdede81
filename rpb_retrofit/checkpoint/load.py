"""Loading a retrofit, running no code but this package's."""

from __future__ import annotations

import os
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedModel

from rpb_retrofit.errors import NotRetrofittedError, UnsupportedModelError
from rpb_retrofit.runtime.modeling import retrofit_class


def load(path: str | os.PathLike[str], auto_class: Any | None = None, **kwargs: Any) -> Any:
    """Load a retrofitted checkpoint from a folder or the hub.

    Args:
        path: what ``from_pretrained`` takes.
        auto_class: the head, for example ``AutoModelForSequenceClassification``, or a concrete class of
            Transformers; by default the class that was saved.
        kwargs: passed to ``from_pretrained``: ``dtype``, ``device_map``, ``revision``, ...

    Raises:
        NotRetrofittedError for any other checkpoint, MissingTablesError and ConfigError for a damaged one.
    """
    config = AutoConfig.from_pretrained(path, **{k: v for k, v in kwargs.items() if k in _HUB_ARGUMENTS})
    if getattr(config, "rpb_retrofit", None) is None:
        raise NotRetrofittedError(f"'{path}' is not a retrofit: make one with `rpb retrofit {path} OUT`")
    source = _source_class(path, config, auto_class)
    return retrofit_class(source).from_pretrained(path, config=config, **kwargs)


_HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies", "subfolder")


def _source_class(path: str | os.PathLike[str], config: Any, auto_class: Any | None) -> type[PreTrainedModel]:
    if auto_class is None:
        name = (config.architectures or ["none"])[0].removeprefix("Rpb")
        if (source := getattr(transformers, name, None)) is None:
            raise UnsupportedModelError(f"'{path}': architecture '{name}' is not a class of Transformers")
        return source
    if isinstance(auto_class, type) and issubclass(auto_class, PreTrainedModel):
        return auto_class
    if type(config) not in auto_class._model_mapping:
        raise UnsupportedModelError(f"{auto_class.__name__} has no class for model type '{config.model_type}'")
    served = auto_class._model_mapping[type(config)]
    return served[0] if isinstance(served, tuple | list) else served
