"""Loading a retrofit, running no code but this package's."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.utils import cached_file

from rpb_retrofit.checkpoint.gguf import load_gguf
from rpb_retrofit.errors import CheckpointError, DataError, NotRetrofittedError, RetrofitError, UnsupportedModelError
from rpb_retrofit.files.headers import check_headers
from rpb_retrofit.files.printable import first_of, message_of
from rpb_retrofit.files.source import INDEX, Source, expanded, find, is_folder, model_class, read_index
from rpb_retrofit.runtime.loading import architectures
from rpb_retrofit.runtime.locks import HUB_ARGUMENTS
from rpb_retrofit.runtime.modeling import retrofit_class

CAUSAL_HEADS = ("ForCausalLM", "LMHeadModel")
"""How the names of classes end that predict the next token."""


def load(path: str | os.PathLike[str], auto_class: Any | None = None, **kwargs: Any) -> Any:
    """Load a retrofitted checkpoint from a folder or the hub.

    Args:
        path: what ``from_pretrained`` takes.
        auto_class: the head, for example ``AutoModelForSequenceClassification``, or a concrete class of
            Transformers; by default the class that was saved.
        kwargs: passed to ``from_pretrained``: ``dtype``, ``device_map``, ``revision``, ...

    Raises:
        NotRetrofittedError for any other checkpoint; MissingTablesError, CheckpointError and ConfigError for a damaged
        one, for one with an adapter beside it, and for one that a newer version wrote.
    """
    config = kwargs.pop("config", None)
    hub = {name: value for name, value in kwargs.items() if name in HUB_ARGUMENTS}
    _check_files(path, hub)
    if config is None:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, **hub)
    if getattr(config, "rpb_retrofit", None) is None:
        raise NotRetrofittedError(f"'{path}' is not a retrofit: make one with `rpb retrofit {path} OUT`")
    source = _source_class(path, config, auto_class)
    given = {"use_safetensors": True, **kwargs, "trust_remote_code": False}
    return retrofit_class(source).from_pretrained(path, config=config, **given)


def _check_files(path: str | os.PathLike[str], hub: Mapping[str, Any]) -> None:
    """CheckpointError for files that must not be opened: links out of a folder, pipes, pickles, an adapter."""
    folder = expanded(path) / hub.get("subfolder", "")
    if is_folder(folder):
        assert Source(str(path), folder).shards
        return
    quiet = ("_raise_exceptions_for_missing_entries", "_raise_exceptions_for_connection_errors")
    index = cached_file(path, INDEX, **dict.fromkeys(quiet, False), **hub)
    if index is not None:
        read_index(Path(index), str(path))


def _source_class(path: str | os.PathLike[str], config: Any, auto_class: Any | None) -> type[PreTrainedModel]:
    if auto_class is None:
        name = next(iter(architectures(config)), "none").removeprefix("Rpb")
        if (source := getattr(transformers, name, None)) is None:
            raise UnsupportedModelError(f"'{path}': architecture '{name}' is not a class of Transformers")
        return source
    if isinstance(auto_class, type) and issubclass(auto_class, PreTrainedModel):
        return auto_class
    if type(config) not in auto_class._model_mapping:
        raise UnsupportedModelError(f"{auto_class.__name__} has no class for model type '{config.model_type}'")
    classes = auto_class._model_mapping[type(config)]
    return classes[0] if isinstance(classes, tuple | list) else classes


def open_causal_lm(name: str, examined: bool = False) -> tuple[Any, Any]:
    """The model (a retrofit, a plain checkpoint or a GGUF file), in evaluation mode and on the accelerator where there
    is one, and its tokenizer. Who has it ``examined`` also gets tables that hold NaN or infinity.

    Raises CheckpointError for what cannot be found, DataError for a model that does not predict next tokens.
    """
    if not name.endswith(".gguf"):
        architecture = next(iter(architectures(find(name).config())), "(none)")
        if not architecture.endswith(CAUSAL_HEADS):
            raise DataError(f"'{name}' is a {architecture}: only models that predict the next token can be scored")
    model, tokenizer = open_model(name, examined)
    return on_accelerator(model), tokenizer


def on_gpu(model: Any) -> Any:
    """The model on the GPU where there is one with room for its weights and as much again."""
    if not torch.cuda.is_available():
        return model
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    return model.cuda() if 2 * weights < torch.cuda.mem_get_info()[0] else model


def on_accelerator(model: Any) -> Any:
    """The model on the accelerator where there is one."""
    device = torch.accelerator.current_accelerator(check_available=True)
    return model if device is None else model.to(device)


def open_model(name: str, examined: bool = False) -> tuple[Any, Any]:
    """A retrofit, a plain checkpoint or a GGUF file as the class that was saved, in evaluation mode, and its tokenizer.

    Raises CheckpointError for what cannot be found or is damaged.
    """
    if name.endswith(".gguf"):
        return load_gguf(expanded(name))
    source = find(name)
    config = source.config()
    retrofitted = getattr(config, "rpb_retrofit", None) is not None
    opener: Any = partial(load, examined=examined) if retrofitted else model_class(config).from_pretrained
    return open_weights(source, opener), open_tokenizer(source)


def open_weights(source: Source, opener: Any) -> Any:
    """The model of a folder by a ``from_pretrained``, in evaluation mode; CheckpointError where weights are missing."""
    name = source.name
    check_headers(source, source.config())
    check_generation(source)
    try:
        model, info = opener(source.folder, output_loading_info=True, use_safetensors=True, trust_remote_code=False)
    except RetrofitError:
        raise
    except Exception as error:  # whatever a damaged file makes Transformers raise
        raise CheckpointError(f"'{name}' cannot be loaded: {message_of(error)}") from error
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"'{name}' lacks {len(missing)} of its weights ({first_of(missing)}): a damaged checkpoint"
        )
    model.name_or_path = name
    return model.eval()


def check_generation(source: Source) -> None:
    """CheckpointError for a generation_config.json with which no model can be loaded, a retrofit of it neither."""
    if Path("generation_config.json") in source.files:
        try:
            GenerationConfig.from_pretrained(source.folder)
        except Exception as error:  # whatever its content makes of it
            what = f"'{source.name}': its generation_config.json cannot be read"
            raise CheckpointError(f"{what}: {message_of(error)}") from error


def open_tokenizer(source: Source) -> Any:
    """The tokenizer of a folder; CheckpointError where it has none."""
    assert source.files is not None  # a pipe among them would be waited for
    try:
        return AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False)
    except BaseException as error:  # whatever a damaged file causes, panics of Rust among it, which are no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
            raise
        raise CheckpointError(
            f"'{source.name}' has no tokenizer that Transformers can read ({message_of(error)}); only retrofits with "
            "--init zeros, normal or alibi do without"
        ) from error
