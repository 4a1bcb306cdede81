"""What a run depends on: going on with other weights, texts or settings would be neither the one run nor the other."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

from rpb_retrofit.errors import CheckpointError
from rpb_retrofit.files.source import find
from rpb_retrofit.training.recipe import Recipe


def identity_of(model: str, start: str, source: str, recipe: Recipe, control: bool) -> dict[str, Any]:
    """What a run depends on, as JSON takes it; ``start`` is what is trained: the retrofit, or a control's source."""
    return {
        "model": model,
        "control": control,
        "source": source,
        "weights": fingerprint(start),
        "texts": {name: checksum(Path(name)) for name in texts_of(recipe)},
        "recipe": recipe.model_dump(mode="json"),
    }


def texts_of(recipe: Recipe) -> list[str]:
    """The files that a recipe reads."""
    names = [data.name for data in recipe.data] + ([recipe.held_out] if recipe.held_out else [])
    return [name for name in names if Path(name).expanduser().is_file()]


def fingerprint(name: str) -> dict[str, str]:
    """What tells one checkpoint's weights from another's: the size of each file, and a checksum of where it ends."""
    files = [Path(name).expanduser()] if name.endswith(".gguf") else find(name).shards
    found = {}
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"'{name}': no such file")
        found[file.name] = checksum(file)
    return found


def checksum(file: Path) -> str:
    """A file's size, and a checksum of its last megabyte."""
    file = file.expanduser()
    with file.open("rb") as stream:
        stream.seek(-min(file.stat().st_size, 1 << 20), 2)
        return f"{file.stat().st_size} bytes, {zlib.crc32(stream.read()):08x}"
