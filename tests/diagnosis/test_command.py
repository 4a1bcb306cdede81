"""`rpb diagnose` as a user runs it: its report, going on after an interruption, its exit status, wrong input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from rpb_retrofit.diagnosis import exam
from tests.test_checkpoint import rpb_command
from tests.training_cases import PROSE, small_tokenizer, write_retrofit, write_source

BUDGET = ("--lengths", "32,96", "--tokens", "768", "--probed", "192", "--items", "1", "--rounds", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source, its retrofit, a text, and a retrofit that is broken."""
    folder = tmp_path_factory.mktemp("diagnose")
    source = write_source(folder / "source")
    (folder / "text.txt").write_text(PROSE[:8000])
    retrofit = write_retrofit(source, folder / "retrofit", relative_attention_num_buckets=16)
    for name, spoil in (("dropped", 0.0), ("nan", float("nan"))):
        (folder / name).mkdir()
        for file in retrofit.iterdir():
            if file.is_file():
                (folder / name / file.name).write_bytes(file.read_bytes())
        for shard in (folder / name).glob("*.safetensors"):
            tensors = load_file(shard)
            for key in tensors:
                if "relative_attention_bias" in key:
                    tensors[key] = tensors[key] * spoil
            save_file(tensors, shard, metadata={"format": "pt"})
    return folder


def diagnose(monkeypatch: pytest.MonkeyPatch, folder: Path, *options: object, retrofit: str = "retrofit") -> int:
    return rpb_command(monkeypatch, "diagnose", folder / retrofit, "--data", folder / "text.txt", *BUDGET, *options)


def test_report(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, file = tmp_path / "out", tmp_path / "found.json"
    assert diagnose(monkeypatch, folder, "--out", out, "--json", file) == 0
    printed = capsys.readouterr()
    found = json.loads((out / "report.json").read_text())
    assert found == json.loads(file.read_text())
    assert found["arms"] == {"source": str(folder / "source"), "retrofit": str(folder / "retrofit")}
    assert found["headline"] in " ".join(printed.out.split()) and "[1/" in printed.err
    assert found["command"].startswith("rpb diagnose") and not (tmp_path / "out.run").exists()
    assert "<h1" in (out / "report.html").read_text()
    assert not [h["name"] for h in found["hypotheses"] if h["finding"]["failed"]]
    assert {row["kind"] for row in found["figures"]["retrieval"]["questions"]} or found["skipped"]


def test_goes_on_after_an_interruption(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    for name in ("still_life", "consistency", "fidelity", "gaze", "token_by_token", "measure", "speed"):
        real = getattr(exam, name)

        def counted(*args: Any, name: str = name, real: Any = real, **kwargs: Any) -> Any:
            if len(taken) == stop:
                raise KeyboardInterrupt
            taken.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(exam, name, counted)
    stop = -1
    assert diagnose(monkeypatch, folder, "--out", tmp_path / "whole") == 0
    whole = list(taken)
    taken.clear()
    stop = len(whole) // 2
    assert diagnose(monkeypatch, folder, "--out", tmp_path / "out") == 130
    assert not (tmp_path / "out").exists() and (tmp_path / "out.run").is_dir()
    assert taken == whole[:stop]
    stop = -1
    assert diagnose(monkeypatch, folder, "--out", tmp_path / "out") == 0
    assert taken == whole, "nothing was measured twice"
    first, second = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("whole", "out"))
    assert first["hypotheses"] == second["hypotheses"]
    assert first["figures"]["loss"] == second["figures"]["loss"]


def test_another_examination_is_not_mixed_in(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "out.run"
    run.mkdir()
    (run / "identity.json").write_text(json.dumps({"arms": {"retrofit": "another"}}))
    assert diagnose(monkeypatch, folder, "--out", tmp_path / "out") == 2
    assert "holds an examination with other arms" in capsys.readouterr().err


@pytest.mark.parametrize(("retrofit", "cause"), [("dropped", "tables_not_loaded"), ("nan", "not_finite")])
def test_broken_checkpoints(
    retrofit: str, cause: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = diagnose(monkeypatch, folder, "--out", tmp_path / "out", "--fail-on-regression", 1e3, retrofit=retrofit)
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert found["causes"][0] == cause
    assert status == (1 if cause == "not_finite" else 0)


def test_fail_on_regression(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert diagnose(monkeypatch, folder, "--out", tmp_path / "out", "--fail-on-regression", 1e-7) == 1
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    worse = [c for c in found["figures"]["loss"]["costs"] if c["mean"] > 1e-7]
    assert said.count("regression: ") == len(worse) > 0
    assert "could see differences of" in said


def test_only(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "one.json"
    monkeypatch.chdir(tmp_path)
    assert diagnose(monkeypatch, folder, "--only", "off_by_one, precision", "--json", file) == 0
    assert [h["name"] for h in json.loads(file.read_text())["hypotheses"]] == ["off_by_one", "precision"]
    assert not (tmp_path / "diagnosis").exists() and not (tmp_path / "diagnosis.run").exists()


def test_wrong_input(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_source(tmp_path / "other")
    tokenizer = small_tokenizer()
    tokenizer.add_tokens(["the"])
    tokenizer.save_pretrained(other)
    (tmp_path / "short.txt").write_text("too short")
    for options, said in (
        (("--only", "nonsense"), "--only nonsense: no such hypothesis; choose from"),
        (("--lengths", "1"), "'1' is not a length"),
        (("--items", "-1"), "--items -1: at least 0"),
        (("--bos", "maybe"), "--bos maybe"),
        (("--fail-on-regression", "-1"), "--fail-on-regression -1.0"),
        (("--source", folder / "retrofit"), "is a retrofit: give the plain model"),
        (("--source", other), "reads the text as other tokens"),
        (("--data", tmp_path / "short.txt"), "longest document has"),
        (("--out", tmp_path), "exists already"),
    ):
        assert diagnose(monkeypatch, folder, "--out", tmp_path / "out", *options) == 2, options
        errors = capsys.readouterr().err.strip().splitlines()
        assert said in errors[-1], (options, errors[-1])
    assert not (tmp_path / "out").exists()
