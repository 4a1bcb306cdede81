"""Safetensors files as files: their headers, and copies of them that never pass through tensors.

Format: 8 bytes (little-endian) with the length of a JSON header, the header, then the tensors' bytes, at offsets
counted from the header's end. https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open

from rpb_retrofit.errors import CheckpointError
from rpb_retrofit.files.printable import reason_of

Progress = Callable[[int], object]
"""Told how many bytes more are written."""

_CLONE = 0x40049409  # FICLONE of linux/fs.h: share the blocks, copy on write
_CHUNK = 64 << 20


def read_header(path: Path) -> dict[str, Any]:
    """Tensor name -> {dtype, shape, data_offsets}, and ``__metadata__`` if there is one."""
    if not path.is_file():
        raise CheckpointError(f"'{path}' is not a file")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            if not 0 < length <= path.stat().st_size - 8:
                raise ValueError("its header does not fit the file")
            header = json.loads(file.read(length))
            end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"'{path}' is not a safetensors file ({error}): fetch it again") from error
    if path.stat().st_size < 8 + length + end:
        raise CheckpointError(f"'{path}' is shorter than its header says: fetch it again")
    try:  # the format's own reader knows whether dtypes, shapes and offsets agree, and what stands behind the last one
        safe_open(path, framework="np").__exit__(None, None, None)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"'{path}' is not a safetensors file ({error}): fetch it again") from error
    return header


def data_start(file: BinaryIO) -> int:
    """Where the tensors' bytes begin in a file that was just opened: offsets count from there."""
    return 8 + int.from_bytes(file.read(8), "little")


def tensor_names(path: Path) -> list[str]:
    """Names of the tensors in a file."""
    return [name for name in read_header(path) if name != "__metadata__"]


def place(source: Path, target: Path, *, link: bool, progress: Progress) -> None:
    """Make ``target`` a file with the content of ``source``: a hard link if asked for, else a clone, else a copy."""
    if link:
        try:
            os.link(source, target)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
                raise
            raise CheckpointError(
                f"cannot link '{source}' to '{target}' ({reason_of(error)}): leave --link out"
            ) from error
        progress(source.stat().st_size)
        return
    with source.open("rb") as reader, target.open("wb") as writer:
        try:
            fcntl.ioctl(writer.fileno(), _CLONE, reader.fileno())
            progress(source.stat().st_size)
        except OSError:  # no copy-on-write here
            _copy(reader, writer, source.stat().st_size, progress)


def place_without(source: Path, target: Path, dropped: Container[str], progress: Progress) -> None:
    """Copy a safetensors file without the tensors named in ``dropped``, streaming its bytes."""
    header = read_header(source)
    kept = {name: entry for name, entry in header.items() if name != "__metadata__" and name not in dropped}
    kept = dict(sorted(kept.items(), key=lambda item: item[1]["data_offsets"]))
    spans, position = [], 0
    for entry in kept.values():
        first, last = entry["data_offsets"]
        spans.append((first, last - first))
        entry["data_offsets"] = [position, position + last - first]
        position += last - first
    if "__metadata__" in header:
        kept["__metadata__"] = header["__metadata__"]
    text = json.dumps(kept, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with source.open("rb") as reader, target.open("wb") as writer:
        start = data_start(reader)
        writer.write(len(text).to_bytes(8, "little") + text)
        for offset, length in spans:
            reader.seek(start + offset)
            _copy(reader, writer, length, progress)


def overwrite(file: Path, tensors: Mapping[str, bytes]) -> None:
    """Put other bytes, as many, in the place of some tensors. A hard link becomes a file of its own first."""
    if file.stat().st_nlink > 1:
        linked = file.rename(file.with_suffix(".linked"))
        place(linked, file, link=False, progress=lambda length: None)
        linked.unlink()
    header = read_header(file)
    with file.open("r+b") as target:
        start = data_start(target)
        for name, content in tensors.items():
            first, last = header[name]["data_offsets"]
            assert last - first == len(content), f"{name}: {len(content)} bytes for {last - first}"
            target.seek(start + first)
            target.write(content)


def _copy(reader: BinaryIO, writer: BinaryIO, length: int, progress: Progress) -> None:
    writer.flush()  # what follows goes past Python's buffers
    position = reader.tell()
    while length:
        copied = os.sendfile(writer.fileno(), reader.fileno(), position, min(length, _CHUNK))
        if not copied:
            raise CheckpointError(f"'{reader.name}' ends {length} bytes too early: fetch it again")
        position, length = position + copied, length - copied
        progress(copied)
