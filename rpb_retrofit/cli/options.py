"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, overload

import typer

from rpb_retrofit.config import parse_count
from rpb_retrofit.errors import ConfigError
from rpb_retrofit.frequencies import KeepFrequencies

Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write what is printed, as JSON.")]
NewFolder = Annotated[Path, typer.Argument(help="A folder that does not exist yet.", metavar="OUT")]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**31 - 1, help="Of whatever is drawn.")]
CalibrationTokens = Annotated[str, typer.Option(metavar="N", help="Tokens of it that are read.")]
Bos = Annotated[str, typer.Option(help="Begin every window with the BOS token: auto, always or never.")]
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


def frequencies(value: int | str) -> int | str:
    """An option that says what ``keep_frequencies`` takes; its default comes as the number that it is."""
    try:
        KeepFrequencies.of(value)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error
    return int(value) if str(value).isdecimal() else value


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


@overload
def count(option: str, text: str, thousand: int = 1000, least: int = 1) -> int: ...
@overload
def count(option: str, text: None, thousand: int = 1000, least: int = 1) -> None: ...
@overload
def count(option: str, text: str | None, thousand: int = 1000, least: int = 1) -> int | None: ...
def count(option: str, text: str | None, thousand: int = 1000, least: int = 1) -> int | None:
    """An option that counts tokens, as `parse_count` reads it; None where it was not given.

    A length's ``k`` is 1,024 tokens, as contexts are counted; elsewhere it is a ``thousand``. ConfigError for what is
    no count, or less than ``least``.
    """
    if text is None:
        return None
    number = parse_count(text, thousand)
    if number is None:
        raise ConfigError(f"{option} {text}: give a whole number of tokens, such as 4096, 32k or 5M")
    if number < least:
        raise ConfigError(f"{option} {text}: at least {least}")
    return number


def unused(context: typer.Context, options: Iterable[str], why: str) -> None:
    """ConfigError where one of these options (by the names of their variables) was given, and nothing reads it."""
    for name in options:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise ConfigError(f"--{name.replace('_', '-')} would go unused: {why}; leave one of the two out")
