"""What a command says, whatever it is given: one line for an error, nothing that steers the terminal."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from rpb_retrofit.files.printable import shortened
from tests.support.command import error_line, rpb_command
from tests.support.training_cases import PROSE


def test_tokens_beyond_the_vocabulary(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in (folder / "source").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    model.resize_token_embeddings(300)
    model.save_pretrained(tmp_path)
    for command in (
        ["evaluate", tmp_path, "--lengths", "32"],
        ["compare", tmp_path, "--target-length", "64", "--lengths", "32", "--out", tmp_path / "out"],
        ["diagnose", tmp_path, "--source", tmp_path, "--out", tmp_path / "out"],
    ):
        assert rpb_command(monkeypatch, *command, "--data", folder / "text.txt", "--tokens", "256") == 2
        if command[0] != "diagnose":  # which says before that this is no retrofit
            assert "and the model knows 300 tokens" in error_line(capsys)


def test_text_from_outside_does_not_steer_the_terminal(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "a\x1b[2J\nrpb: all is well\u202e.txt"
    (tmp_path / evil).write_text(PROSE[:6000])
    (tmp_path / "model\x1b[31m\nx").symlink_to(folder / "retrofit")
    asked = ["--data", tmp_path / evil, "--lengths", "32", "--tokens", "128", "--plot", tmp_path / "a.png"]
    assert rpb_command(monkeypatch, "evaluate", tmp_path / "model\x1b[31m\nx", *asked) == 0
    printed = capsys.readouterr()
    assert "\x1b" not in printed.out and "\u202e" not in printed.out
    assert not any(line.startswith("rpb: all is well") for line in printed.out.splitlines())
    (tmp_path / "rows.jsonl").write_text(json.dumps({"\x1b[31mbody\nrpb: fine": 1}) + "\n")
    assert rpb_command(monkeypatch, "evaluate", folder / "retrofit", "--data", tmp_path / "rows.jsonl") == 2
    assert "\x1b" not in (line := error_line(capsys)) and "has no column 'text'" in line


@pytest.mark.parametrize("name", ["$x", r"$\frac$", "a$b$c"])
def test_a_dollar_in_a_name_is_no_formula(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).symlink_to(folder / "retrofit")
    asked = ["--data", folder / "text.txt", "--lengths", "32", "--tokens", "128", "--plot", tmp_path / "a.png"]
    assert rpb_command(monkeypatch, "evaluate", tmp_path / name, *asked) == 0


def test_long_messages_are_shortened() -> None:
    short = shortened("a" * 10_000 + "\n b")
    assert len(short) < 2100 and short.startswith("aaa") and short.endswith("aa b") and "characters left out" in short


def test_an_unforeseen_exception_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("by\x1b[31m zero\nrpb: fine")

    monkeypatch.setattr("rpb_retrofit.cli.explain.explain_map", broken)
    assert rpb_command(monkeypatch, "explain") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("rpb: a bug of rpb_retrofit") and r"ZeroDivisionError: by\x1b[31m zero rpb: fine" in line
    assert "RPB_TRACEBACK=1" in line
    monkeypatch.setenv("RPB_TRACEBACK", "1")
    assert rpb_command(monkeypatch, "explain") == 2
    assert "in broken" in capsys.readouterr().err


def test_ctrl_c_that_a_library_made_an_error_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except KeyboardInterrupt as error:
            raise ImportError("cannot import") from error

    monkeypatch.setattr("rpb_retrofit.cli.explain.explain_map", broken)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background has none
    try:
        assert rpb_command(monkeypatch, "explain") == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("rank", ["1", "0"])
def test_errors_are_said_by_every_process(
    rank: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    assert rpb_command(monkeypatch, "explain", "--query", "1") == 2
    assert capsys.readouterr().err.startswith("rpb: --key is missing")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert rpb_command(monkeypatch, "explain", "--query", "1") == 2
    program = "rpb (process 1)" if rank == "1" else "rpb"
    assert capsys.readouterr().err.startswith(f"{program}: --key is missing")
