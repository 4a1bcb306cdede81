"""What travels from a source into its retrofit, and what is left behind: no code but this project's, no pickle."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import rpb_retrofit as rpb
from rpb_retrofit.checkpoint.convert import retrofit_checkpoint
from rpb_retrofit.errors import CheckpointError, RetrofitError
from rpb_retrofit.runtime.modeling import RUNTIME_FILES
from tests.families.cases import BY_NAME
from tests.support.command import refusal
from tests.support.sources import edit_config
from tests.support.tiny_models import CONFIG, build

MARK = "code of the source ran"


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, (MARK,)


def arrays() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([Evil()], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def saved() -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": Evil()}, buffer)
    return buffer.getvalue()


def archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a", "a")
    return buffer.getvalue()


BEHIND: dict[str, bytes] = {
    "X.PKL": pickle.dumps(Evil()),
    "weights.BIN": saved(),
    "model.pth.tar": saved(),
    "table.npy": arrays(),
    "notes.txt": pickle.dumps(Evil()),
    "more/oldest": pickle.dumps(Evil(), protocol=0),
    "junk.md": pickle.dumps(Evil()) + b"and more",
    "vocab.dat": saved(),
    "arrays.json": arrays(),
    "all.json": archive(),
    "custom_generate/generate.py": b"print('code of the source ran')",
    "tokenization_own.py": b"print('code of the source ran')",
    "MODELING.PY": b"print('code of the source ran')",
    "lib.so": b"\x7fELF",
    "program": b"\x7fELF",
    "run.sh": b"echo",
}


def test_neither_code_nor_pickles_travel(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content in BEHIND.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(content)
    for name in ("tokenizer_config.json", "preprocessor_config.json"):
        settings = json.loads((source / name).read_text()) if (source / name).exists() else {}
        settings["auto_map"] = {"AutoTokenizer": ["someone/else--tokenization_own.Own", None]}
        (source / name).write_text(json.dumps({**settings, "nested": {"auto_map": {"AutoModel": "own.Own"}}}))
    edit_config(source, auto_map={"AutoConfig": "own.Own"}, custom_pipelines={"x": {"impl": "own.Own"}})
    (source / "modules.json").write_text('[{"path": "", "type": "own.Module"}]')
    done = retrofit_checkpoint(str(source), tmp_path / "out", CONFIG)
    there = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert not there & {*BEHIND, "modules.json"}
    assert {name for name in there if name.endswith(".py")} == set(RUNTIME_FILES)
    notes = "\n".join(done.report.notes)
    assert all(name in notes for name in (*BEHIND, "modules.json", "auto_map of tokenizer_config.json"))
    for file in (tmp_path / "out").glob("*.json"):
        text = file.read_text()
        assert "own.Own" not in text and "custom_pipelines" not in text
    AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(model).__name__ == "RpbLlamaForCausalLM"
    assert MARK not in capsys.readouterr().out


def test_what_holds_no_code_travels_as_it_is(source: Path, tmp_path: Path) -> None:
    files = {
        "spiece.model": b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00",
        "merges.txt": b"#version: 0.2\na b\n",
        "vocab.txt": b"c\nN\n.\n(\n]\n",
        "logo.png": b"\x89PNG\r\n",
        "empty.txt": b"",
        "modules.json": b'[{"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}]',
        "odd.json": b"{",
    }
    for name, content in files.items():
        (source / name).write_bytes(content)
    retrofit_checkpoint(str(source), tmp_path / "out", CONFIG)
    for name, content in files.items():
        assert (tmp_path / "out" / name).read_bytes() == content


def test_links_within_a_hub_cache_are_followed(source: Path, tmp_path: Path) -> None:
    """As huggingface_hub lays a snapshot out: every file a link to a blob of the same repository."""
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(path for path in source.iterdir() if path.is_file()):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / str(number))
    retrofit_checkpoint(str(snapshot), tmp_path / "out", CONFIG)
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    rpb.load(tmp_path / "out")
    AutoTokenizer.from_pretrained(tmp_path / "out")
    (tmp_path / "secret").write_text("mine")
    (snapshot / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"notes.txt is a link to .*secret', outside of the folder"):
        retrofit_checkpoint(str(snapshot), tmp_path / "again", CONFIG)


def test_files_are_for_others_too(source: Path, tmp_path: Path) -> None:
    """Under the usual mask everybody may read all files; under a stricter one nobody else may."""
    for mask, mode in ((0o022, 0o644), (0o077, 0o600)):
        before = os.umask(mask)
        try:
            retrofit_checkpoint(str(source), tmp_path / f"{mask}", CONFIG)
            rpb.load(tmp_path / f"{mask}").save_pretrained(tmp_path / f"{mask}-again")
        finally:
            os.umask(before)
        for folder in (tmp_path / f"{mask}", tmp_path / f"{mask}-again"):
            assert {path.stat().st_mode & 0o777 for path in folder.iterdir() if path.is_file()} == {mode}


@pytest.mark.parametrize("command", ["retrofit", "evaluate", "load", "from"])
@pytest.mark.parametrize("where", ["config", "tokenizer"])
def test_code_is_never_offered(
    where: str,
    command: str,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whoever would answer every question with yes is not asked, and no code of the source runs."""
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question="": asked.append(question) or "y")
    monkeypatch.setattr("transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE", 1)
    for name in ("configuration_own.py", "tokenization_own.py", "modeling_own.py"):
        (source / name).write_text(f"print({MARK!r}, flush=True)\nclass Own: pass\n")
    if where == "config":
        auto = {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
        edit_config(source, model_type="own", auto_map=auto)
    else:
        (source / "tokenizer_config.json").write_text(
            '{"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["tokenization_own.Own", null]}}'
        )
        (source / "tokenizer.json").unlink()
    build(BY_NAME["llama"]).save_pretrained(tmp_path / "other")
    commands: dict[str, list[Any]] = {
        "retrofit": ["retrofit", source, tmp_path / "out"],
        "evaluate": ["evaluate", source, "--lengths", "32"],
        "from": ["retrofit", tmp_path / "other", tmp_path / "out", "--init", f"from:{source}"],
    }
    if command == "load":
        with pytest.raises((ValueError, RetrofitError)):
            rpb.load(source)
    else:
        assert len(refusal(monkeypatch, capsys, *commands[command])) < 1000
    assert not asked and MARK not in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
