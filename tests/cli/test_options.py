"""Options: numbers that mean nothing, and options that would lose to others, are refused before anything is loaded."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.support.command import error_line, rpb_command

MEANINGLESS = {
    "compare": [
        ("--rates", "nan", "is no learning rate"),
        ("--rates", "1e-3,inf", "is no learning rate"),
        ("--rates", "-1", "is no learning rate"),
        ("--target-length", "0", "--target-length 0: at least 2"),
        ("--target-length", "nan", "give a whole number of tokens"),
        ("--tokens", "0", "--tokens 0: at least 1"),
        ("--heal", "0", "--heal 0: at least 1"),
        ("--max-slowdown", "nan", "--max-slowdown nan"),
        ("--must-keep", "inf", "--must-keep inf"),
        ("--calibration-length", "8", "--calibration-length 8: at least 32"),
        ("--calibration-tokens", "0", "--calibration-tokens 0: at least 1"),
        ("--seed", str(2**70), "--seed"),
        ("--seed", "-1", "--seed"),
        ("--seed", "9" * 5000, "--seed"),
        ("--asked", "1", "--asked 1: '1' is not a length"),
        ("--timed", "9" * 5000, "is not a length"),
    ],
    "diagnose": [
        ("--tokens", "-5", "--tokens -5"),
        ("--probed", "nan", "--probed nan"),
        ("--lengths", "9" * 5000, "is not a length"),
        ("--fail-on-regression", "nan", "--fail-on-regression nan"),
        ("--fail-on-regression", "inf", "--fail-on-regression inf"),
        ("--seed", str(2**70), "--seed"),
    ],
    "evaluate": [
        ("--tokens", "-5", "--tokens -5"),
        ("--tokens", "0", "--tokens 0: at least 2"),
        ("--stride", "-1", "--stride -1"),
        ("--lengths", "9" * 5000, "is not a length"),
        ("--depths", "nan", "--depths nan"),
        ("--speed", "-1", "--speed"),
    ],
    "retrofit": [
        ("--seed", str(2**70), "--seed"),
        ("--calibration-tokens", "-1", "--calibration-tokens -1"),
        ("--buckets", "9" * 5000, "--buckets"),
        ("--keep-frequencies", "9" * 5000, "--keep-frequencies"),
    ],
    "finetune": [
        ("--set", "seed=" + "9" * 5000, "--set seed=9"),
        ("--set", "seed=0x" + "f" * 5000, "a number beyond 64 bits"),
        ("--set", "stages.0.rate=.nan", "stages.0.rate=nan"),
        ("--set", "stages.0.tokens=-4k", "stages.0.tokens='-4k'"),
        ("--set", "stages.0.lengths={64: .inf}", "stages.0.lengths.64=inf"),
    ],
}


@pytest.mark.parametrize(
    ("command", "option", "value", "message"),
    [(command, *row) for command, rows in MEANINGLESS.items() for row in rows],
    ids=lambda value: value[:24],
)
def test_numbers_that_mean_nothing(
    command: str,
    option: str,
    value: str,
    message: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = [folder / "retrofit"]
    options = {
        "compare": ["--out", tmp_path / "out"],
        "diagnose": ["--out", tmp_path / "out"],
        "retrofit": [tmp_path / "out"],
        "finetune": [tmp_path / "out"],
    }.get(command, [])  # fmt: skip
    if option == "--rates":
        options += ["--heal", "1k", "--train-data", "x.txt"]
    start = time.monotonic()
    assert rpb_command(monkeypatch, command, *places, *options, option, value) == 2
    line = error_line(capsys)
    assert message in line and len(line) < 2200
    assert time.monotonic() - start < 20, "found before anything is loaded"
    assert not any(tmp_path.iterdir())


LOSING = {
    "data beside the recipe's": (
        "finetune retrofit OUT --data text.txt --set data=[{name:b.txt}]",
        "both say what to train on",
    ),
    "a part of the recipe's data": ("finetune retrofit OUT --data text.txt --set data.0.weight=2", "both say what"),
    "a key twice": ("finetune retrofit OUT --set seed=1 --set seed=2", "an earlier --set seed=... would be lost"),
    "a key and its whole": (
        "finetune retrofit OUT --set stages.0.tokens=10 --set stages=[{tokens:10}]",
        "an earlier --set stages.0.tokens=... would be lost",
    ),
    "depths of nothing": ("evaluate retrofit --depths 0", "--depths would go unused"),
    "items of nothing": ("evaluate retrofit --items 3", "--items would go unused"),
    "rates of no training": ("compare source --target-length 64 --rates 1e-3", "--rates would go unused"),
    "text of no training": ("compare source --target-length 64 --train-data text.txt", "--train-data would go unused"),
    "a recipe of no training": ("compare source --target-length 64 --recipe recipe.yaml", "--recipe would go unused"),
    "lengths of no timing": ("compare source --target-length 64 --timed 32 --rounds 0", "--timed would go unused"),
    "lengths of no questions": ("compare source --target-length 64 --asked 32 --items 0", "--asked would go unused"),
    "a report of a part": ("diagnose retrofit --only off_by_one --out d", "--out would go unused"),
    "a window of no text": ("retrofit source OUT --init zeros --calibration-length 64", "--calibration-length would"),
    "a reach that is chosen": (
        "retrofit source OUT --buckets auto --max-distance 64",
        "--max-distance would go unused",
    ),
    "a direction of a pair": ("explain --query 1 --key 2 --bidirectional", "--bidirectional"),
}


@pytest.mark.parametrize("name", LOSING)
def test_no_option_loses_silently(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    command, message = LOSING[name]
    assert rpb_command(monkeypatch, *command.split()) == 2
    assert message in error_line(capsys)
    assert not (folder / "OUT").exists()


def test_an_option_given_twice_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert rpb_command(monkeypatch, "explain", "--buckets", 8, "--buckets", 16) == 0
    printed = capsys.readouterr()
    assert "16 buckets" in printed.out
    assert printed.err == "note: --buckets is given 2 times: the last one counts, 16\n"
