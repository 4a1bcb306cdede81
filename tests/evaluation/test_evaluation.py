"""Losses against a hand-made sum, how text is cut, and the commands `evaluate`, `explain` and their wrong inputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

import rpb_retrofit as rpb
from rpb_retrofit.checkpoint.load import open_causal_lm
from rpb_retrofit.errors import DataError
from rpb_retrofit.evaluation.losses import token_by_token
from rpb_retrofit.evaluation.nll import Windows, nll_at_length
from rpb_retrofit.text.reading import read_text
from rpb_retrofit.text.tokens import bos_policy
from tests.families.cases import CASES
from tests.support.command import rpb_command
from tests.support.tiny_models import CONFIG, VOCAB, build, tokens
from tests.support.tokenizers import WORDS, tokenizer_of_words
from tests.support.training_cases import PROSE, write_source

LLAMA, GPT2, BERT = (next(case for case in CASES if str(case) == name) for name in ("llama", "gpt2", "bert"))


@given(
    length=st.integers(2, 12),
    stride=st.integers(1, 12),
    sizes=st.lists(st.integers(0, 40), max_size=4),
    bos=st.booleans(),
)
def test_every_token_is_scored_at_most_once(length: int, stride: int, sizes: list[int], bos: bool) -> None:
    room = length - bos
    windows = Windows(length, min(stride, room), -1 if bos else None)
    documents = [torch.arange(1000 * i, 1000 * i + size) for i, size in enumerate(sizes)]
    scored: list[int] = []
    for ids, count in windows.cut(documents, budget=10_000):
        assert len(ids) == length
        assert (ids[0] == -1) == bos
        text = ids[1:] if bos else ids
        assert torch.equal(text, torch.arange(text[0], text[0] + room)), "a window is one piece of one document"
        scored += ids[-count:].tolist()
    assert len(scored) == len(set(scored))
    # All but what is left over at the end of each document, and (without BOS) its first token.
    expected = sum(
        room - (not bos) + (size - room) // windows.stride * min(windows.stride, length - 1)
        for size in sizes
        if size >= room
    )
    if windows.stride < length:
        assert len(scored) == expected


def test_the_mean_is_over_tokens() -> None:
    model = rpb_model()
    documents = [tokens(1, 30, seed=s)[0] for s in (1, 2)]
    result = nll_at_length(model, documents, Windows(8, 8, None), budget=1000)
    by_hand = []
    with torch.no_grad():
        for document in documents:
            for start in (0, 8, 16):
                ids = document[start : start + 8]
                log_p = model(ids[None]).logits[0].double().log_softmax(-1)
                by_hand += [(i, -log_p[i - 1, ids[i]].item()) for i in range(1, 8)]
    assert result.windows == 6
    assert result.tokens == len(by_hand) == 42
    assert result.nll == pytest.approx(sum(loss for _, loss in by_hand) / 42, abs=1e-6)
    for b in result.by_position:
        losses = [loss for i, loss in by_hand if b.first <= i <= b.last]
        assert (b.tokens, b.nll) == (len(losses), pytest.approx(sum(losses) / len(losses), abs=1e-6))
    assert [(b.first, b.last) for b in result.by_position] == [(1, 1), (2, 3), (4, 7)]


@pytest.mark.parametrize("bos", [None, 1])
def test_losses_token_by_token_have_the_same_means(bos: int | None) -> None:
    model, documents = rpb_model(), [tokens(1, 30, seed=s)[0] for s in (1, 2)]
    expected = nll_at_length(model, documents, Windows(12, 12 - (bos is not None), bos), budget=45)
    measured = token_by_token(model, documents, 12, 45, bos).by_length()
    assert (measured.length, measured.tokens, measured.windows) == (12, expected.tokens, expected.windows)
    assert measured.nll == pytest.approx(expected.nll, abs=1e-9)
    for bin_, other in zip(measured.by_position, expected.by_position, strict=True):
        assert (bin_.first, bin_.last, bin_.tokens) == (other.first, other.last, other.tokens)
        assert bin_.nll == pytest.approx(other.nll, abs=1e-9)


def rpb_model() -> torch.nn.Module:
    model = build(LLAMA)
    rpb.retrofit(model, CONFIG)
    return model


def test_bos_policy() -> None:
    assert bos_policy(tokenizer_of_words(bos=True), "auto") is None  # this tokenizer does not add it by itself
    assert bos_policy(tokenizer_of_words(bos=True), "always") == 1
    assert bos_policy(tokenizer_of_words(bos=True), "never") is None
    with pytest.raises(DataError, match="no beginning-of-sequence"):
        bos_policy(tokenizer_of_words(), "always")


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_read_text(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"data{suffix}"
    rows = ["first line\nsecond", "naïve café"]
    if suffix == ".txt":
        file.write_text("\n".join(rows))
        rows = ["\n".join(rows)]
    else:
        data = Dataset.from_dict({"text": [*rows, ""]})
        data.to_json(file) if suffix == ".jsonl" else data.to_parquet(file)
    assert read_text(str(file)).documents == rows
    assert len(read_text(None).documents[0]) > 400_000


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A retrofit, a plain model with a table of 64 positions, an encoder, one that can spell; all with a tokenizer."""
    base = tmp_path_factory.mktemp("models")
    saved = {"retrofit": rpb_model(), "gpt2": build(GPT2), "bert": build(BERT)}
    for name, model in saved.items():
        model.save_pretrained(base / name)
        tokenizer_of_words().save_pretrained(base / name)
    write_source(base / "speller")
    (base / "prose.txt").write_text(PROSE)
    (base / "text.txt").write_text(" ".join(WORDS[(7 * i) % VOCAB] for i in range(300)))
    (base / "empty.txt").write_text(" \n")
    (base / "latin.txt").write_bytes("café ".encode("latin-1") * 50)
    (base / "numbers.jsonl").write_text('{"text": 5}\n')
    (base / "nothing.jsonl").write_text("")
    (base / "other.jsonl").write_text('{"body": "w1 w2"}\n')
    return {path.name: path for path in base.iterdir()}


def test_evaluate_prints_what_it_writes(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"--json": tmp_path / "result.json", "--plot": tmp_path / "loss.png"}
    options = ["--data", folders["text.txt"], "--lengths", "64,16", "--tokens", "256"]
    status = rpb_command(monkeypatch, "evaluate", folders["retrofit"], *options, *sum(files.items(), ()))
    assert status == 0
    printed = capsys.readouterr().out
    written = json.loads(files["--json"].read_text())
    assert [length["length"] for length in written["lengths"]] == [16, 64]
    for length in written["lengths"]:
        assert f"{length['nll']:.4f}" in printed
        assert length["tokens"] == length["windows"] * (length["length"] - 1)
    assert "windows do not overlap; no BOS" in printed
    assert files["--plot"].read_bytes().startswith(b"\x89PNG")


def test_evaluate_speed(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--data", folders["text.txt"], "--lengths", "16,32", "--tokens", "64", "--json", tmp_path / "s.json"]
    assert rpb_command(monkeypatch, "evaluate", folders["retrofit"], *options, "--speed", "2") == 0
    printed, written = capsys.readouterr().out, json.loads((tmp_path / "s.json").read_text())
    assert [(row["length"], row["rounds"]) for row in written["speed"]] == [(16, 2), (32, 2)]
    assert all(len(row["prefill_s"]["each"]) == 2 for row in written["speed"])
    assert "decoding tokens/s" in printed and f"{written['speed'][1]['first_token_s']['median']:.3f}" in printed


def test_evaluate_retrieval(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--data", folders["prose.txt"], "--lengths", "256,384", "--tokens", "768", "--json", tmp_path / "r.json"]
    asked = ["--retrieval", "passkey,common-words", "--depths", "1,0", "--items", "2"]
    assert rpb_command(monkeypatch, "evaluate", folders["speller"], *options, *asked) == 0
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "r.json").read_text())
    shape = [(cell["kind"], cell["length"], cell["depth"]) for cell in written["retrieval"]]
    placed = [("passkey", length, depth) for length in (256, 384) for depth in (0, 1)]
    assert shape == [*placed, ("common-words", 256, None), ("common-words", 384, None)]
    for cell in written["retrieval"]:
        answers = [row for row in written["answers"] if all(row[n] == cell[n] for n in ("kind", "length", "depth"))]
        assert [row["number"] for row in answers] == [0, 1]
        assert cell["items"] == 2
        assert cell["correct"] == sum(row["correct"] for row in answers) / 2
        assert cell["nll"] == pytest.approx(sum(row["nll"] for row in answers) / 2)
        depth = "all" if cell["depth"] is None else f"{cell['depth']:g}"
        line = [cell["kind"], str(cell["length"]), depth, f"{cell['correct']:.0%}", f"{cell['nll']:.4f}"]
        assert line in [row.split() for row in printed.splitlines()]


def test_a_model_in_memory_has_the_figures_of_the_command(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--data", folders["prose.txt"], "--lengths", "256", "--tokens", "512", "--json", tmp_path / "r.json"]
    asked = ["--retrieval", "passkey", "--depths", "0.5", "--items", "2"]
    assert rpb_command(monkeypatch, "evaluate", folders["speller"], *options, *asked) == 0
    written = json.loads((tmp_path / "r.json").read_text())
    model, words = open_causal_lm(str(folders["speller"]))
    settings: dict[str, Any] = {"lengths": [256], "tokens": 512, "retrieval": ["passkey"], "depths": [0.5], "items": 2}
    result = rpb.evaluate(model.train(), tokenizer=words, data=[PROSE], **settings)
    assert model.training, "it is as it was"
    measured = json.loads(json.dumps(result.as_json()))
    assert measured.pop("data") == "documents in memory (1)" and written.pop("data") == "prose.txt"
    assert {"command": written["command"], **measured} == written and measured["answers"]


@pytest.mark.parametrize(
    ("model", "options", "answer"),
    [
        ("bert", [], "is a BertForMaskedLM: only models that predict the next token"),
        ("gpt2", ["--lengths", "128"], "has a table of 64 positions and cannot take it"),
        ("retrofit", ["--lengths", "16,x"], "'x' is not a length"),
        ("retrofit", ["--lengths", "²"], "'²' is not a length"),
        ("retrofit", ["--plot", "loss.xyz"], "--plot 'loss.xyz': its ending is none of"),
        ("retrofit", ["--data", "numbers.jsonl"], "its column 'text' holds int, not text"),
        ("retrofit", ["--data", "nothing.jsonl"], "holds no text"),
        ("retrofit", ["--lengths", "4000"], "length 4000: no window fits (longest document 300 tokens"),
        ("retrofit", ["--lengths", "16", "--stride", "17"], "--stride 17"),
        ("retrofit", ["--bos", "maybe"], "--bos maybe"),
        ("retrofit", ["--bos", "always"], "no beginning-of-sequence token"),
        ("retrofit", ["--data", "nowhere.txt"], "--data 'nowhere.txt': no such file"),
        ("retrofit", ["--data", "empty.txt"], "holds no text"),
        ("retrofit", ["--data", "latin.txt"], "is not UTF-8"),
        ("retrofit", ["--data", "other.jsonl"], "has no column 'text', only body"),
        ("retrofit", ["--data", "retrofit/tokenizer.jpeg"], "no such file"),
        ("retrofit", ["--retrieval", "passkey,pass"], "retrieval 'pass': no such kind, choose from passkey, multi-key"),
        ("retrofit", ["--retrieval", "passkey"], "the tokenizer cannot spell"),
        ("retrofit", ["--depths", "0,middle"], "--depths 0,middle: 'middle' is not a depth"),
        ("retrofit", ["--depths", "1.5"], "--depths 1.5: '1.5' is not a depth"),
        ("speller", ["--retrieval", "all"], "length 16: a question of kind passkey takes"),
    ],
)
def test_evaluate_wrong_input(
    model: str,
    options: list[str],
    answer: str,
    folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = [str(folders.get(option, option)) for option in options]
    data = [] if "--data" in options else ["--data", str(folders["text.txt"])]
    assert rpb_command(monkeypatch, "evaluate", folders[model], *data, "--lengths", "16", *options) == 2
    (message,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rpb: ")]
    assert answer in message


def test_explain_a_pair(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "pair.json"
    assert rpb_command(monkeypatch, "explain", "--query", 5, "--key", 9, "--json", file) == 0
    printed = capsys.readouterr().out
    assert "offset -4: the key lies 4 after the query" in printed
    assert "bidirectional table: bucket 20 of 32" in printed
    assert json.loads(file.read_text())["causal"] == {"bucket": 0, "visible": False}


@pytest.mark.parametrize("options", [[], ["--bidirectional", "--buckets", "8", "--max-distance", "20"]])
def test_explain_the_map(
    options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    files = ["--json", tmp_path / "map.json", "--plot", tmp_path / "map.png"]
    assert rpb_command(monkeypatch, "explain", *options, *files) == 0
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "map.json").read_text())["buckets"]
    covered = sorted(
        offset
        for row in rows
        if row["part"] != "empty"
        for offset in range(
            -300 if row["first"] is None else row["first"], (300 if row["last"] is None else row["last"]) + 1
        )
    )
    assert covered == list(range(-300 if options else 0, 301)), "every offset has one bucket"
    assert {row["part"] for row in rows} >= {"one to one", "logarithmic", "constant tail"}
    assert "constant tail" in printed
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_explain_wrong_input(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for options, answer in ((["--query", "3"], "--key is missing"), (["--query", "-1", "--key", "0"], "--query -1")):
        assert rpb_command(monkeypatch, "explain", *options) == 2
        assert answer in capsys.readouterr().err
