"""Finding a source: a folder, a hub id, or a GGUF file; and saying in one line what is wrong with it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rpb_retrofit.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHT_SUFFIXES = (
    *(".safetensors", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".npy", ".npz"),
    *(".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill", ".pdparams"),  # pickles
)
"""Files that hold weights, none of which travels as it is."""

_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Source:
    """A checkpoint on disk. ``name`` is what the user called it."""

    name: str
    folder: Path

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The content of its config.json. CheckpointError where there is none, or it is no JSON object."""
        file = self.folder / "config.json"
        if not file.exists():
            raise CheckpointError(f"'{self.name}' has no config.json: not a Transformers checkpoint")
        return _read_json(file)

    @cached_property
    def shards(self) -> list[Path]:
        """Its safetensors files in order. CheckpointError where it has none."""
        if (single := self.folder / "model.safetensors").exists():
            return [single]
        if (index := self.folder / _INDEX).exists():
            weight_map = _read_json(index).get("weight_map")
            files = set(weight_map.values()) if isinstance(weight_map, dict) else set()
            if not files or not all(isinstance(file, str) for file in files):
                raise CheckpointError(f"'{self.name}': its {_INDEX} has no weight_map from tensors to files")
            shards = [self.folder / file for file in sorted(files)]
            if missing := [shard.name for shard in shards if not shard.exists()]:
                raise CheckpointError(
                    f"'{self.name}' lacks {len(missing)} of {len(shards)} shards: {', '.join(missing)}"
                )
            return shards
        if pickles := [path.name for path in self.folder.glob("*.bin")]:
            raise CheckpointError(
                f"'{self.name}' holds its weights as pickle only ({pickles[0]}), which can run code when read: convert "
                "it to safetensors first (if you trust it: load it in Transformers, then save_pretrained)"
            )
        raise CheckpointError(f"'{self.name}' has no model.safetensors and no {_INDEX}")

    @property
    def companions(self) -> list[Path]:
        """All other files that travel: tokenizer, generation config, chat template, ... relative to the folder."""
        if (self.folder / "adapter_config.json").exists():
            raise CheckpointError(
                f"'{self.name}' holds an adapter (adapter_config.json): merge it into its model, then retrofit that"
            )
        files = (path.relative_to(self.folder) for path in sorted(self.folder.rglob("*")) if path.is_file())
        return [
            file
            for file in files
            if file.suffix not in WEIGHT_SUFFIXES
            and not file.name.endswith(".index.json")
            and str(file) != "config.json"
            and not any(part.startswith(".") for part in file.parts)
        ]

    def config(self) -> Any:
        """Its Transformers config."""
        from transformers import AutoConfig

        assert self.settings  # a missing config.json has its own message
        try:
            config = AutoConfig.from_pretrained(self.folder)
        except Exception as error:  # whatever a config's own validation raises
            raise CheckpointError(f"'{self.name}': its config.json cannot be read: {one_line(error)}") from error
        config.name_or_path = self.name
        return config


def find(name: str) -> Source:
    """A folder as it is; anything else as a hub id, downloaded into the hub's cache (safetensors only)."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return Source(name, folder)
    if folder.is_file():
        raise CheckpointError(f"'{name}' is a file; SOURCE is a folder, a hub id, or a file ending in .gguf")
    if not may_be_hub_id(name):
        raise CheckpointError(f"'{name}': no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    ignored = [f"*{suffix}" for suffix in WEIGHT_SUFFIXES if suffix != ".safetensors"]
    try:
        return Source(name, Path(snapshot_download(name, ignore_patterns=ignored)))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise CheckpointError(f"'{name}': no such folder, and no such model on the hub") from error
    except Exception as error:  # anything that a network can do
        raise CheckpointError(f"'{name}': no such folder, and the hub did not answer: {one_line(error)}") from error


def may_be_hub_id(name: str) -> bool:
    """Whether a name can be one of the hub's, rather than a path."""
    return not name.startswith((".", "/", "~")) and name.count("/") <= 1


def model_class(config: Any) -> type[PreTrainedModel]:
    """The class of Transformers that a config names as its architecture."""
    import transformers

    name = config.architectures[0] if isinstance(config.architectures, list) and config.architectures else "(none)"
    found = getattr(transformers, str(name), None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise UnsupportedModelError(
            f"'{config.name_or_path}': its architecture '{name}' is not a class of Transformers "
            f"{transformers.__version__}; models with code of their own are not supported"
        )
    return found


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except OSError as error:
        raise CheckpointError(f"'{file}' cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"'{file}' is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"'{file}' is not a JSON object")
    return content


def one_line(error: BaseException) -> str:
    """An error's message without its line breaks."""
    return " ".join(str(error).split())
