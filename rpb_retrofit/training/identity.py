"""What a run depends on: going on with other weights, texts or settings would be neither the one run nor the other."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from rpb_retrofit.errors import CheckpointError, DataError
from rpb_retrofit.files.digest import digest
from rpb_retrofit.files.printable import reason_of
from rpb_retrofit.files.source import Source, find
from rpb_retrofit.training.recipe import Recipe

BESIDE = (
    *("config.json", "generation_config.json", "model.safetensors.index.json", "adapter_*", "chat_template*"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.tiktoken"),
)
"""Files of a checkpoint, beside its shards, that decide what it computes and how it reads text."""


def identity_of(model: str, start: str, source: str, recipe: Recipe, control: bool) -> dict[str, Any]:
    """What a run depends on, as JSON takes it; ``start`` is what is trained: the retrofit, or a control's source.

    CheckpointError and DataError for what cannot be read.
    """
    taught = recipe.objective == "distillation" and source != start
    unused = set() if recipe.repeats else {"repeats"}  # so that a run from before there were any goes on
    return {
        "model": model,
        "control": control,
        "source": source,
        "weights": fingerprint(start),
        **({"source_weights": fingerprint(source)} if taught else {}),
        "texts": {name: checksum(Path(name)) for name in texts_of(recipe)},
        "recipe": recipe.model_dump(mode="json", exclude=unused),
    }


def texts_of(recipe: Recipe) -> list[str]:
    """The files that a recipe reads."""
    names = [data.name for data in recipe.data] + ([recipe.held_out] if recipe.held_out else [])
    return [name for name in names if Path(name).expanduser().is_file()]


def fingerprint(name: str) -> dict[str, str]:
    """What tells one checkpoint from another: a checksum of all of each file that decides what it computes.

    Checkpoints are read once, several files at a time; loading then finds them in the page cache.
    """
    try:
        files = [Path(name).expanduser()] if name.endswith(".gguf") else _files(find(name))
        with ThreadPoolExecutor(4) as pool:
            return dict(zip((file.name for file in files), pool.map(digest, files), strict=True))
    except OSError as error:
        raise CheckpointError(f"'{name}': '{error.filename}' cannot be read: {reason_of(error)}") from error


def _files(source: Source) -> list[Path]:
    """The files of a checkpoint that decide what it computes."""
    beside = (file for file in source.folder.iterdir() if any(fnmatchcase(file.name, like) for like in BESIDE))
    return [*source.shards, *sorted(file for file in beside if file.is_file())]


def checksum(file: Path) -> str:
    """A checksum of all of a text."""
    try:
        return digest(file.expanduser())
    except OSError as error:
        raise DataError(f"'{file}' cannot be read: {reason_of(error)}") from error
