"""The command line as tests call it."""

from __future__ import annotations

import sys

import pytest

from rpb_retrofit.cli import main

RPB = [sys.executable, "-c", "from rpb_retrofit.cli import main; main()"]
"""``rpb`` as the beginning of a command for a process of its own."""


def rpb_command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run the command line in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", ["rpb", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command answered wrong input with."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rpb: ")]
    return line


def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must refuse its input; the one line that says why."""
    capsys.readouterr()
    assert rpb_command(monkeypatch, *arguments) == 2
    return error_line(capsys)
