"""The study from scratch, made tiny: its text, what it trains, that finished arms are not repeated, its card."""

from __future__ import annotations

import importlib
import json
import random
import sys
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from rpb_retrofit.comparison.measures import Benchmark

ARMS = ("source", "yarn", "none-log-n", "t5-content")
TINY = {"hidden": 16, "layers": 1, "heads": 2, "context": 32, "copies_tokens": 256, "text_tokens": 512}
TINY |= {"heal_tokens": 256, "batch_tokens": 64, "scored_tokens": 1024}


@pytest.fixture
def text(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """scripts/study_text.py on three short modules."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts")
    module: Any = importlib.import_module("study_text")
    texts = [text for text, _ in zip(module.sources(), range(16), strict=False)]
    monkeypatch.setattr(module, "sources", lambda: iter(text[:6000] for text in texts))
    return module


@pytest.fixture
def study(text: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """scripts/study.py on that text, in one process."""
    module: Any = importlib.import_module("study")
    monkeypatch.setattr(module, "ARMS", ARMS)
    monkeypatch.setattr(module, "ProcessPoolExecutor", InProcess)
    monkeypatch.setattr(module, "SIZES", {"cpu": replace(module.SIZES["cpu"], **TINY)})
    return module


class InProcess:
    """An executor that does its tasks at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *args: object) -> None: ...

    def submit(self, task: Any, *arguments: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(task(*arguments))
        return done


def test_planted_lines_come_twice_and_not_too_far_apart(text: ModuleType) -> None:
    whole = text.planted("\n".join(f"line {number}" for number in range(2000)), random.Random(0))
    lines = whole.splitlines()
    assert [line for line in lines if not line.startswith("# ")] == [f"line {number}" for number in range(2000)]
    at: dict[str, list[int]] = {}
    position = 0
    for line in lines:
        at.setdefault(line, []).append(position)
        position += len(line) + 1
    gaps = [places[1] - places[0] for line, places in at.items() if line.startswith("# ") and len(places) == 2]
    assert len(gaps) > 500 and all(26 <= gap < 2200 for gap in gaps)
    assert sum(gap < 128 for gap in gaps) > len(gaps) / 5 and sum(gap > 512 for gap in gaps) > len(gaps) / 5


def test_every_character_is_a_token(text: ModuleType, tmp_path: Path) -> None:
    text.prepare_text(tmp_path, TINY["copies_tokens"])
    tokenizer = text.tokenizer_of(tmp_path)
    spelled = text.spelled("def F(x):\n\treturn {'é': 42}  # Größe\n")
    ids = tokenizer(spelled)["input_ids"]
    assert len(ids) == len(spelled) and "".join(text.ALPHABET[i] for i in ids) == spelled
    documents = [
        {json.loads(line)["text"] for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()}
        for name in ("scored", "held_out", "train")
    ]
    assert all(documents) and sum(map(len, documents)) == len(set().union(*documents)), "none is in two of them"


def test_study(study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it; stopped in the middle and begun again, no arm is measured twice."""
    measured: list[str] = []
    real, threads = Benchmark.measure, torch.get_num_threads()

    def measure(self: Benchmark, model: Any, label: str) -> Any:
        if len(measured) == stop:
            raise KeyboardInterrupt
        measured.append(label)
        return real(self, model, label)

    monkeypatch.setattr(Benchmark, "measure", measure)
    command = ["study.py", "--out", str(tmp_path / "out"), "--seeds", "2", "--card", str(tmp_path / "card.md")]
    monkeypatch.setattr(sys, "argv", command)
    stop = 9
    with pytest.raises(KeyboardInterrupt):
        study.main()
    stop = -1
    study.main()
    torch.set_num_threads(threads)
    arms = [name for arm in ARMS for name in (arm, f"{arm} healed")]
    assert sorted(measured) == sorted([*arms * 2, study.SCRATCH, study.SCRATCH]), "each once for each seed"
    document = json.loads((tmp_path / "out" / "study.json").read_text())
    rows = {row["id"]: row for row in document["rows"]}
    assert [*rows] == [*ARMS, *arms[1::2], f"{study.SCRATCH} healed"]
    assert document["context"] == 32 and document["target"] == 512
    for row in rows.values():
        assert row["seeds"] == 2 and [losses["length"] for losses in row["losses"]] == [32, 64, 128, 256, 512]
        assert row["beyond"]["first"] == 128, "beyond four times the context"
    assert rows["yarn healed"]["rate"] in study.SIZES["cpu"].rates and rows["yarn healed"]["tokens"] == 256
    assert rows[f"{study.SCRATCH} healed"]["tokens"] == 512 + 256
    assert rows["yarn"]["speed"] and "<h1" in (tmp_path / "out" / "study.html").read_text()
    card = (tmp_path / "card.md").read_text()
    assert card.startswith(f"# {study.TITLE}") and "What was aimed at" in card
