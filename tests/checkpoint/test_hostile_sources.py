"""Configs, names and files that no source should have: each is refused in one line, before anything is made of it."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import rpb_retrofit as rpb
from rpb_retrofit.errors import CheckpointError
from tests.support.command import refusal
from tests.support.sources import edit_config


def deep(folder: Path, name: str) -> None:
    (folder / name).write_text("[" * 100_000 + "]" * 100_000)


def pipe(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)


def indexed(folder: Path, name: str) -> None:
    """The weights under another name, in an index."""
    target = folder / name
    if not target.exists():
        (folder / "model.safetensors").rename(target)
    (folder / "model.safetensors").unlink(missing_ok=True)
    names = load_file(target) if name.endswith(".safetensors") else ["a"]
    index = {"weight_map": dict.fromkeys(names, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def outside(folder: Path, name: str) -> None:
    """A file moved out of the folder, with a link in its place."""
    target = folder.parent / f"{folder.name}.moved"
    (folder / name).rename(target)
    (folder / name).symlink_to(target)


def unreadable_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("[]")


@pytest.mark.parametrize(
    ("damage", "answer"),
    [
        (lambda s: edit_config(s, rope_parameters={"rope_type": "banana", "rope_theta": 1e4}), "banana"),
        (lambda s: edit_config(s, hidden_act="banana"), "banana"),
        (lambda s: edit_config(s, num_attention_heads=0), "num_attention_heads=0"),
        (lambda s: edit_config(s, num_attention_heads=-4), "num_attention_heads=-4"),
        (lambda s: edit_config(s, num_attention_heads="four"), "num_attention_heads='four'"),
        (lambda s: edit_config(s, num_attention_heads=3), "number of attention heads (3)"),
        (lambda s: edit_config(s, num_key_value_heads=3), "has shape"),
        (lambda s: edit_config(s, num_hidden_layers=10**12), "num_hidden_layers=1000000000000"),
        (lambda s: edit_config(s, hidden_size=10**30), "hidden_size=1000000000000000000000000000000"),
        (lambda s: edit_config(s, vocab_size=10**12), "has shape"),
        (lambda s: edit_config(s, max_position_embeddings=-5), "max_position_embeddings=-5"),
        (lambda s: edit_config(s, max_position_embeddings=1.5), "max_position_embeddings=1.5"),
        (lambda s: edit_config(s, transformers_weights="other.safetensors"), "transformers_weights"),
        (lambda s: deep(s, "config.json"), "is nested too deeply"),
        (lambda s: (deep(s, "model.safetensors.index.json"), (s / "model.safetensors").unlink()), "nested too deeply"),
        (lambda s: (s / "config.json").write_bytes(b"\xff\xfe"), "is not JSON"),
        (lambda s: pipe(s, "config.json"), "config.json is a pipe"),
        (lambda s: pipe(s, "model.safetensors"), "model.safetensors is a pipe"),
        (lambda s: pipe(s, "tokenizer.json"), "tokenizer.json is a pipe"),
        (lambda s: outside(s, "config.json"), "config.json is a link to"),
        (lambda s: outside(s, "model.safetensors"), "model.safetensors is a link to"),
        (lambda s: outside(s, "tokenizer.json"), "tokenizer.json is a link to"),
        (lambda s: (s / "more").symlink_to("/etc"), "more is a link to '/etc'"),
        (lambda s: (s / "notes.txt").symlink_to("nowhere"), "notes.txt is a link to nothing"),
        (lambda s: indexed(s, "../x.safetensors"), "names '../x.safetensors'"),
        (lambda s: indexed(s, str(s.parent / "x.safetensors")), "x.safetensors', which is no safetensors file of this"),
        (lambda s: indexed(s, "x.bin"), "names 'x.bin', which is no safetensors file"),
        (lambda s: (s / "shard-00000-model-00000-of-00001.safetensors").touch(), "holds a distributed checkpoint"),
        (lambda s: (s / "loop").symlink_to("loop"), "cannot be read"),
        (lambda s: (s / "generation_config.json").write_text("[1]"), "generation_config.json"),
        (lambda s: (s / "generation_config.json").write_text("[" * 100_000), "generation_config.json"),
        (lambda s: edit_config(s, dtype="banana"), "banana"),
        (lambda s: (s / "model.safetensors").rename(s / "PYTORCH_MODEL.BIN"), "as pickle only (PYTORCH_MODEL.BIN)"),
    ],
)
@pytest.mark.parametrize("command", ["retrofit", "evaluate"])
def test_a_source_that_cannot_be_used(
    damage: Callable[[Path], object],
    answer: str,
    command: str,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(source)
    before = sorted(path.name for path in tmp_path.iterdir())
    more: list[object] = [tmp_path / "out", "--init", "zeros"] if command == "retrofit" else ["--lengths", "32"]
    assert answer in refusal(monkeypatch, capsys, command, source, *more)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("content", "file"),
    [
        ("[]", "tokenizer.json"),
        ("[" * 100_000, "tokenizer.json"),
        ('{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}', "tokenizer.json"),
        ("[1]", "tokenizer_config.json"),
        ("[" * 100_000, "tokenizer_config.json"),
        ('{"tokenizer_class": 5}', "tokenizer_config.json"),
    ],
)
def test_odd_tokenizer_files(
    content: str,
    file: str,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (source / file).write_text(content)
    for arguments in (("retrofit", source, tmp_path / "out"), ("evaluate", source)):
        assert "no tokenizer that Transformers can read" in refusal(monkeypatch, capsys, *arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("x" * 5000, "(5000 characters)"),
        ("./" + "x" * 5000, "(5000 characters)"),
        ("x" * 5000 + ".gguf", "(5005 characters)"),
        ("~nosuchuser/model", "'~nosuchuser/model': no such user"),
        ("~nosuchuser/model.gguf", "'~nosuchuser/model.gguf': no such user"),
        ("a\0b", "no such"),
    ],
    ids=lambda value: value[:12],
)
def test_names_of_no_source(
    name: str,
    answer: str,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for arguments in (
        ("retrofit", name, tmp_path / "out", "--init", "zeros"),
        ("retrofit", source, tmp_path / "out", "--init", f"from:{name}"),
        ("evaluate", name),
    ):
        if arguments[-1] != f"from:{name}" or not name.endswith(".gguf"):
            message = refusal(monkeypatch, capsys, *arguments)
            assert answer in message and len(message) < 1000
    assert "no such user" in refusal(monkeypatch, capsys, "retrofit", source, "~nosuchuser/out", "--init", "zeros")
    with pytest.raises(CheckpointError):
        rpb.load(name if len(name) > 20 else "~nosuchuser")


@pytest.mark.parametrize("hidden", ["source", "more"])
def test_a_folder_that_may_not_be_read(
    hidden: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The system's refusal is played, since a test that runs as root may read everything."""
    (source / "more").mkdir()

    def refusing(real: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def listing(path: Any = ".") -> Any:
            if Path(path).name == hidden:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return real(path)

        return listing

    for name in ("listdir", "scandir"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))
    for arguments in (("retrofit", source, tmp_path / "out", "--init", "zeros"), ("evaluate", source)):
        assert f"{hidden}' cannot be read: Permission denied" in refusal(monkeypatch, capsys, *arguments)
