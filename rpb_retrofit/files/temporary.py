"""Folders for temporary files: ``TMPDIR`` moves them, and they are gone at the end."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rpb_retrofit.errors import CheckpointError
from rpb_retrofit.files.printable import reason_of


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A new folder, gone at the end. CheckpointError where there is none to make it in."""
    try:
        made = tempfile.TemporaryDirectory(prefix="rpb-retrofit-", ignore_cleanup_errors=True)
    except OSError as error:
        raise CheckpointError(f"no temporary files can be written ({reason_of(error)}): {REMEDY}") from error
    with made as folder:
        yield Path(folder)


REMEDY = "set TMPDIR to a folder with space that you may write to"
"""What helps where temporary files cannot be written."""
