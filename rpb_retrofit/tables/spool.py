"""A place on disk for what a calibration keeps: its memory does not grow with the text."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


class Spool:
    """Objects with tensors on disk, by key, until the folder goes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __setitem__(self, key: tuple[Any, ...], value: Any) -> None:
        torch.save(value, self._file(key))

    def __getitem__(self, key: tuple[Any, ...]) -> Any:
        return torch.load(self._file(key), weights_only=False)  # written by this process

    def __delitem__(self, key: tuple[Any, ...]) -> None:
        self._file(key).unlink()

    def bytes(self, key: tuple[Any, ...]) -> int:
        """What an object takes on disk."""
        return self._file(key).stat().st_size

    def _file(self, key: tuple[Any, ...]) -> Path:
        return self.folder / "-".join(map(str, key))


@contextmanager
def temporary_spool() -> Iterator[Spool]:
    """A spool in the system's folder for temporary files (``TMPDIR`` moves it), gone at the end."""
    with tempfile.TemporaryDirectory(prefix="rpb-retrofit-") as folder:
        yield Spool(Path(folder))
