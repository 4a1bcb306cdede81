"""Folders that this program made, and holds: a mark in the folder, which is also the lock.

Nothing is deleted that has no mark, and nothing that another process holds. The lock is the kernel's: it goes with the
process that took it, however that ends, and it holds between containers that share a volume, which process ids do not.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import shutil
from pathlib import Path

MARK = ".rpb-retrofit"
"""The file in a folder that says who made it, and whose lock says who holds it."""

PROGRAM = "rpb_retrofit"


class NotMarkedError(ValueError):
    """A folder that this program did not make, or made for something else; the message says which."""


class Claim:
    """A folder that this process holds until `release`."""

    def __init__(self, folder: Path, descriptor: int) -> None:
        self.folder, self._descriptor = folder, descriptor

    @classmethod
    def make(cls, folder: Path, purpose: str, insist: bool = True) -> Claim:
        """Mark a folder that was just made, and hold it. OSError where that fails; where the file system has no locks
        only if one ``insist``s: without a lock nobody else removes the folder either."""
        descriptor = os.open(folder / MARK, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            if insist:
                os.close(descriptor)
                raise
        # What is written last makes the mark: between making the file and locking it, others could take the lock.
        os.write(descriptor, json.dumps({"program": PROGRAM, "purpose": purpose}).encode())
        return cls(folder, descriptor)

    @classmethod
    def take(cls, folder: Path, purpose: str | None) -> Claim:
        """Hold a folder that was made for a purpose (None: any), by this program.

        Raises BlockingIOError where another process holds it, NotMarkedError where it is not this program's, and
        OSError where it cannot be locked.
        """
        if folder.is_symlink() or not folder.is_dir():
            raise NotMarkedError("it is a link" if folder.is_symlink() else "it is no folder")
        try:
            descriptor = os.open(folder / MARK, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            raise NotMarkedError("it was not made by this program") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(descriptor), os.stat(folder / MARK)):
                raise BlockingIOError  # its holder removed it meanwhile, and somebody made another
            made_for = _purpose(os.pread(descriptor, 4096, 0))
            if purpose is not None and made_for != purpose:
                raise NotMarkedError(f"it was made for {made_for}")
        except BaseException:
            os.close(descriptor)
            raise
        return cls(folder, descriptor)

    def release(self) -> None:
        """Let others have the folder."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def unmark(self) -> None:
        """Give the folder to whoever it is for, without a trace of the claim."""
        with contextlib.suppress(OSError):
            os.unlink(self.folder / MARK)
        self.release()


def _purpose(mark: bytes) -> str:
    try:
        content = json.loads(mark)
        if content["program"] == PROGRAM:
            return str(content["purpose"])
    except (ValueError, LookupError, TypeError, RecursionError):
        pass
    raise NotMarkedError("it was not made by this program")


def new_partial(target: Path, purpose: str, insist: bool = True) -> Claim:
    """A new folder beside ``target`` that this process holds, under a name that no other has."""
    folder = target.parent / f".{target.name}.partial-{secrets.token_hex(8)}"
    folder.mkdir(parents=True)
    return Claim.make(folder, purpose, insist)


def remove_leftovers(target: Path) -> None:
    """Remove what killed processes left of `new_partial`: what carries the mark, and nobody holds."""
    name = re.compile(re.escape(f".{target.name}.partial-") + "[0-9a-f]{16}")
    try:
        leftovers = [entry for entry in target.parent.iterdir() if name.fullmatch(entry.name)]
    except OSError:  # no such folder yet
        return
    for folder in leftovers:
        with contextlib.suppress(OSError, NotMarkedError):
            claim = Claim.take(folder, None)
            shutil.rmtree(folder, ignore_errors=True)
            claim.release()


def remove_entry(entry: Path) -> None:
    """Remove a file or a folder; of a link the link alone."""
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink(missing_ok=True)
