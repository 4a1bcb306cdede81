"""The folder of a run: its recipe, its lock, and checkpoints that are whole or absent."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from rpb_retrofit.errors import CheckpointError, ConfigError
from rpb_retrofit.files.claim import MARK, remove_entry
from rpb_retrofit.files.digest import digest, digest_of
from rpb_retrofit.files.json_file import read_object
from rpb_retrofit.files.printable import reason_of
from rpb_retrofit.files.record import DamagedError
from rpb_retrofit.files.work import WorkFolder, write_entry

META, STATE, RUN = "rpb.json", "state.json", "run.json"
"""What a checkpoint of a stage says of itself, what the folder of a finished stage says, and the run's identity."""

WRITING = (OSError, RuntimeError, SafetensorError)
"""What a full disk makes PyTorch, safetensors and Python raise."""


def write_manifest(folder: Path, name: str, meta: dict[str, Any]) -> None:
    """Write what a folder says of itself, with the checksums of all its files: written last, so what has a manifest is
    whole."""
    written = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != MARK)
    files = {str(file.relative_to(folder)): digest(file) for file in written}
    content = json.loads(json.dumps({"meta": meta, "files": files}))
    write_entry(folder / name, json.dumps({**content, "checksum": _checksum(content)}).encode())


def read_manifest(folder: Path, name: str, checked: bool = True) -> dict[str, Any]:
    """What a folder says of itself. DamagedError where that, or (``checked``) one of its files, is not as it was."""
    try:
        content = read_object(folder / name)
    except CheckpointError as error:
        raise DamagedError(str(error)) from error
    if content.pop("checksum", None) != _checksum(content) or content.keys() != {"meta", "files"}:
        raise DamagedError(f"'{folder / name}' was cut short or changed")
    for file, known in content["files"].items() if checked else ():
        try:
            checksum = digest(folder / file)
        except OSError as error:
            raise DamagedError(f"'{folder / file}' cannot be read: {reason_of(error)}") from error
        if checksum != known:
            raise DamagedError(f"'{folder / file}' was cut short or changed")
    return content["meta"]


def _has_manifest(folder: Path) -> bool:
    try:
        read_manifest(folder, META, checked=False)
    except DamagedError:
        return False
    return True


def _checksum(content: dict[str, Any]) -> str:
    return digest_of([json.dumps(content, sort_keys=True).encode()])


@dataclass(frozen=True)
class Saved:
    """A whole checkpoint and what it says of itself."""

    folder: Path
    meta: dict[str, Any]


class Checkpoints:
    """Checkpoints ``step-N`` of one stage; the newest ``keep`` of them stay. ``run``: the checksum of the run's
    identity."""

    def __init__(self, folder: Path, keep: int, run: str = "") -> None:
        self.folder, self.keep, self.run = folder, keep, run

    def partial(self, step: int) -> Path:
        """Where a checkpoint is written before it gets its name."""
        return self.folder / f".step-{step:08d}.partial"

    def publish(self, step: int, meta: dict[str, Any]) -> None:
        """Give a written checkpoint its name, then drop the oldest ones."""
        part, target = self.partial(step), self.folder / f"step-{step:08d}"
        write_manifest(part, META, {**meta, "run": self.run})
        _flush(part)
        if target.exists():
            remove_entry(target)
        part.rename(target)
        _flush_folder(self.folder)
        whole = [folder for folder in self._all() if _has_manifest(folder)]  # what is damaged replaces none of them
        for old in whole[: -self.keep]:
            remove_entry(old)

    def discard(self, step: int) -> None:
        """Remove what was written of a checkpoint that failed."""
        shutil.rmtree(self.partial(step), ignore_errors=True)

    def last(self, damaged: list[str] | None = None) -> Saved | None:
        """The newest whole checkpoint; what is wrong with newer ones is appended to ``damaged``."""
        for folder in reversed(self._all()):
            try:
                return Saved(folder, read_manifest(folder, META))
            except DamagedError as error:
                if damaged is not None:
                    damaged.append(str(error))
        return None

    def _all(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"))


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


class RunFolder(WorkFolder):
    """``OUT.run`` beside ``OUT``: what a run that was stopped needs to go on. One process may hold it at a time."""

    def __init__(self, out: Path) -> None:
        if not out.name:
            raise ConfigError(f"OUT '{out}' has no name of its own: give a folder that does not exist yet")
        made = (RUN, "stage-*", ".stage-*.partial-*", f".{RUN}.partial", "logs")
        super().__init__(out.with_name(f"{out.name}.run"), "rpb finetune", made)

    def open(self, identity: dict[str, Any], restart: bool, say: Callable[[str], None] = lambda line: None) -> bool:
        """Take the folder; True where there is a run to go on with.

        ``identity`` is what the run depends on; CheckpointError where another process holds the folder, or something
        else made it, ConfigError where it holds a run that depends on something else and has trained.
        """
        self.take()
        try:
            return self._open(json.loads(json.dumps(identity)), restart, say)
        except OSError as error:
            self.release()
            raise CheckpointError(f"'{self.path}' cannot be written: {reason_of(error)}") from error
        except ConfigError:
            self.release()
            raise

    def _open(self, identity: dict[str, Any], restart: bool, say: Callable[[str], None]) -> bool:
        if restart or self.idle:
            self.clear()
        file, goes_on = self.path / RUN, not self.idle
        if goes_on:
            try:
                _compare(self.path, read_object(file), identity)
            except CheckpointError as error:
                if run_checksum(identity) not in self._runs():
                    raise ConfigError(
                        f"{error}, and nothing else says that it holds this run: --restart throws it away"
                    ) from error
                say(f"{error}: what the checkpoints say of the run is taken instead")
        write_entry(file, (json.dumps(identity, indent=2) + "\n").encode())
        return goes_on

    def _runs(self) -> set[str]:
        """The runs that checkpoints and finished stages in the folder say they belong to."""
        places = [(file.parent, file.name) for name in (META, STATE) for file in self.path.glob(f"stage-*/**/{name}")]
        runs = set()
        for folder, name in places:
            with contextlib.suppress(DamagedError, KeyError):
                runs.add(read_manifest(folder, name, checked=False)["run"])
        return runs

    @property
    def idle(self) -> bool:
        """Whether nothing in it was trained."""
        return next(self.path.glob("stage-*"), None) is None


def run_checksum(identity: dict[str, Any]) -> str:
    """A checksum of what a run depends on."""
    return digest_of([json.dumps(json.loads(json.dumps(identity)), sort_keys=True).encode()])


def _compare(folder: Path, before: dict[str, Any], identity: dict[str, Any]) -> None:
    if differences := _differences(before, identity):
        name, was, is_now = differences[0]
        raise ConfigError(
            f"'{folder}' holds a run with {name}={was!r}, not {is_now!r}: give what it had, or --restart to throw it "
            "away"
        )


def _differences(before: Any, after: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(after, dict):
        keys = [*before, *(key for key in after if key not in before)]
        return [d for key in keys for d in _differences(before.get(key), after.get(key), f"{path}.{key}".strip("."))]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = enumerate(zip(before, after, strict=True))
        return [d for i, (one, other) in pairs for d in _differences(one, other, f"{path}.{i}")]
    return [] if before == after else [(path, before, after)]


def failure_of(write: Callable[[], None]) -> str | None:
    """Run something that writes; why it failed, or None."""
    try:
        write()
    except WRITING as error:
        return reason_of(error)
    return None
