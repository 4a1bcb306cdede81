"""Small files of text that somebody else wrote: recipes, cards, evaluations."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from rpb_retrofit.files.printable import reason_of

MOST = 16 * 2**20
"""Bytes; none of these files comes near it."""


def read_small(file: Path, most: int = MOST) -> str:
    """What an ordinary file of UTF-8 text holds. A pipe or a device is never waited for.

    Raises ValueError, whose words go on after "cannot be read:", for what is no such file, or is larger than ``most``.
    """
    try:
        descriptor = os.open(file.expanduser(), os.O_RDONLY | os.O_NONBLOCK)
    except (OSError, RuntimeError) as error:
        raise ValueError(reason_of(error)) from error
    with open(descriptor, "rb") as stream:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("it is a pipe or a device, not a file")
        data = stream.read(most + 1)
    if len(data) > most:
        raise ValueError(f"it has more than {most:,} bytes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8: {error.reason} at byte {error.start}") from error
