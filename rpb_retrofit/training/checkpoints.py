"""The folder of a run: its recipe, its lock, and checkpoints that are whole or absent."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from rpb_retrofit.errors import CheckpointError, ConfigError

META = "rpb.json"
"""Written last, so a checkpoint that has it is whole."""

WRITING = (OSError, RuntimeError, SafetensorError)
"""What a full disk makes PyTorch, safetensors and Python raise."""


@dataclass(frozen=True)
class Saved:
    """A whole checkpoint and what it says of itself."""

    folder: Path
    meta: dict[str, Any]


class Checkpoints:
    """Checkpoints ``step-N`` of one stage; the newest ``keep`` of them stay."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def partial(self, step: int) -> Path:
        """Where a checkpoint is written before it gets its name."""
        return self.folder / f".step-{step:08d}.partial"

    def publish(self, step: int, meta: dict[str, Any]) -> None:
        """Give a written checkpoint its name, then drop the oldest ones."""
        part, target = self.partial(step), self.folder / f"step-{step:08d}"
        write_whole(part / META, json.dumps(meta))
        _flush(part)
        shutil.rmtree(target, ignore_errors=True)
        part.rename(target)
        _flush_folder(self.folder)
        for old in self._names()[: -self.keep]:
            shutil.rmtree(old)

    def discard(self, step: int) -> None:
        """Remove what was written of a checkpoint that failed."""
        shutil.rmtree(self.partial(step), ignore_errors=True)

    def last(self) -> Saved | None:
        """The newest whole checkpoint."""
        for folder in reversed(self._names()):
            return Saved(folder, json.loads((folder / META).read_text()))
        return None

    def _names(self) -> list[Path]:
        return sorted(folder for folder in self.folder.glob("step-*") if (folder / META).exists())


def write_whole(file: Path, text: str) -> None:
    """Write a file under another name, then rename it."""
    part = file.with_name(f".{file.name}.partial")
    part.write_text(text)
    part.replace(file)


def _flush(folder: Path) -> None:
    """Have everything in a folder on the disk before its name says so."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        else:
            _flush_folder(file)
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class RunFolder:
    """``OUT.run`` beside ``OUT``: what a run that was stopped needs to go on. One process may hold it at a time."""

    def __init__(self, out: Path) -> None:
        if not out.name:
            raise ConfigError(f"OUT '{out}' has no name of its own: give a folder that does not exist yet")
        self.path = out.with_name(f"{out.name}.run")
        self._lock: Any = None

    def open(self, identity: dict[str, Any], restart: bool) -> bool:
        """Take the folder; True where there is a run to go on with.

        ``identity`` is what the run depends on; CheckpointError where another process holds the folder, ConfigError
        where it holds a run that depends on something else and has trained.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / "lock").open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"'{self.path}' is in use by another run: wait for it, or choose another OUT"
            ) from None
        except OSError as error:
            raise CheckpointError(f"'{self.path}' cannot be written: {error.strerror}") from error
        file = self.path / "run.json"
        if restart or self.idle:
            for entry in self.path.iterdir():
                if entry.name != "lock":
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        if file.exists():
            before = json.loads(file.read_text())
            if differences := _differences(before, identity):
                name, was, is_now = differences[0]
                raise ConfigError(
                    f"'{self.path}' holds a run with {name}={was!r}, not {is_now!r}: give what it had, or --restart to "
                    "throw it away"
                )
            return True
        write_whole(file, json.dumps(identity, indent=2) + "\n")
        return False

    @property
    def idle(self) -> bool:
        """Whether nothing in it was trained."""
        return next(self.path.glob("stage-*"), None) is None

    def release(self) -> None:
        """Let others have the folder: an error's traceback would keep the lock for as long as somebody looks at it."""
        if self._lock is not None:
            self._lock.close()

    def remove(self) -> None:
        """Forget the run: it is finished and OUT holds what it made, or nothing was trained."""
        shutil.rmtree(self.path, ignore_errors=True)


def _differences(before: Any, after: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(after, dict):
        keys = [*before, *(key for key in after if key not in before)]
        return [d for key in keys for d in _differences(before.get(key), after.get(key), f"{path}.{key}".strip("."))]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = enumerate(zip(before, after, strict=True))
        return [d for i, (one, other) in pairs for d in _differences(one, other, f"{path}.{i}")]
    return [] if before == after else [(path, before, after)]


def attempt(write: Callable[[], None]) -> str | None:
    """Run something that writes; what went wrong, or None."""
    try:
        write()
    except WRITING as error:
        return " ".join(str(getattr(error, "strerror", None) or error).split())
    return None
