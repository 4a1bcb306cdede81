"""``OUT.run`` beside ``OUT``: what a command that was stopped goes on from. One process may hold it at a time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from rpb_retrofit.errors import CheckpointError
from rpb_retrofit.files.claim import MARK, Claim, NotMarkedError, new_partial, remove_entry, remove_leftovers
from rpb_retrofit.files.printable import reason_of
from rpb_retrofit.files.whole_file import replace_file


class WorkFolder:
    """A folder of one command, whose entries have names like those in ``made``; no other entry is ever removed."""

    def __init__(self, path: Path, command: str, made: Sequence[str]) -> None:
        self.path, self.command, self.made = path, command, made
        self._claim: Claim | None = None

    def take(self) -> None:
        """Hold the folder, which is made where there is none.

        Raises CheckpointError where another process holds it, where this command did not make it, or where it holds
        links, through which something else could be written or removed.
        """
        remove_leftovers(self.path)
        try:
            if not os.path.lexists(self.path):
                self._make()
            else:
                self._claim = Claim.take(self.path, self.command)
        except BlockingIOError:
            raise CheckpointError(
                f"'{self.path}' is in use by another run: wait for it, or choose another OUT"
            ) from None
        except NotMarkedError as error:
            raise CheckpointError(
                f"'{self.path}' is in the way of {self.command}: {error}; move it, or choose another OUT"
            ) from None
        except OSError as error:
            raise CheckpointError(f"'{self.path}' cannot be written: {reason_of(error)}") from error
        if (link := next(self._links(), None)) is not None:
            self.release()
            raise CheckpointError(f"'{link}' is a link, which {self.command} did not make: remove it first")

    def _make(self) -> None:
        claim = new_partial(self.path, self.command)
        try:
            claim.folder.rename(self.path)
        except OSError as error:  # another process was faster
            remove_entry(claim.folder)
            claim.release()
            raise (BlockingIOError() if self.path.is_dir() else error) from None
        claim.folder = self.path
        self._claim = claim

    def _links(self) -> Iterator[Path]:
        """Links in the folder, but for those that a tracker puts among its logs."""
        for folder, folders, files in os.walk(self.path):
            yield from (path for name in [*folders, *files] if (path := Path(folder, name)).is_symlink())
            if Path(folder) == self.path and "logs" in folders:
                folders.remove("logs")

    def clear(self) -> None:
        """Remove what the command made in it."""
        for entry in list(self.path.iterdir()):
            if any(fnmatchcase(entry.name, name) for name in self.made):
                remove_entry(entry)

    def remove(self) -> None:
        """Remove what the command made, and the folder unless somebody put something else into it."""
        if self._claim is None:
            return
        with contextlib.suppress(OSError):
            self.clear()
            (self.path / MARK).unlink()
            self.path.rmdir()
        self.release()

    def release(self) -> None:
        """Let others have the folder: an error's traceback would keep it for as long as somebody looks at it."""
        if self._claim is not None:
            self._claim.release()
            self._claim = None


def write_entry(file: Path, data: bytes) -> None:
    """Replace a file in a work folder whole or not at all. OSError where that fails.

    What a killed process leaves is called ``.NAME.partial``, which a `WorkFolder` names among what it has ``made``.
    """
    replace_file(file, data, f".{file.name}.partial")
