"""Finding a source: a folder, a hub id, or a GGUF file; and saying in one line what is wrong with it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rpb_retrofit.errors import CheckpointError, UnsupportedModelError
from rpb_retrofit.files.contents import (
    CODE_SUFFIXES,
    WEIGHT_SUFFIXES,
    holds_code,
    members,
    names_foreign_modules,
    stays_behind,
)
from rpb_retrofit.files.json_file import read_object
from rpb_retrofit.files.printable import message_of, reason_of, short_name
from rpb_retrofit.runtime.errors import ADAPTER, beside_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INDEX = "model.safetensors.index.json"

_COUNTS = (
    *("hidden_size", "n_embd", "d_model", "dim", "head_dim", "d_kv", "vocab_size", "num_key_value_heads"),
    *("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads"),
    *("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"),
)
_LAYERS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    *("encoder_layers", "decoder_layers", "num_decoder_layers"),
)
_MOST_LAYERS = 10_000

_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")


@dataclass(frozen=True)
class Source:
    """A checkpoint on disk. ``name`` is what the user called it."""

    name: str
    folder: Path

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The content of its config.json. CheckpointError where there is none, or it is no JSON object."""
        if (self.folder / ADAPTER).exists():
            raise CheckpointError(beside_adapter(self.name))
        file = self.folder / "config.json"
        if not _exists(file):
            raise CheckpointError(f"'{self.name}' has no config.json: not a Transformers checkpoint")
        assert self.files is not None  # what must not be opened has its own message
        settings = read_object(file)
        _check_numbers(settings, self.name)
        return settings

    @cached_property
    def files(self) -> list[Path]:
        """Its files, relative to the folder. CheckpointError for a pipe, or for a link that leads out of it."""
        return members(self.folder, self.name)

    @cached_property
    def shards(self) -> list[Path]:
        """Its safetensors files in order. CheckpointError where it has none."""
        assert self.settings  # a missing config.json, or an adapter, has its own message
        explicit = self.settings.get("transformers_weights")
        if explicit is not None and "rpb_retrofit" not in self.settings:  # a retrofit's is its lock
            raise CheckpointError(
                f"'{self.name}': its config.json names the file of its weights (transformers_weights={explicit!r}): "
                "name it model.safetensors, and leave that setting out"
            )
        if odd := [file.name for file in self.files if _DISTRIBUTED.fullmatch(str(file))]:
            raise CheckpointError(
                f"'{self.name}' holds a distributed checkpoint ({odd[0]}), which Transformers would take for the "
                "model: save the model as one"
            )
        if (single := self.folder / "model.safetensors").exists():
            return [single]
        if (index := self.folder / INDEX).exists():
            return self._indexed(read_object(index).get("weight_map"))
        if pickles := [file.name for file in self.files if _may_be_pickled_weights(file)]:
            raise CheckpointError(
                f"'{self.name}' holds its weights as pickle only ({pickles[0]}), which can run code when read: convert "
                "it to safetensors first (if you trust it: load it in Transformers, then save_pretrained)"
            )
        raise CheckpointError(f"'{self.name}' has no model.safetensors and no {INDEX}")

    def _indexed(self, weight_map: Any) -> list[Path]:
        """The shards that an index names, all of which lie in the folder."""
        shards = [self.folder / file for file in files_of_index(weight_map, self.name)]
        if missing := [shard.name for shard in shards if not shard.exists()]:
            raise CheckpointError(f"'{self.name}' lacks {len(missing)} of {len(shards)} shards: {', '.join(missing)}")
        return shards

    @property
    def companions(self) -> list[Path]:
        """All other files that travel: tokenizer, generation config, chat template, ... relative to the folder."""
        return [file for file in self._others if file not in self.left_behind]

    @cached_property
    def left_behind(self) -> list[Path]:
        """Files that do not travel, relative to the folder: code, pickles, weights in other formats."""
        taken = {shard.relative_to(self.folder) for shard in self.shards}
        return [
            file
            for file in self._others
            if file not in taken
            and (stays_behind(file) or names_foreign_modules(self.folder / file) or holds_code(self.folder / file))
        ]

    @property
    def _others(self) -> list[Path]:
        shards = {shard.relative_to(self.folder) for shard in self.shards}
        return [
            file
            for file in self.files
            if file not in shards and not file.name.endswith(".index.json") and str(file) != "config.json"
        ]

    def check_layers(self, tensors: int) -> None:
        """CheckpointError where its config.json asks for more layers than its weights have tensors."""
        for name in _LAYERS:
            if type(count := self.settings.get(name)) is int and count > tensors:
                raise CheckpointError(
                    f"'{self.name}': its config.json has {name}={count}, but its weights are {tensors} tensors"
                )

    def config(self) -> Any:
        """Its Transformers config."""
        from transformers import AutoConfig

        assert self.settings  # a missing config.json has its own message
        try:
            config = AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
        except Exception as error:  # whatever a config's own validation raises
            raise CheckpointError(f"'{self.name}': its config.json cannot be read: {message_of(error)}") from error
        config.name_or_path = self.name
        return config


def find(name: str) -> Source:
    """A folder as it is; anything else as a hub id, downloaded into the hub's cache (safetensors only)."""
    folder = expanded(name)
    if is_folder(folder):
        return Source(name, folder)
    if folder.exists():
        raise CheckpointError(f"'{name}' is a file; SOURCE is a folder, a hub id, or a file ending in .gguf")
    if not may_be_hub_id(name):
        raise CheckpointError(f"'{name}': no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    unwanted = [suffix for suffix in (*WEIGHT_SUFFIXES, *CODE_SUFFIXES) if suffix != ".safetensors"]
    ignored = [f"*{either}" for suffix in unwanted for either in (suffix, suffix.upper())]
    try:
        return Source(name, Path(snapshot_download(name, ignore_patterns=ignored)))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise CheckpointError(f"'{name}': no such folder, and no such model on the hub") from error
    except Exception as error:  # anything that a network can do
        raise CheckpointError(f"'{name}': no such folder, and the hub did not answer: {message_of(error)}") from error


def read_index(file: Path, name: str) -> list[str]:
    """The files that an index names, for a checkpoint called ``name`` in messages; CheckpointError as of its shards."""
    return files_of_index(read_object(file).get("weight_map"), name)


def files_of_index(weight_map: Any, name: str) -> list[str]:
    """The files of a weight_map in order. CheckpointError where they are no safetensors files of the same folder."""
    named = set(weight_map.values()) if _is_texts(weight_map) else set()
    if not named:
        raise CheckpointError(f"'{name}': its {INDEX} has no weight_map from tensors to files")
    for file in sorted(named):
        if Path(file).is_absolute() or ".." in Path(file).parts or not file.endswith(".safetensors"):
            raise CheckpointError(f"'{name}': its {INDEX} names '{file}', which is no safetensors file of this folder")
    return sorted(named)


def expanded(name: str | os.PathLike[str]) -> Path:
    """A path with a ``~`` resolved; CheckpointError where there is no such user."""
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise CheckpointError(f"'{short_name(name)}': no such user as in its '~'") from error


def is_folder(path: Path) -> bool:
    """Whether there is a folder; CheckpointError for one that may not be read, and for a name that none can have."""
    try:
        if path.is_dir():
            os.listdir(path)
            return True
        path.exists()
    except (OSError, ValueError) as error:  # ValueError: a zero byte
        raise CheckpointError(f"'{short_name(path)}' cannot be read: {reason_of(error)}") from error
    return False


def may_be_hub_id(name: str) -> bool:
    """Whether a name can be one of the hub's, rather than a path."""
    return not name.startswith((".", "/", "~")) and name.count("/") <= 1


def model_class(config: Any) -> type[PreTrainedModel]:
    """The class of Transformers that a config names as its architecture."""
    import transformers

    name = config.architectures[0] if isinstance(config.architectures, list) and config.architectures else "(none)"
    if getattr(config, "rpb_retrofit", None) is not None:
        name = str(name).removeprefix("Rpb")
    architecture = getattr(transformers, str(name), None)
    if not (isinstance(architecture, type) and issubclass(architecture, transformers.PreTrainedModel)):
        raise UnsupportedModelError(
            f"'{config.name_or_path}': its architecture '{name}' is not a class of Transformers "
            f"{transformers.__version__}; models with code of their own are not supported"
        )
    return architecture


def _exists(file: Path) -> bool:
    try:
        return file.exists() or file.is_symlink()
    except OSError as error:
        raise CheckpointError(f"'{file}' cannot be read: {reason_of(error)}") from error


def _is_texts(weight_map: Any) -> bool:
    return isinstance(weight_map, dict) and all(isinstance(file, str) for file in weight_map.values())


def _may_be_pickled_weights(file: Path) -> bool:
    return file.parent == Path() and file.suffix.lower() in (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def _check_numbers(settings: Mapping[str, Any], name: str) -> None:
    """CheckpointError for sizes that no model has, before a config or a model is made of them."""
    parts = [settings, *(part for part in settings.values() if isinstance(part, dict))]
    for key in (*_COUNTS, *_LAYERS):
        most = _MOST_LAYERS if key in _LAYERS else 2**40
        for value in (part[key] for part in parts if part.get(key) is not None):
            if not isinstance(value, list | dict) and not (type(value) is int and 0 < value <= most):
                raise CheckpointError(
                    f"'{name}': its config.json has {key}={value!r}: a whole number from 1 to {most} is needed"
                )
