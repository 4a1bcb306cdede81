"""What a checkpoint's other files say of how long a text may be, once a retrofit has taken the limit away; and the
files by which Sentence Transformers knows a checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rpb_retrofit.files.json_file import save_json

NO_LIMIT = int(1e30)
"""What tokenizers of Transformers have for a length that nothing limits."""

LIMITED = ("learned", "sinusoidal")
"""Mechanisms that cannot go beyond their table."""

MODULES, SETTINGS, CODE = "modules.json", "sentence_*_config.json", "sentence_module.py"


def lift_limits(folder: Path, mechanism: str, source: Path | None = None) -> list[str]:
    """Let the files of a retrofit's folder say that no table ends its texts, where one ended its source's, and let
    Sentence Transformers keep what its user sets.

    ``source`` is the folder that the files came from. Returns notes on what was changed.
    """
    notes = []
    if mechanism in LIMITED:
        files = [(folder / "tokenizer_config.json", "model_max_length")]
        files += [(file, "max_seq_length") for file in sorted(folder.glob(SETTINGS))]
        for file, key in files:
            content = _read(file)
            if not isinstance(content, dict) or content.get(key) == NO_LIMIT:
                continue
            save_json(file, {**content, key: NO_LIMIT})
            if (before := content.get(key)) is not None:
                notes.append(f"{key}={before} of {file.name} lifted: no table of positions ends texts any more")
    if source is not None:
        _use_module(folder, source)
    return notes


def _use_module(folder: Path, source: Path) -> None:
    """Have Sentence Transformers open the model by the module that travels with it."""
    modules = _read(folder / MODULES)
    if not isinstance(modules, list):
        return
    changed = False
    for module in modules:
        kind = module.get("type") if isinstance(module, dict) else None
        if isinstance(kind, str) and kind.endswith(".Transformer") and not module.get("path"):
            module["type"], changed = f"{Path(CODE).stem}.Transformer", True
            shutil.copyfile(Path(__file__).parent / CODE, folder / CODE)
    if changed:
        save_json(folder / MODULES, modules)
    copy_sentence_files(source, folder)  # the weights of a layer behind the model, say


def copy_sentence_files(source: Path, folder: Path) -> None:
    """Copy what is Sentence Transformers' own, beside model and tokenizer, where ``folder`` does not have it yet."""
    for file in _sentence_files(source):
        if not (folder / file).exists():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / file, folder / file)


def _sentence_files(folder: Path) -> Iterator[Path]:
    """Relative to the folder; code only where it is this project's."""
    modules = _read(folder / MODULES)
    if not isinstance(modules, list):
        return
    own = [folder / MODULES, folder / "config_sentence_transformers.json", *sorted(folder.glob(SETTINGS))]
    code = Path(__file__).parent / CODE
    if (folder / CODE).is_file() and (folder / CODE).read_bytes() == code.read_bytes():
        own.append(folder / CODE)
    for module in modules:
        place = module.get("path") if isinstance(module, dict) else None
        if isinstance(place, str) and place and (folder / place).resolve().parent == folder.resolve():
            files = sorted((folder / place).rglob("*"))
            own += [file for file in files if file.suffix in (".json", ".safetensors", ".txt")]
    yield from (file.relative_to(folder) for file in own if file.is_file() and _inside(file, folder))


def _inside(file: Path, folder: Path) -> bool:
    """Whether a file is in a folder itself, or, as links of the hub's cache are, in the same repository."""
    folder, file = folder.resolve(), file.resolve()
    root = folder.parent.parent if folder.parent.name == "snapshots" else folder
    return file.is_relative_to(root)


def _read(file: Path) -> Any:
    """The content of a JSON file; None where there is none that can be read: it stays as it is."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
