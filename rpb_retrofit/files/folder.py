"""A folder that appears whole or not at all: written beside its target under another name, then renamed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from rpb_retrofit.errors import CheckpointError
from rpb_retrofit.files.claim import Claim, new_partial, remove_leftovers
from rpb_retrofit.files.printable import reason_of


def check_absent(out: Path) -> None:
    """CheckpointError where ``out`` exists."""
    try:
        taken = out.exists() or out.is_symlink()
    except OSError as error:
        raise CheckpointError(f"'{out}' cannot be written: {reason_of(error)}") from error
    if taken:
        raise CheckpointError(f"'{out}' exists already: choose another name, or remove it first")


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``out`` that becomes ``out`` when the block ends, and vanishes when it fails.

    A process that is killed leaves only the temporary folder, which the next run for the same ``out`` removes.
    Raises CheckpointError where ``out`` exists, or where writing fails (a full disk, say).
    """
    check_absent(out)
    remove_leftovers(out)
    claim: Claim | None = None
    try:
        claim = new_partial(out, "a folder in the making", insist=False)
        yield claim.folder
        claim.folder.rename(out)
        claim.folder = out
        claim.unmark()
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"writing '{out}' failed: {reason_of(error)}; nothing was left behind (is there space, and may you write "
            "there?)"
        ) from error
    finally:
        if claim is not None and claim.folder != out:
            shutil.rmtree(claim.folder, ignore_errors=True)
            claim.release()
