"""What was measured, kept on disk, so that an interrupted examination goes on after it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
from safetensors import SafetensorError

from rpb_retrofit.errors import CheckpointError, ConfigError
from rpb_retrofit.files.digest import digest_of
from rpb_retrofit.files.json_file import read_object
from rpb_retrofit.files.printable import message_of, reason_of
from rpb_retrofit.files.record import DamagedError, pack, unpack
from rpb_retrofit.files.work import WorkFolder, write_entry

Result = TypeVar("Result")
IDENTITY, SUFFIX = "identity.json", ".measured"


class Journal:
    """Measurements by name: each taken once, and read from the folder where an earlier run left it there.

    A file holds a checksum of the rest, then the checksum of what the examination depends on, then the measurement as
    safetensors. What is damaged, or belongs to another examination, is measured again. Within ``with``, whose end lets
    others have the folder, and removes it where an error came before anything was measured.
    """

    def __init__(
        self,
        folder: WorkFolder | None = None,
        identity: str = "",
        kinds: Sequence[type] = (),
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.folder, self.identity, self.kinds, self.say = folder, identity, kinds, say
        self.held = dict[str, Any]()

    @classmethod
    def open(
        cls,
        path: Path,
        identity: dict[str, Any],
        command: str,
        kinds: Sequence[type],
        say: Callable[[str], None] = lambda line: None,
    ) -> Journal:
        """The journal in a folder, which is made for a ``command`` and held by this process. ``kinds``: the data
        classes of the measurements.

        Raises ConfigError where it holds an examination of something else, CheckpointError where it is not the
        command's, in use, or cannot be written.
        """
        folder, text = WorkFolder(path, command, (IDENTITY, f"*{SUFFIX}", ".*.partial")), json.dumps(identity, indent=2)
        folder.take()
        try:
            _check(path / IDENTITY, json.loads(text), say)
            write_entry(path / IDENTITY, (text + "\n").encode())
        except OSError as error:
            folder.release()
            raise CheckpointError(f"'{path}' cannot be used: {error}; choose another --out") from error
        except ConfigError:
            folder.release()
            raise
        return cls(folder, digest_of([text.encode()]), kinds, say)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self.folder is not None:
            if kind is not None and next(self.folder.path.glob(f"*{SUFFIX}"), None) is None:
                self.folder.remove()
            self.folder.release()

    def __call__(self, name: str, measure: Callable[[], Result]) -> Result:
        """The measurement ``name``: taken now, unless it was taken before."""
        if name not in self.held:
            file = None if self.folder is None else self.folder.path / f"{name}{SUFFIX}"
            if file is None or not self._read(name, file):
                self.held[name] = result = measure()
                if file is not None:
                    self._write(file, result)
        return self.held[name]

    def remove(self) -> None:
        """The folder goes: what it held is in the report."""
        if self.folder is not None:
            self.folder.remove()

    def _read(self, name: str, file: Path) -> bool:
        """Take up what an earlier run measured, if it is there and whole."""
        if not file.exists():
            return False
        try:
            checksum, identity, data = file.read_bytes().split(b"\n", 2)
            if digest_of([identity, data]).encode() != checksum:
                raise DamagedError("it was cut short or changed")
            if identity.decode() != self.identity:
                raise DamagedError("it is of another examination")
            self.held[name] = unpack(safetensors.torch.load(data), self.kinds)
        except (OSError, ValueError, SafetensorError, DamagedError) as error:
            self.say(f"'{file}' cannot be used ({message_of(error)}): measuring again")
            return False
        return True

    def _write(self, file: Path, result: Any) -> None:
        """Keep a measurement. A disk that is full costs the going on, not the examination."""
        identity, data = self.identity.encode(), safetensors.torch.save(pack(result))
        try:
            write_entry(file, b"\n".join([digest_of([identity, data]).encode(), identity, data]))
        except OSError as error:
            self.say(
                f"'{file}' cannot be written ({reason_of(error)}): should this be interrupted, it is measured again"
            )


def _check(file: Path, identity: dict[str, Any], say: Callable[[str], None]) -> None:
    """ConfigError where an identity.json is another's. Each measurement names its examination too, so a damaged one
    costs nothing."""
    if not file.exists():
        return
    try:
        before = read_object(file)
    except CheckpointError as error:
        say(f"{error}: its measurements are checked one by one")
        return
    if different := [key for key in identity if before.get(key) != identity[key]]:
        raise ConfigError(
            f"'{file.parent}' holds an examination with other {', '.join(different)}: remove it, or choose another "
            "--out"
        )
