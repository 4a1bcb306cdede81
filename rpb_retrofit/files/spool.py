"""Values kept on disk while a command runs, so that its memory does not grow with the text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rpb_retrofit.errors import CheckpointError
from rpb_retrofit.files.printable import reason_of
from rpb_retrofit.files.record import pack, unpack
from rpb_retrofit.files.temporary import REMEDY, temporary_folder


class Spool:
    """Tensors, tuples of them and dataclasses of ``kinds``, on disk, by key, until the folder goes.

    Raises CheckpointError where it cannot be written or read.
    """

    def __init__(self, folder: Path, kinds: tuple[type, ...] = ()) -> None:
        self.folder, self.kinds = folder, kinds

    def __setitem__(self, key: tuple[Any, ...], value: Any) -> None:
        try:
            save_file(pack(value), self._file(key))
        except (OSError, SafetensorError) as error:
            raise self._failure("written", error) from error

    def __getitem__(self, key: tuple[Any, ...]) -> Any:
        try:
            return unpack(load_file(self._file(key)), self.kinds)
        except (OSError, SafetensorError) as error:
            raise self._failure("read", error) from error

    def __delitem__(self, key: tuple[Any, ...]) -> None:
        self._file(key).unlink()

    def bytes(self, key: tuple[Any, ...]) -> int:
        """What an object takes on disk."""
        return self._file(key).stat().st_size

    def _file(self, key: tuple[Any, ...]) -> Path:
        return self.folder / "-".join(map(str, key))

    def _failure(self, what: str, error: Exception) -> CheckpointError:
        return CheckpointError(f"temporary files in '{self.folder}' cannot be {what} ({reason_of(error)}): {REMEDY}")


@contextmanager
def temporary_spool(*kinds: type) -> Iterator[Spool]:
    """A spool in the system's folder for temporary files (``TMPDIR`` moves it), gone at the end."""
    with temporary_folder() as folder:
        yield Spool(folder, kinds)
