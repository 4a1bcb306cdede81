"""What commands write: never over what they read, and only where it can be written; JSON is strict."""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from rpb_retrofit.cli.outputs import check_scratch
from rpb_retrofit.errors import ConfigError
from rpb_retrofit.files.strict_json import json_text
from tests.support.command import error_line, rpb_command


def state(folder: Path) -> dict[str, str]:
    """Every file and what it holds."""
    return {
        str(file): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not file.is_symlink()
    }


READ = {
    "the data": ("evaluate retrofit --data text.txt --json text.txt", "is what the command reads"),
    "the data, by a hard link": ("evaluate retrofit --data text.txt --json hard.json", "is what the command reads"),
    "the model's config": ("evaluate retrofit --data text.txt --json retrofit/config.json", "is a file of"),
    "the same, by a link": ("evaluate retrofit --data text.txt --json link.json", "is a file of"),
    "the source": ("retrofit source OUT --init zeros --json source/config.json", "is a file of"),
    "the text of calibration": ("retrofit source OUT --calibration text.txt --json text.txt", "is what the command"),
    "a checkpoint's tables": ("retrofit source OUT --init from:retrofit --json retrofit/config.json", "is a file of"),
    "the recipe": ("finetune retrofit OUT --recipe recipe.yaml --json recipe.yaml", "is what the command reads"),
    "what the recipe holds out": ("finetune retrofit OUT --recipe recipe.yaml --json text.txt", "is what the command"),
    "what it trains on": ("finetune retrofit OUT --data text.txt --json text.txt", "is what the command reads"),
    "the teacher": ("finetune retrofit OUT --data text.txt --json source/config.json", "is a file of"),
    "an arm": ("diagnose retrofit --control source --json source/config.json", "is a file of"),
    "the source that a config names": ("diagnose retrofit --json source/config.json", "is a file of"),
    "text as a card": ("compare source --target-length 64 --data notes.md --card notes.md", "is what the command"),
    "an evaluation": ("card retrofit --evaluation text.txt --json text.txt", "is what the command reads"),
    "one name twice": ("compare source --target-length 64 --data text.txt --card a.md --json a.md", "are both"),
    "the folder itself": ("retrofit source OUT --init zeros --json OUT", "are both"),
    "a folder": ("explain --json .", "is a folder, or lies in none"),
    "no folder": ("explain --json nowhere/a.json", "is a folder, or lies in none"),
    "a long name": ("explain --json " + "x" * 5000, "File name too long"),
    "a kernel's folder": ("explain --json /proc/a.json", "cannot be written"),
    "a kernel's folder, drawn": ("explain --plot /proc/a.png", "cannot be written"),
    "a full device": ("explain --json /dev/full", "No space left"),
}


@pytest.mark.parametrize("name", READ)
def test_no_output_replaces_an_input(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    before = state(folder)
    command, message = READ[name]
    assert rpb_command(monkeypatch, *command.split()) == 2
    assert message in error_line(capsys)
    assert state(folder) == before, "nothing changed, nothing left behind"


def test_a_pipe_without_a_reader_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert rpb_command(monkeypatch, "explain", "--json", pipe) == 2
    assert "is neither a file nor a name that is free" in error_line(capsys)
    for command in (
        ["evaluate", folder / "retrofit", "--data", pipe],
        ["evaluate", folder / "retrofit", "--data", "/dev/zero"],
        ["finetune", folder / "retrofit", tmp_path / "out", "--recipe", pipe],
        ["finetune", folder / "retrofit", tmp_path / "out", "--recipe", "/dev/zero"],
    ):
        assert rpb_command(monkeypatch, *command) == 2
        error_line(capsys)
    assert rpb_command(monkeypatch, "explain", "--json", "/dev/null") == 0


def test_json_is_strict(tmp_path: Path) -> None:
    text = json_text({"a": [1.0, math.nan, {"b": -math.inf}], "c": None})
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name)) == {
        "a": [1.0, None, {"b": None}],
        "c": None,
        "not_finite": {"a.1": "nan", "a.2.b": "-inf"},
    }


def test_a_model_of_nan_gives_strict_json(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = LlamaForCausalLM.from_pretrained(folder / "source")
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    for file in (folder / "source").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    model.save_pretrained(tmp_path)
    out = tmp_path / "out.json"
    asked = ["--data", folder / "text.txt", "--lengths", "32", "--tokens", "128", "--json", out]
    status = rpb_command(monkeypatch, "evaluate", tmp_path, *asked)
    if status == 0:
        document = json.loads(out.read_text(), parse_constant=lambda name: pytest.fail(name))
        assert document["lengths"][0]["nll"] is None and document["not_finite"]["lengths.0.nll"] == "nan"
    else:
        assert status == 2 and not out.exists() and "finite" in error_line(capsys)


def test_a_folder_for_temporary_files_that_cannot_be_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for place in ("/proc", "/nowhere", "/dev/null"):
        monkeypatch.setenv("TMPDIR", place)
        with pytest.raises(ConfigError, match=f"no temporary files can be written to '{place}'"):
            check_scratch()
        for command in (
            ["retrofit", folder / "source", tmp_path / "out"],
            ["evaluate", folder / "retrofit"],
            ["finetune", folder / "retrofit", tmp_path / "out"],
        ):
            assert rpb_command(monkeypatch, *command) == 2
            assert "no temporary files can be written" in error_line(capsys)
    assert not (tmp_path / "out").exists()
