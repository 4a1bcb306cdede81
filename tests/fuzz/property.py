"""What holds of every command and every input: done with a right result, or refused in one line."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import resource
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rpb_retrofit.cli import main

HANGS = 60
"""Seconds: some hundred times what a command takes on these models."""

MEMORY = 4 * 2**30
"""Bytes that a command may ask for beside what the process has."""


class Hang(BaseException):
    """A command that does not end."""


def digest(folder: Path) -> dict[str, str]:
    """Every file below a folder, and what it holds."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Little time and memory."""

    def stop(*_: Any) -> None:
        raise Hang

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(HANGS)
    resource.setrlimit(resource.RLIMIT_AS, (own + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run(folder: Path, arguments: Sequence[str], made: Sequence[str] = ()) -> int:
    """Run ``rpb`` in ``folder`` and assert the property; the exit status. ``made``: what it may leave when done."""
    before, argv, place = digest(folder), sys.argv, Path.cwd()
    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["rpb", *arguments]
    os.chdir(folder)
    try:
        with limited(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
        raise AssertionError("main() returned")
    except SystemExit as stop:
        status = int(stop.code or 0)
    finally:
        sys.argv = argv
        os.chdir(place)
    judge(status, out.getvalue(), err.getvalue())
    after = digest(folder)
    kept = {name: content for name, content in after.items() if not name.startswith(tuple(made) if made else "\0")}
    assert kept == before, "an input was changed, or a file left behind"
    if status:
        assert after == before, "what is refused leaves nothing"
    return status


def judge(status: int, out: str, err: str) -> None:
    """Assert that a command was done, or said in one line why not."""
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("rpb: ")]
    assert status in (0, 2), (status, err[-2000:])
    assert "Traceback" not in out + err, err[-4000:]
    assert "\x1b" not in out + "".join(lines)
    assert len(lines) == (1 if status else 0), err[-2000:]
    assert not any("a bug of rpb_retrofit" in line for line in lines), lines


def strict(file: Path) -> Any:
    """A JSON file, which holds neither NaN nor infinity."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{file.name} holds {name}")

    return json.loads(file.read_text(), parse_constant=refuse)
