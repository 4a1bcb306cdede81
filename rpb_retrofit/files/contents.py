"""What lies in a checkpoint's folder: what travels into a retrofit, what stays behind, and what is not to be opened."""

from __future__ import annotations

import json
import os
import pickletools
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rpb_retrofit.errors import CheckpointError
from rpb_retrofit.files.printable import reason_of

WEIGHT_SUFFIXES = (
    *(".safetensors", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".npy", ".npz"),
    *(".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill", ".pdparams", ".tar"),  # pickles
)
"""Files that hold weights, none of which travels as it is."""

CODE_SUFFIXES = (
    *(".py", ".pyc", ".pyo", ".pyd", ".pyx", ".pyw", ".pth", ".ipynb", ".so", ".dll", ".dylib", ".egg", ".whl"),
    *(".sh", ".bash", ".js", ".exe", ".bat", ".ps1", ".jar"),
)
"""Files that can be run: the source's are not reviewed by anyone, and a retrofit is loaded with trust_remote_code."""

_BINARY = (
    b"PK\x03\x04",
    b"PK\x05\x06",
    b"\x93NUMPY",
    b"\x1f\x8b",
    b"BZh",
    b"\xfd7zXZ",
    b"\x28\xb5\x2f\xfd",
    b"\x7fELF",
)
"""How archives (torch.save writes a zip), arrays and programs begin, whatever they are called."""

_CALLS = {"STACK_GLOBAL", "OBJ", "REDUCE", "BUILD", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}
"""What a pickle does when it runs code."""

_NEVER_PARSED = ("tokenizer.json", "vocab.json", "added_tokens.json", "special_tokens_map.json")
"""JSON that names no code, some of it large."""


def members(folder: Path, name: str) -> list[Path]:
    """The files in a folder and in those inside it, relative to it, but for hidden ones.

    Raises CheckpointError for a link that leads out of the folder (or, in a hub's cache, out of its repository), for
    what is no file, such as a pipe, and for what may not be read.
    """
    files: list[Path] = []
    try:
        roots = [root.resolve(strict=True) for root in (folder, *_blobs(folder)) if root.exists()]
        for entry in _walk(folder):
            relative = Path(entry.path).relative_to(folder)
            unread = stays_behind(relative) and relative.suffix != ".safetensors"
            if entry.is_symlink():
                target = Path(entry.path).resolve()
                if not any(target.is_relative_to(root) for root in roots) and not unread:
                    raise CheckpointError(
                        f"'{name}': {relative} is a link to '{target}', outside of the folder: copy the file there, or "
                        "remove the link"
                    )
            if entry.is_dir():
                continue
            if entry.is_file():
                files.append(relative)
            elif not unread:
                raise CheckpointError(f"'{name}': {relative} is {_kind(Path(entry.path))}: remove it")
    except OSError as error:
        raise CheckpointError(f"'{error.filename or name}' cannot be read: {reason_of(error)}") from error
    except RuntimeError as error:  # links that lead to one another
        raise CheckpointError(f"'{name}' cannot be read: {error}") from error
    return sorted(files)


def _blobs(folder: Path) -> list[Path]:
    """Where the files of a snapshot in the hub's cache lie: NAME/blobs for NAME/snapshots/REVISION."""
    snapshots = folder.resolve().parent
    return [snapshots.parent / "blobs"] if snapshots.name == "snapshots" else []


def _walk(folder: Path) -> Iterator[os.DirEntry[str]]:
    ahead = [str(folder)]
    while ahead:
        with os.scandir(ahead.pop()) as entries:
            shown = [entry for entry in entries if not entry.name.startswith(".")]
        yield from shown
        ahead += [entry.path for entry in shown if entry.is_dir(follow_symlinks=False)]


def _kind(path: Path) -> str:
    try:
        mode = path.stat().st_mode
    except OSError:
        return "a link to nothing"
    return "a pipe" if stat.S_ISFIFO(mode) else "not a file that can be copied"


def stays_behind(file: Path) -> bool:
    """Whether a file's name alone says that it does not travel: other weights, pickles, code."""
    return file.suffix.lower() in (*WEIGHT_SUFFIXES, *CODE_SUFFIXES) or "__pycache__" in file.parts


def holds_code(path: Path) -> bool:
    """Whether a file is a pickle, an archive or a program whatever its name says."""
    with path.open("rb") as file:
        head = file.read(8)
        if head.startswith(_BINARY):
            return True
        file.seek(0)
        count, runs = 0, False
        try:
            for opcode, argument, _ in pickletools.genops(file):
                runs = runs or opcode.name == "PROTO" or _calls(opcode.name, argument)
                count += 1
        except Exception:  # whatever is no pickle
            return False
        return runs or (count > 1 and not file.read(64).strip())


def _calls(opcode: str, argument: Any) -> bool:
    """Whether an instruction of a pickle can run code; some lines of text look like the one that names a function."""
    if opcode in ("GLOBAL", "INST"):
        return all(part.isidentifier() for name in str(argument).split(" ") for part in name.split("."))
    return opcode in _CALLS


def without_code(path: Path) -> tuple[dict[str, Any], list[str]] | None:
    """A JSON file's content without what names code to be fetched and run, and what that was; None where it names none.

    Transformers reads the key ``auto_map`` (``custom_pipelines`` in a config), whose values may name another
    repository.
    """
    if path.suffix.lower() != ".json" or path.name in _NEVER_PARSED:
        return None
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None  # Transformers cannot read it either
    removed: list[str] = []

    def cleaned(value: Any) -> Any:
        if isinstance(value, list):
            return [cleaned(item) for item in value]
        if not isinstance(value, dict):
            return value
        removed.extend(key for key in value if key in CODE_KEYS)
        return {key: cleaned(item) for key, item in value.items() if key not in CODE_KEYS}

    content = cleaned(content)
    return (content, removed) if removed else None


CODE_KEYS = ("auto_map", "custom_pipelines")
"""Keys of configs that name code."""


def names_foreign_modules(path: Path) -> bool:
    """Whether a modules.json of sentence-transformers names classes of others', which it would fetch and run."""
    if path.name != "modules.json":
        return False
    try:
        modules = json.loads(path.read_bytes())
        return any(not module["type"].startswith("sentence_transformers.") for module in modules)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return True
