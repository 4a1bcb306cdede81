"""The three standard streams: there, able to take any character, and nothing in what is said that steers a terminal."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TextIO

from rpb_retrofit.files.printable import shortened

STREAMS = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))


def open_all() -> None:
    """Give a process whose streams were closed (``2>&-``) some that lead nowhere.

    Without that the next file it opens, a shard, a socket, gets the number of the closed one, and whatever a library
    writes to its standard error goes in there. What an encoding such as ASCII cannot take is written with backslashes.
    """
    for number, (name, mode) in enumerate(STREAMS):
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def say(message: str) -> None:
    """One line on the standard error, whatever the message quotes.

    Every process of a launcher says what stopped it, and which it is: what goes wrong on one only is not to be guessed.
    """
    rank = os.environ.get("RANK", "0")
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    speaker = f"rpb (process {rank})" if several and rank != "0" else "rpb"
    with contextlib.suppress(OSError, ValueError):  # the standard error itself may be closed, or its disk full
        print(f"{speaker}: {shortened(message)}", file=sys.stderr, flush=True)


def end(stream: TextIO) -> Exception | None:
    """Write out what a stream still holds; why that failed, if it did. Then nothing more goes to it."""
    try:
        stream.flush()
    except (OSError, ValueError) as error:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # or Python would try again as it ends
        return error
    return None
