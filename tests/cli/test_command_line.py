"""The command line as a whole: what it writes, what it refuses, and how it ends, whatever it is given."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from rpb_retrofit.cli import standard_streams
from rpb_retrofit.cli.outputs import check_scratch
from rpb_retrofit.errors import ConfigError
from rpb_retrofit.files.printable import shortened
from rpb_retrofit.files.strict_json import json_text
from rpb_retrofit.training.recipe import read_recipe
from tests.support.command import RPB, rpb_command
from tests.support.training_cases import PROSE, write_retrofit, write_source


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source, its retrofit, a text and a recipe."""
    folder = tmp_path_factory.mktemp("command")
    write_retrofit(write_source(folder / "source"), folder / "retrofit")
    (folder / "text.txt").write_text(PROSE[:6000])
    (folder / "notes.md").write_text(PROSE[:6000])
    (folder / "recipe.yaml").write_text("seed: 1\nheld_out: text.txt\n")
    (folder / "link.json").symlink_to(folder / "retrofit" / "config.json")
    os.link(folder / "text.txt", folder / "hard.json")
    return folder


def state(folder: Path) -> dict[str, str]:
    """Every file and what it holds."""
    return {
        str(file): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not file.is_symlink()
    }


def refused(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command says."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rpb: ")]
    return line


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
    command, said = READ[name]
    assert rpb_command(monkeypatch, *command.split()) == 2
    assert said in refused(capsys)
    assert state(folder) == before, "nothing changed, nothing left behind"


def test_a_pipe_without_a_reader_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert rpb_command(monkeypatch, "explain", "--json", pipe) == 2
    assert "is neither a file nor a name that is free" in refused(capsys)
    for command in (
        ["evaluate", folder / "retrofit", "--data", pipe],
        ["evaluate", folder / "retrofit", "--data", "/dev/zero"],
        ["finetune", folder / "retrofit", tmp_path / "out", "--recipe", pipe],
        ["finetune", folder / "retrofit", tmp_path / "out", "--recipe", "/dev/zero"],
    ):
        assert rpb_command(monkeypatch, *command) == 2
        refused(capsys)
    assert rpb_command(monkeypatch, "explain", "--json", "/dev/null") == 0


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
    ("command", "option", "value", "said"),
    [(command, *row) for command, rows in MEANINGLESS.items() for row in rows],
    ids=lambda value: value[:24],
)
def test_numbers_that_mean_nothing(
    command: str,
    option: str,
    value: str,
    said: str,
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
    line = refused(capsys)
    assert said in line and len(line) < 2200
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
    command, said = LOSING[name]
    assert rpb_command(monkeypatch, *command.split()) == 2
    assert said in refused(capsys)
    assert not (folder / "OUT").exists()


def test_an_option_given_twice_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert rpb_command(monkeypatch, "explain", "--buckets", 8, "--buckets", 16) == 0
    said = capsys.readouterr()
    assert "16 buckets" in said.out
    assert said.err == "note: --buckets is given 2 times: the last one counts, 16\n"


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 1\nseed: 2\n", "the key 'seed' twice"),
        ("stages:\n- {tokens: 10, rate: 1.0, rate: 2.0}\n", "the key 'rate' twice"),
        (BOMB, "aliases that stand for too much"),
        (f"seed: &z [*z]\n{BOMB}", "aliases that stand for too much"),
        ("[" * 5000, "nested too deep"),
        ("seed: " + "9" * 5000, "a number"),
        ("seed: 1" + " " * 300_000, "more than 262,144 bytes"),
        ("? [a, b]\n: 1\n", "a key that is no plain value"),
        ("seed: 2024-99-99\n", "is not YAML"),
        ("seed: !!python/object/apply:os.system [id]\n", "is not YAML"),
        ("seed: &x 3\nkeep: *x\nstages: [{tokens: 0}]\n", "stages.0.tokens=0"),
        ("stages: [{tokens: 10, lengths: {64: 1}, rate: '" + "y" * 10_000 + "'}]\n", "stages.0.rate='yyyy"),
    ],
    ids=lambda value: value[:20],
)
def test_recipes_are_read_strictly(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    start = time.monotonic()
    with pytest.raises(ConfigError) as raised:
        read_recipe(file)
    assert said in str(raised.value) and "\n" not in str(raised.value)
    assert len(str(raised.value)) < 700 and time.monotonic() - start < 10


def test_counts_in_a_recipe() -> None:
    assert read_recipe(None, {"stages.1.tokens": "5M", "batch_tokens": "4k"}).stages[1].tokens == 5_000_000


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
        found = json.loads(out.read_text(), parse_constant=lambda name: pytest.fail(name))
        assert found["lengths"][0]["nll"] is None and found["not_finite"]["lengths.0.nll"] == "nan"
    else:
        assert status == 2 and not out.exists() and "finite" in refused(capsys)


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
            assert "and the model knows 300 tokens" in refused(capsys)


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
    assert "\x1b" not in (line := refused(capsys)) and "has no column 'text'" in line


@pytest.mark.parametrize("name", ["$x", r"$\frac$", "a$b$c"])
def test_a_dollar_in_a_name_is_no_formula(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).symlink_to(folder / "retrofit")
    asked = ["--data", folder / "text.txt", "--lengths", "32", "--tokens", "128", "--plot", tmp_path / "a.png"]
    assert rpb_command(monkeypatch, "evaluate", tmp_path / name, *asked) == 0


def test_long_messages_are_shortened() -> None:
    said = shortened("a" * 10_000 + "\n b")
    assert len(said) < 2100 and said.startswith("aaa") and said.endswith("aa b") and "characters left out" in said


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
    whose = "rpb (process 1)" if rank == "1" else "rpb"
    assert capsys.readouterr().err.startswith(f"{whose}: --key is missing")


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
            assert "no temporary files can be written" in refused(capsys)
    assert not (tmp_path / "out").exists()


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command line in a shell, where ``rpb`` is this one."""
    rpb = " ".join(f"'{word}'" for word in RPB)
    return subprocess.run(
        ["bash", "-c", f'rpb() {{ {rpb} "$@"; }}; {command}'],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        check=False,
    )


@pytest.mark.parametrize(
    ("command", "environment", "status", "error"),
    [
        ("rpb explain 2>&-", {}, 0, ""),
        ("rpb explain --query 1 2>&-", {}, 2, ""),
        ("rpb explain >&- 2>&- <&-", {}, 0, ""),
        ("rpb explain", {"PYTHONIOENCODING": "ascii"}, 0, ""),
        ("rpb explain >/dev/full", {}, 2, "rpb: the system refused: No space left"),
        ("rpb explain --query 3", {"RANK": "1", "PYTHONIOENCODING": "ascii"}, 2, "rpb: --key is missing"),
        ("rpb explain --query 1 --key $'\\xff'", {}, 2, "rpb: Invalid value for '--key'"),
        ("rpb explain 2>/dev/full | head -c 1 >/dev/null; (exit ${PIPESTATUS[0]})", {}, 141, ""),
    ],
)
def test_streams(command: str, environment: dict[str, str], status: int, error: str) -> None:
    done = shell(command, **environment)
    assert done.returncode in ({status, 0} if status == 141 else {status}), done.stderr
    assert done.stderr.startswith(error) and len(done.stderr.splitlines()) <= 1
    assert "Traceback" not in done.stdout + done.stderr
    if environment.get("PYTHONIOENCODING") == "ascii" and status == 0:
        assert "#" in done.stdout and "\\u" not in done.stdout


def test_an_early_interrupt() -> None:
    """From the first line of ours on; before it Python itself is starting, and answers in its own way."""
    for delay in (0.0, 0.02, 0.1, 0.5):
        process = subprocess.Popen(
            [sys.executable, "-c", "print(flush=True); from rpb_retrofit.cli import main; main()", "explain"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
        if delay:
            assert b"Traceback" not in error, error
            assert process.returncode in (0, 130, -signal.SIGINT)


def test_closed_streams_are_opened() -> None:
    code = (
        "import os, sys; os.close(2); sys.stderr = None\n"
        "from rpb_retrofit.cli import standard_streams\n"
        "standard_streams.open_all()\n"
        "assert os.path.samestat(os.fstat(2), os.stat(os.devnull)); assert sys.stderr is not None\n"
        "assert open(sys.executable, 'rb').fileno() > 2\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert standard_streams.STREAMS[2] == ("stderr", "w")
