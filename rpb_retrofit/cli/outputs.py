"""Files that a command writes: whether it can, before hours of work end in them, and that none is one that it reads."""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rpb_retrofit.errors import ConfigError
from rpb_retrofit.files.printable import one_line, printable, reason_of
from rpb_retrofit.files.strict_json import json_text
from rpb_retrofit.files.temporary import REMEDY
from rpb_retrofit.files.whole_file import write_whole

PICTURES = (".png", ".pdf", ".svg")


def check_outputs(
    outputs: Mapping[str, Path | None],
    inputs: Iterable[str | Path | None] = (),
    endings: Mapping[str, tuple[str, ...]] | None = None,
    folder: Path | None = None,
) -> None:
    """ConfigError where a file cannot be written, or where writing it would replace something that the command needs.

    ``outputs`` and the ``endings`` that are allowed go by option. ``inputs``: files and folders that the command reads;
    what is no path on this machine (a hub id) cannot be in the way. ``folder``: where it will write one.
    """
    given = {option: file for option, file in outputs.items() if file is not None}
    for option, file in given.items():
        allowed = (endings or {}).get(option)
        if allowed and file.suffix not in allowed:
            raise ConfigError(f"{option} '{file}': its ending is none of {', '.join(allowed)}")
        try:
            _check_place(option, file)
            _check_no_input(option, file, list(_existing(inputs)))
            with tempfile.TemporaryFile(dir=file.resolve().parent):
                pass
        except (OSError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{option} '{file}' cannot be written: {reason_of(error)}") from error
    places = [(option, file.resolve()) for option, file in given.items()]
    places += [("the folder of results", folder.resolve())] if folder is not None else []
    for number, (option, place) in enumerate(places):
        if clash := next((other for other, elsewhere in places[:number] if elsewhere == place), None):
            raise ConfigError(f"{clash} and {option} are both '{place}': choose two names")


def _check_place(option: str, file: Path) -> None:
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise ConfigError(f"{option} '{file}' is a folder, or lies in none that exists")
    if file.exists() and not file.is_file():
        # What a shell opened for us, and /dev/null, are meant; a pipe by name would have to wait for a reader.
        if not file.is_char_device() and file.absolute().parts[1] not in ("dev", "proc"):
            raise ConfigError(f"{option} '{file}' is neither a file nor a name that is free")
    elif file.exists() and not os.access(file, os.W_OK):
        raise ConfigError(f"{option} '{file}' cannot be written: it is write-protected")


def _existing(inputs: Iterable[str | Path | None]) -> Iterator[Path]:
    for name in inputs:
        if name is None:
            continue
        try:
            path = Path(name).expanduser()
            if path.exists():
                yield path
        except (OSError, ValueError, RuntimeError):  # no path: a name that is too long, an unknown user's home
            continue


def _check_no_input(option: str, file: Path, inputs: Iterable[Path]) -> None:
    if not file.exists():
        return
    whole = file.resolve()
    for known in inputs:
        if known.samefile(file):
            raise ConfigError(f"{option} '{file}' is what the command reads: choose another name")
        if known.is_dir() and whole.is_relative_to(known.resolve()):
            raise ConfigError(f"{option} '{file}' is a file of '{known}', which the command reads: choose another name")


def check_scratch() -> None:
    """ConfigError where nothing can be written to the folder for temporary files, which Python would pass over in
    silence for another."""
    place = os.environ.get("TMPDIR")
    try:
        with tempfile.TemporaryFile(dir=place or tempfile.gettempdir()) as file:
            file.write(b"\0" * 1024)
    except (OSError, ValueError) as error:
        where = f" to '{place}'" if place else ""
        raise ConfigError(f"no temporary files can be written{where} ({reason_of(error)}): {REMEDY}") from error


def say(line: str) -> None:
    """What is going on, apart from the result."""
    print(one_line(line), file=sys.stderr, flush=True)


def show(text: str, result: Any, json_file: Path | None) -> None:
    """Print a result, and write it as JSON where asked, with the command that gave it."""
    print(printable(text))
    if json_file is not None:
        write_json(json_file, {"command": command_line(), **result})


def writable(text: str) -> bool:
    """Whether the standard output's encoding has these characters; else they would come out as escapes."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def command_line() -> str:
    """The command that was given."""
    return shlex.join(["rpb", *sys.argv[1:]])


def write_json(file: Path, result: Any) -> None:
    """A result as JSON, whole or not at all. CheckpointError where it cannot be written."""
    write_whole(file, json_text(result))


def table(header: list[str], rows: list[list[str]]) -> str:
    """Columns of text, numbers to the right."""
    lines = [[one_line(cell) for cell in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    first, *rest = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in lines]
    return "\n".join([first, "-" * len(first), *rest])
