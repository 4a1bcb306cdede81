"""A file that is replaced whole or not at all."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from rpb_retrofit.errors import CheckpointError
from rpb_retrofit.files.printable import reason_of


def write_whole(file: Path, content: str | bytes) -> None:
    """Write beside it under another name, then rename. Devices and open pipes (``/dev/stdout``) are written to.

    Raises CheckpointError where that fails; what was there before is still there then.
    """
    data = content if isinstance(content, bytes) else content.encode("utf-8", errors="backslashreplace")
    try:
        if file.exists() and not file.is_file():
            _into(file, data)
        else:
            replace_file(file.resolve(), data, f".rpb-{secrets.token_hex(8)}.part")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"writing '{file}' failed: {reason_of(error)}") from error


def replace_file(file: Path, data: bytes, partial: str) -> None:
    """Write ``data`` beside a file under the name ``partial``, then rename it. OSError where that fails.

    Only a process that is killed leaves ``partial`` behind: a folder that is cleared up gives it a name of its own, by
    which to know it.
    """
    part = file.with_name(partial)
    try:
        part.write_bytes(data)
        if file.exists():
            part.chmod(stat.S_IMODE(file.stat().st_mode))
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def _into(file: Path, data: bytes) -> None:
    # Not blocking until opened: a pipe that nobody reads is an error, not a wait without end.
    descriptor = os.open(file, os.O_WRONLY | os.O_NONBLOCK)
    os.set_blocking(descriptor, True)
    with open(descriptor, "wb") as stream:
        stream.write(data)
