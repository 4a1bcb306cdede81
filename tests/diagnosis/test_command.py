"""`rpb diagnose` as a user runs it: its report, going on after an interruption, its exit status, wrong input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from rpb_retrofit.diagnosis import factorial, loss_measurements, report_data, task_measurements
from rpb_retrofit.diagnosis import measurements as measurements_module
from rpb_retrofit.files.journal import SUFFIX, Journal
from tests.support.command import rpb_command
from tests.support.training_cases import small_tokenizer, write_source

BUDGET = ("--lengths", "32,96", "--tokens", "768", "--probed", "192", "--items", "1", "--rounds", "1")


def diagnose(monkeypatch: pytest.MonkeyPatch, checkpoints: Path, *options: object, retrofit: str = "retrofit") -> int:
    return rpb_command(
        monkeypatch, "diagnose", checkpoints / retrofit, "--data", checkpoints / "text.txt", *BUDGET, *options
    )


def test_report(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, file = tmp_path / "out", tmp_path / "found.json"
    assert diagnose(monkeypatch, checkpoints, "--out", out, "--json", file) == 0
    printed = capsys.readouterr()
    document = json.loads((out / "report.json").read_text())
    assert document == json.loads(file.read_text())
    assert document["arms"] == {"source": str(checkpoints / "source"), "retrofit": str(checkpoints / "retrofit")}
    assert document["headline"] in " ".join(printed.out.split()) and "[1/" in printed.err
    assert document["command"].startswith("rpb diagnose") and not (tmp_path / "out.run").exists()
    assert "<h1" in (out / "report.html").read_text()
    assert not [h["name"] for h in document["hypotheses"] if h["finding"]["failed"]]
    assert {row["kind"] for row in document["figures"]["retrieval"]["questions"]} or document["skipped"]


MEASURES = [
    *((measurements_module, name) for name in ("position_probe", "consistency", "fidelity", "attention_patterns")),
    *[(measurements_module, "speed"), (loss_measurements, "token_by_token"), (task_measurements, "measure")],
]
"""What takes a measurement, by the module that asks for it."""


def test_goes_on_after_an_interruption(checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    for module, name in MEASURES:
        real = getattr(module, name)

        def counted(*args: Any, name: str = name, real: Any = real, **kwargs: Any) -> Any:
            if len(taken) == stop:
                raise KeyboardInterrupt
            taken.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)
    stop = -1
    assert diagnose(monkeypatch, checkpoints, "--out", tmp_path / "whole") == 0
    whole = list(taken)
    taken.clear()
    stop = len(whole) // 2
    assert diagnose(monkeypatch, checkpoints, "--out", tmp_path / "out") == 130
    assert not (tmp_path / "out").exists() and (tmp_path / "out.run").is_dir()
    assert taken == whole[:stop]
    stop = -1
    assert diagnose(monkeypatch, checkpoints, "--out", tmp_path / "out") == 0
    assert taken == whole, "nothing was measured twice"
    first, second = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("whole", "out"))
    assert first["hypotheses"] == second["hypotheses"]
    assert first["figures"]["loss"] == second["figures"]["loss"]


def test_another_examination_is_not_mixed_in(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Journal.open(tmp_path / "out.run", {"arms": {"retrofit": "another"}}, "rpb diagnose", ()) as journal:
        journal("one", lambda: 1)
    assert diagnose(monkeypatch, checkpoints, "--out", tmp_path / "out") == 2
    assert "holds an examination with other arms" in capsys.readouterr().err
    assert (tmp_path / "out.run" / f"one{SUFFIX}").exists()


def interrupted(monkeypatch: pytest.MonkeyPatch, checkpoints: Path, out: Path) -> Path:
    """An examination that was interrupted before its report; its journal."""
    with monkeypatch.context() as patched:
        patched.setattr("rpb_retrofit.diagnosis.run.all_figures", _interrupt)
        assert diagnose(patched, checkpoints, "--out", out) == 130
    return out.with_name(f"{out.name}.run")


def _interrupt(measurements: Any) -> None:
    raise KeyboardInterrupt


def test_a_retrofit_that_was_replaced_meanwhile(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its figures are not those that were measured of the one before."""
    journal = interrupted(monkeypatch, checkpoints, tmp_path / "out")
    before = sorted(file.name for file in journal.iterdir())
    kept = {shard: shard.read_bytes() for shard in (checkpoints / "retrofit").glob("*.safetensors")}
    for shard in kept:
        tensors = load_file(shard)
        save_file({n: t + ("bias.w" in n) for n, t in tensors.items()}, shard, metadata={"format": "pt"})
    status = diagnose(monkeypatch, checkpoints, "--out", tmp_path / "out")
    for shard, data in kept.items():
        shard.write_bytes(data)
    assert status == 2 and "holds an examination with other weights" in capsys.readouterr().err
    assert sorted(file.name for file in journal.iterdir()) == before


def test_a_damaged_journal_is_measured_again(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what comes out is what would have come out."""
    assert diagnose(monkeypatch, checkpoints, "--out", tmp_path / "whole") == 0
    journal = interrupted(monkeypatch, checkpoints, tmp_path / "out")
    for file in journal.glob(f"*{SUFFIX}"):
        file.write_bytes(file.read_bytes()[:-20])
    (journal / "identity.json").write_text("{")
    capsys.readouterr()
    assert diagnose(monkeypatch, checkpoints, "--out", tmp_path / "out") == 0
    message = capsys.readouterr().err
    assert "cut short or changed): measuring again" in message and "identity.json' is not JSON" in message
    first, second = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("whole", "out"))
    assert first["hypotheses"] == second["hypotheses"] and not second["failed"]


def test_a_probe_that_fails(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Is named first, in print and on the page, and is no success where CI asks."""

    def broken(*_: Any) -> None:
        raise ValueError("the probe\nbroke")

    monkeypatch.setattr(measurements_module, "consistency", broken)
    assert diagnose(monkeypatch, checkpoints, "--out", tmp_path / "plain") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "measuring cached_decoding failed, so this says nothing of it: ValueError: the probe broke" in printed
    assert printed.index("measuring cached_decoding failed") < printed.index("hypothesis")
    document = json.loads((tmp_path / "plain" / "report.json").read_text())
    assert document["failed"]["cached_decoding"] == "ValueError: the probe broke"
    page = (tmp_path / "plain" / "report.html").read_text()
    first_screen = page[: page.index('id="repeat"')]
    assert "Probes that failed" in first_screen and first_screen.count("ValueError: the probe broke") >= 1
    status = diagnose(monkeypatch, checkpoints, "--out", tmp_path / "asked", "--fail-on-regression", 1e3)
    assert status == 1 and "not measured: cached_decoding: ValueError" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("module", "name", "what", "status"),
    [
        (factorial, "_cross", "the crossing of method and length factor", 0),
        (report_data, "speed_figures", "the figures of speed", 0),
        (report_data, "loss_figures", "the figures of loss", 1),
    ],
    ids=lambda x: x if isinstance(x, str) and x.startswith("the") else "",
)
def test_figures_that_fail(
    module: Any,
    name: str,
    what: str,
    status: int,
    checkpoints: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Cost nothing but themselves: the report is there, names them first, and CI is told where it needed them."""

    def broken(*_: Any) -> None:
        raise AttributeError("no such thing")

    monkeypatch.setattr(module, name, broken)
    assert diagnose(monkeypatch, checkpoints, "--out", tmp_path / "out", "--fail-on-regression", 1e3) == status
    assert f"measuring {what} failed" in " ".join(capsys.readouterr().out.split())
    document = json.loads((tmp_path / "out" / "report.json").read_text())
    assert document["failed"][what] == "AttributeError: no such thing" and document["hypotheses"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"{what}: AttributeError" in page[: page.index('id="repeat"')]


def test_a_length_that_was_not_measured(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--lengths", "32,96,4096")
    assert diagnose(monkeypatch, checkpoints, "--out", tmp_path / "out", *options) == 0
    status = diagnose(monkeypatch, checkpoints, "--out", tmp_path / "asked", *options, "--fail-on-regression", 1e3)
    message = capsys.readouterr().out
    assert status == 1 and "not measured: the loss above the source at 4096 tokens: the text's longest" in message


@pytest.mark.parametrize(("retrofit", "cause"), [("dropped", "tables_not_loaded"), ("nan", "not_finite")])
def test_broken_checkpoints(
    retrofit: str, cause: str, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = diagnose(
        monkeypatch, checkpoints, "--out", tmp_path / "out", "--fail-on-regression", 1e3, retrofit=retrofit
    )
    document = json.loads((tmp_path / "out" / "report.json").read_text())
    assert document["causes"][0] == cause
    assert status == (1 if cause == "not_finite" else 0)


def test_fail_on_regression(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert diagnose(monkeypatch, checkpoints, "--out", tmp_path / "out", "--fail-on-regression", 1e-7) == 1
    message = capsys.readouterr().out
    document = json.loads((tmp_path / "out" / "report.json").read_text())
    worse = [c for c in document["figures"]["loss"]["costs"] if c["mean"] > 1e-7]
    assert message.count("regression: ") == len(worse) > 0
    assert "could see differences of" in message


def test_only(checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "one.json"
    monkeypatch.chdir(tmp_path)
    assert diagnose(monkeypatch, checkpoints, "--only", "off_by_one, precision", "--json", file) == 0
    assert [h["name"] for h in json.loads(file.read_text())["hypotheses"]] == ["off_by_one", "precision"]
    assert not (tmp_path / "diagnosis").exists() and not (tmp_path / "diagnosis.run").exists()


def test_wrong_input(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_source(tmp_path / "other")
    tokenizer = small_tokenizer()
    tokenizer.add_tokens(["the"])
    tokenizer.save_pretrained(other)
    (tmp_path / "short.txt").write_text("too short")
    for options, message in (
        (("--only", "nonsense"), "--only nonsense: no such hypothesis; choose from"),
        (("--lengths", "1"), "'1' is not a length"),
        (("--items", "-1"), "--items -1: at least 0"),
        (("--bos", "maybe"), "--bos maybe"),
        (("--fail-on-regression", "-1"), "--fail-on-regression -1.0"),
        (("--fail-on-regression", "1", "--only", "precision"), "contradict each other: no loss would be measured"),
        (("--source", checkpoints / "retrofit"), "is a retrofit: give the plain model"),
        (("--source", other), "reads the text as other tokens"),
        (("--data", tmp_path / "short.txt"), "longest document has"),
        (("--out", tmp_path), "exists already"),
    ):
        assert diagnose(monkeypatch, checkpoints, "--out", tmp_path / "out", *options) == 2, options
        errors = capsys.readouterr().err.strip().splitlines()
        assert message in errors[-1], (options, errors[-1])
    assert not (tmp_path / "out").exists()
