"""A folder that appears whole or not at all: written beside its target under another name, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from rpb_retrofit.errors import CheckpointError


def check_absent(out: Path) -> None:
    """CheckpointError where ``out`` exists."""
    try:
        taken = out.exists() or out.is_symlink()
    except OSError as error:
        raise CheckpointError(f"'{out}' cannot be written: {error.strerror}") from error
    if taken:
        raise CheckpointError(f"'{out}' exists already: choose another name, or remove it first")


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``out`` that becomes ``out`` when the block ends, and vanishes when it fails.

    A process that is killed leaves only the temporary folder, which the next run for the same ``out`` removes.
    Raises CheckpointError where ``out`` exists, or where writing fails (a full disk, say).
    """
    check_absent(out)
    _remove_leftovers(out)
    part = out.parent / f".{out.name}.partial-{os.getpid()}"
    try:
        part.mkdir(parents=True)
        yield part
        part.rename(out)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"writing '{out}' failed: {reason}; nothing was left behind (is there space, and may you write there?)"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _remove_leftovers(out: Path) -> None:
    for leftover in out.parent.glob(f".{out.name}.partial-*"):
        process = leftover.name.rpartition("-")[2]
        if not Path(f"/proc/{process}").exists():
            shutil.rmtree(leftover, ignore_errors=True)
