"""Options that several commands share, and how their results are shown."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from rpb_retrofit.errors import ConfigError

Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write what is printed, as JSON.")]
Buckets = Annotated[
    int,
    typer.Option(
        "--buckets", "--relative-attention-num-buckets", metavar="N", help="Scalars per head; T5's default is 32."
    ),
]
MaxDistance = Annotated[
    int,
    typer.Option(
        "--max-distance",
        "--relative-attention-max-distance",
        metavar="N",
        help="Offsets from here on share the last bucket.",
    ),
]


def whole_or_auto(text: str) -> int | Literal["auto"]:
    """An option that is a whole number or ``auto``."""
    if text == "auto":
        return "auto"
    try:
        return int(text)
    except ValueError as error:
        raise typer.BadParameter(f"'{text}' is neither a whole number nor 'auto'") from error


_SUFFIXES = {"k": 1, "m": 2, "g": 3}


def count(option: str, text: str | None, thousand: int = 1000) -> int | None:
    """``5M``, ``32k`` or ``4096`` as a number; None where the option was not given. ConfigError for anything else.

    A length's ``k`` is 1,024 tokens, as contexts are counted; elsewhere it is a ``thousand``.
    """
    if text is None:
        return None
    digits, power = text.strip(), 0
    if digits[-1:].lower() in _SUFFIXES:
        digits, power = digits[:-1], _SUFFIXES[digits[-1].lower()]
    try:
        value = float(digits) * thousand**power
    except ValueError:
        value = -1.0
    if not 0 <= value < 2**63 or value != int(value):
        raise ConfigError(f"{option} {text}: give a whole number of tokens, such as 4096, 32k or 5M")
    return int(value)


AutoBuckets = Annotated[
    Any,
    typer.Option(
        "--buckets",
        "--relative-attention-num-buckets",
        parser=whole_or_auto,
        metavar="N|auto",
        help="Scalars per head; T5's default is 32. auto: number and reach by held-out text.",
    ),
]


def check_writable(option: str, file: Path | None, suffixes: tuple[str, ...] = ()) -> None:
    """ConfigError where a file cannot be written, before hours of work end in it."""
    if file is None:
        return
    if suffixes and file.suffix not in suffixes:
        raise ConfigError(f"{option} '{file}': its ending is none of {', '.join(suffixes)}")
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise ConfigError(f"{option} '{file}' is a folder, or lies in none that exists")


def check_bos(bos: str) -> None:
    """ConfigError for what is no policy of `rpb_retrofit.text.bos_policy`."""
    if bos not in ("auto", "always", "never"):
        raise ConfigError(f"--bos {bos}: choose auto, always or never")


def say(line: str) -> None:
    """What is going on, apart from the result."""
    print(line, file=sys.stderr, flush=True)


def show(text: str, result: Any, json_file: Path | None) -> None:
    """Print a result, and write it as JSON where asked, with the command that gave it."""
    print(text)
    if json_file is not None:
        write_json(json_file, {"command": command_line(), **result})


def command_line() -> str:
    """The command that was given."""
    return shlex.join(["rpb", *sys.argv[1:]])


def write_json(file: Path, result: Any) -> None:
    """A result as JSON."""
    file.write_text(json.dumps(result, indent=2) + "\n")


def table(header: list[str], rows: list[list[str]]) -> str:
    """Columns of text, numbers to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows]]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
