"""`rpb compare` as a user runs it: its report, training, going on after an interruption, wrong input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import GPT2Config, GPT2LMHeadModel

import rpb_retrofit as rpb
from rpb_retrofit.checkpoint.load import open_causal_lm
from rpb_retrofit.cli.options import count
from rpb_retrofit.comparison import run as comparing
from rpb_retrofit.comparison.measures import Benchmark
from rpb_retrofit.errors import ConfigError
from rpb_retrofit.files.journal import SUFFIX
from rpb_retrofit.training.batches import Rows
from tests.support.command import rpb_command
from tests.support.training_cases import PROSE, VOCAB, small_tokenizer, write_source

BUDGET = ("--target-length", "512", "--lengths", "64,256", "--tokens", "1024", "--items", "1", "--asked", "128,256")
TIMED = ("--timed", "64", "--rounds", "1")
FITTED = ("--calibration-tokens", "512", "--calibration-length", "128")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source with RoPE, one with learned positions, and three texts."""
    folder = tmp_path_factory.mktemp("compare")
    write_source(folder / "source")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder / "learned")
    small_tokenizer().save_pretrained(folder / "learned")
    for number, name in enumerate(("scored", "fitted", "trained")):
        (folder / f"{name}.txt").write_text(PROSE[number * 8000 : (number + 1) * 8000])
    return folder


def compare(monkeypatch: pytest.MonkeyPatch, folder: Path, out: Path, *options: object, source: str = "source") -> int:
    AcceleratorState._reset_state(reset_partial_state=True)
    texts = ("--data", folder / "scored.txt", "--calibration", folder / "fitted.txt")
    return rpb_command(monkeypatch, "compare", folder / source, *texts, *BUDGET, *FITTED, "--out", out, *options)


def test_report(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, file = tmp_path / "out", tmp_path / "found.json"
    constraints = ("--max-slowdown", 1e3, "--must-keep", 1e3, "--train-tokens", "5M")
    card = ("--card", tmp_path / "card.md")
    assert compare(monkeypatch, folder, out, *TIMED, *constraints, *card, "--json", file) == 0
    printed = capsys.readouterr()
    report = json.loads((out / "report.json").read_text())
    assert report == json.loads(file.read_text())
    names = [row["id"] for row in report["rows"]]
    usual = ["source", "linear", "dynamic", "ntk", "yarn", "longrope", "llama3", "alibi", "none", "none-log-n"]
    assert names == [*usual, "t5", "t5-content", "t5-kept", "t5-kept-log"]
    assert list(report["skipped"]) == ["passkey at 128", "interpolated"], "128 tokens hold no question"
    assert report["recommendation"]["choice"] in names and report["headline"] in " ".join(printed.out.split())
    assert report["context"] == 256 and report["target"] == 512 and report["constraints"]["train_tokens"] == 5_000_000
    for row in report["rows"]:
        assert [losses["length"] for losses in row["losses"]] == [64, 256, 512]
        assert row["inside"]["length"] == 256 and row["beyond"]["first"] == 256 and row["broken"] is None
        assert row["speed"][0]["length"] == 64 and row["speed"][0]["prefill_over"] > 0
        assert row["retrieval"] and row["induction"] and row["how"]
        assert row["id"] in printed.out
    assert "<h1" in (out / "report.html").read_text() and not (tmp_path / "out.run").exists()
    assert report["headline"] in (tmp_path / "card.md").read_text()


def test_a_model_in_memory_has_the_figures_of_the_command(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compare(monkeypatch, folder, tmp_path / "out", "--arms", "yarn,t5", "--rounds", "0") == 0
    model, tokenizer = open_causal_lm(str(folder / "source"))
    result = rpb.compare(
        model,
        tokenizer=tokenizer,
        data=[(folder / "scored.txt").read_text()],
        calibration=[(folder / "fitted.txt").read_text()],
        arms=["yarn", "t5"],
        **{"target_length": 512, "lengths": [64, 256], "tokens": 1024, "items": 1, "asked": [128, 256], "rounds": 0},
        **{"calibration_tokens": 512, "calibration_length": 128},
    )
    document = json.loads((tmp_path / "out" / "report.json").read_text())
    for row in (*document["rows"], *result.rows):
        assert row["cost"].pop("calibration_s") >= 0
    assert json.loads(result.as_json())["rows"] == document["rows"] and result.headline == document["headline"]


def test_every_arm_is_trained_on_the_same_tokens(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[list[int]]] = []
    take, opened = Rows.take, Rows.__init__

    def begin(self: Rows, *args: Any) -> None:
        seen.append([])
        opened(self, *args)

    def taken(self: Rows, rows: int, length: int) -> Any:
        some = take(self, rows, length)
        seen[-1] += [part.tolist() for row in some for part in row]
        return some

    monkeypatch.setattr(Rows, "__init__", begin)
    monkeypatch.setattr(Rows, "take", taken)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "{stages: [{train: all, tokens: 100, lengths: {64: 1}}], objective: next-token, batch_tokens: 128, "
        "evaluate_tokens: 256, dropout: false}"
    )
    out = tmp_path / "out"
    options = ("--heal", "512", "--train-data", folder / "trained.txt", "--recipe", recipe, "--rates", "1e-3,3e-3")
    arms = ("--arms", "yarn,t5", "--seeds", "2", "--rounds", "0")
    assert compare(monkeypatch, folder, out, *options, *arms) == 0
    report = json.loads((out / "report.json").read_text())
    rows = {row["id"]: row for row in report["rows"]}
    assert [*rows] == ["source", "yarn", "t5", "source healed", "yarn healed", "t5 healed"]
    each = len(seen) // 3
    assert each == 4, "two rates are tried, then two seeds trained"
    (first, second), *others = [seen[arm * each + 2 : (arm + 1) * each] for arm in range(3)]
    assert others == [[first, second]] * 2, "the same tokens in the same order"
    assert second[: len(first)] == first and len(second) == 2 * len(first), "the second seed goes on behind the first"
    for name in ("source", "yarn", "t5"):
        healed, plain = rows[f"{name} healed"], rows[name]
        assert healed["tokens"] == 512 and healed["rate"] in (1e-3, 3e-3) and healed["seeds"] == 2
        assert healed["inside"]["mean"] < plain["inside"]["mean"] - 0.03, "it learned something"
        assert healed["cost"]["training_s"] > 0
    assert rows["source healed"]["inside"]["above"] is None and rows["t5 healed"]["inside"]["above"]["mean"] is not None


def test_goes_on_after_an_interruption(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arm by arm: what was measured is not measured again, and the result is the same."""
    done: list[str] = []
    measure, timed = Benchmark.measure, comparing.speed

    def measured(self: Benchmark, model: Any, label: str) -> Any:
        if len(done) == stop:
            raise KeyboardInterrupt
        done.append(label)
        return measure(self, model, label)

    def once(*args: Any) -> Any:
        done.append("speed")
        return timed(*args)

    monkeypatch.setattr(Benchmark, "measure", measured)
    monkeypatch.setattr(comparing, "speed", once)
    arms = ("--arms", "ntk,t5-content,none", *TIMED)
    stop = -1
    assert compare(monkeypatch, folder, tmp_path / "whole", *arms) == 0
    whole = list(done)
    assert whole == ["speed", "source", "ntk", "t5-content", "none"]
    done.clear()
    stop = 3
    assert compare(monkeypatch, folder, tmp_path / "out", *arms) == 130
    assert not (tmp_path / "out").exists() and (tmp_path / "out.run").is_dir()
    stop = -1
    assert compare(monkeypatch, folder, tmp_path / "out", *arms) == 0
    assert done == whole
    first, second = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("whole", "out"))
    for before, after in zip(first["rows"], second["rows"], strict=True):
        assert before["losses"] == after["losses"] and before["retrieval"] == after["retrieval"]


def test_arms_that_do_not_apply_are_named_and_the_others_go_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arms = ("--arms", "yarn,interpolated,none,t5", "--rounds", "0")
    assert compare(monkeypatch, folder, out, *arms, source="learned") == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "does not apply" in line] == [
        "yarn does not apply: the source has learned positions, and there is no RoPE to scale"
    ]
    report = json.loads((out / "report.json").read_text())
    rows = {row["id"]: row for row in report["rows"]}
    assert [*rows] == ["source", "interpolated", "none", "t5"] and "yarn" in report["skipped"]
    assert "has a table of 256 positions" in rows["source"]["broken"], "it cannot read the target"
    assert rows["interpolated"]["broken"] is None and rows["t5"]["beyond"]["above"] is None
    assert report["recommendation"]["choice"] in ("interpolated", "none", "t5")


def test_nothing_meets_the_constraints(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--arms", "yarn,none", *TIMED, "--max-slowdown", "0.01")
    assert compare(monkeypatch, folder, tmp_path / "out", *options) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["recommendation"]["choice"] is None
    assert report["headline"].startswith("Nothing meets the constraints") and "max-slowdown 0.01" in report["headline"]


def test_wrong_input(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "short.txt").write_text("too short")
    for options, message in (
        (("--arms", "yran"), "arm 'yran': there is none of that name; did you mean 'yarn'?"),
        (("--arms", "base"), "it takes a number, the base"),
        (("--heal", "5M", "--train-tokens", "1M"), "--heal 5M and --train-tokens 1M contradict each other"),
        (("--heal", "1000"), "--heal needs text to train on"),
        (("--heal", "x"), "--heal x: give a whole number of tokens, such as"),
        (("--heal", "1k", "--train-data", folder / "scored.txt"), "is the --data too"),
        (("--calibration", folder / "scored.txt"), "is the --data too"),
        (("--heal", "1k", "--train-data", folder / "trained.txt", "--rates", "fast"), "--rates fast: give numbers"),
        (("--max-slowdown", "1.05", "--rounds", "0"), "contradict each other: nothing would be timed"),
        (("--max-slowdown", "0"), "--max-slowdown 0.0: give times the source's time, above 0"),
        (("--must-keep", "-1"), "--must-keep -1.0"),
        (("--must-keep", "0.1", "--lengths", "512"), "none lies within the context of 256"),
        (("--target-length", "64k"), "--target-length 65536: the longest document of scored.txt has"),
        (("--target-length", "1.5"), "--target-length 1.5: give a whole number of tokens"),
        (("--data", tmp_path / "short.txt"), "the longest document of short.txt has"),
        (("--retrieval", "passkeys"), "retrieval 'passkeys': no such kind"),
        (("--bos", "maybe"), "--bos maybe"),
        (("--out", tmp_path), "exists already"),
        (("--card", tmp_path / "card.txt"), "its ending is none of .md"),
    ):
        assert compare(monkeypatch, folder, tmp_path / "out", *options) == 2, options
        errors = capsys.readouterr().err.strip().splitlines()
        assert message in errors[-1], (options, errors[-1])
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.run").exists()


@pytest.mark.parametrize(
    ("text", "thousand", "number"),
    [("32k", 1024, 32768), ("5M", 1000, 5_000_000), ("1.5k", 1000, 1500), ("7", 1024, 7)],
)
def test_counts(text: str, thousand: int, number: int) -> None:
    assert count("--some", text, thousand) == number


@pytest.mark.parametrize("text", ["", "k", "-1", "1.5", "nan", "inf", "3x"])
def test_wrong_counts(text: str) -> None:
    with pytest.raises(ConfigError, match="--some"):
        count("--some", text)


def test_a_journal_that_cannot_be_gone_on_with(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Damaged measurements are taken again; with another policy of the BOS token they are of something else."""
    arms = ("--arms", "ntk", *TIMED)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("rpb_retrofit.comparison.result.ComparisonResult.of", interrupt)
        assert compare(patched, folder, tmp_path / "out", *arms) == 130
    files = sorted((tmp_path / "out.run").glob(f"*{SUFFIX}"))
    assert len(files) == 5, "two are made and measured, and both are timed"
    for file in files:
        file.write_bytes(file.read_bytes()[:-9])
    assert compare(monkeypatch, folder, tmp_path / "out", *arms, "--bos", "always") == 2
    assert "holds an examination with other bos" in capsys.readouterr().err
    assert compare(monkeypatch, folder, tmp_path / "out", *arms) == 0
    assert capsys.readouterr().err.count("measuring again") == 5
    assert not (tmp_path / "out.run").exists()
