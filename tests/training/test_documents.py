"""What training reads: documents, mixtures, packing and resuming, against plain references."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rpb_retrofit.errors import DataError
from rpb_retrofit.training.batches import IGNORED, Layout, RowRepeats, Rows, collate
from rpb_retrofit.training.documents import Finite, Mixture, Streaming, hold_out, open_sources
from rpb_retrofit.training.recipe import Recipe

NO_TOKENS = torch.empty(0, dtype=torch.long)
PACKED, PADDED = (Layout(packed, True, NO_TOKENS, NO_TOKENS, 0) for packed in (True, False))
REPEATS = RowRepeats(0.4, 0, (), 0.5)


def numbers(documents: Sequence[str]) -> list[Tensor]:
    return [torch.tensor([int(n) for n in document.split()], dtype=torch.long) for document in documents]


def stream(sizes: list[int], layout: Layout = PACKED, seed: int = 0, repeats: RowRepeats | None = None) -> Rows:
    """Documents whose tokens are all different: token 1000 d + i is the i-th of document d."""
    documents = [" ".join(str(1000 * (d + 1) + i) for i in range(size)) for d, size in enumerate(sizes)]
    return Rows(Mixture([Finite("numbers", documents, seed)], [1.0], numbers), layout, repeats)


def test_documents_are_tokenised_many_at_a_time() -> None:
    documents, calls = [f"{n} {n}" for n in range(50)], list[int]()

    def encode(texts: Sequence[str]) -> list[Tensor]:
        calls.append(len(texts))
        return numbers(texts)

    mixture = Mixture([Finite("numbers", documents, 0)], [1.0], encode)
    drawn = [int(mixture.next()[0]) for _ in range(100)]
    assert sorted(drawn[:50]) == sorted(drawn[50:]) == list(range(50)) and drawn[:50] != drawn[50:]
    assert calls == [50], "all that is left of an epoch, and nothing twice"


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.lists(st.integers(2, 17), min_size=1, max_size=12))
def test_packing_keeps_every_token_in_order(sizes: list[int], lengths: list[int]) -> None:
    rows, seen = stream(sizes), []
    for length in lengths:
        (row,) = rows.take(1, length)
        assert sum(map(len, row)) == length, "a packed row is full"
        batch = collate([row], length, PACKED)
        assert batch.position_ids is not None
        for i, (token, position, target) in enumerate(
            zip(batch.input_ids[0].tolist(), batch.position_ids[0].tolist(), batch.target[0].tolist(), strict=True)
        ):
            starts = position == 0
            assert starts == (i == 0 or token != batch.input_ids[0, i - 1] + 1 or token % 1000 == 0)
            follows = i + 1 < length and batch.position_ids[0, i + 1] > 0
            assert target == (batch.input_ids[0, i + 1] if follows else IGNORED)
        seen += batch.input_ids[0].tolist()
    # One epoch holds each token once, its documents whole.
    epoch = seen[: sum(sizes)]
    assert len(set(epoch)) == len(epoch)
    assert all(b == a + 1 or b % 1000 == 0 for a, b in pairwise(epoch))


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=6),
    st.lists(st.integers(2, 17), min_size=2, max_size=12),
    st.integers(0, 11),
    st.booleans(),
)
def test_resumes_at_the_very_next_token(sizes: list[int], lengths: list[int], stop: int, packed: bool) -> None:
    layout = PACKED if packed else PADDED
    whole = stream(sizes, layout)
    want = [whole.take(2, length) for length in lengths]
    stop %= len(lengths)
    first = stream(sizes, layout)
    for length in lengths[:stop]:
        first.take(2, length)
    state = json.loads(json.dumps(first.state()))
    second = stream(sizes, layout)
    second.restore(state)
    for rows, length in zip(want[stop:], lengths[stop:], strict=True):
        got = second.take(2, length)
        assert [[part.tolist() for part in row] for row in got] == [[part.tolist() for part in row] for row in rows]


@pytest.mark.parametrize("layout", [PACKED, PADDED], ids=["packed", "padded"])
def test_repeats_within_each_document_resume_too(layout: Layout) -> None:
    """What comes again lies in the same part of a document, on whose tokens alone it draws."""
    whole, plain = (stream([700, 40, 300], layout, repeats=planted) for planted in (REPEATS, None))
    want, unplanted = whole.take(12, 256), plain.take(12, 256)
    assert sum(len(part) - len(part.unique()) for row in want for part in row) > 0.1 * 12 * 256
    for row, other in zip(want, unplanted, strict=True):
        assert [len(part) for part in row] == [len(part) for part in other]
        assert all(len((part // 1000).unique()) == 1 for part in row)
    for stop in range(12):
        first = stream([700, 40, 300], layout, repeats=REPEATS)
        first.take(stop, 256)
        second = stream([700, 40, 300], layout, repeats=REPEATS)
        second.restore(json.loads(json.dumps(first.state())))
        for got, row in zip(second.take(12 - stop, 256), want[stop:], strict=True):
            assert all(map(torch.equal, got, row))


def test_a_stream_resumes_too(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": f"{10 * i} {10 * i + 1} {10 * i + 2}"}) + "\n" for i in range(7)))

    def opened() -> Rows:
        recipe = Recipe.model_validate({"data": [{"name": str(file), "streaming": True}], "evaluate_tokens": 0})
        (source,), weights, held = open_sources(recipe)
        assert isinstance(source, Streaming) and not held
        return Rows(Mixture([source], weights, numbers), PACKED)

    whole = opened()
    want = [whole.take(1, 5) for _ in range(9)]  # twice through the file
    for stop in range(9):
        first = opened()
        for _ in range(stop):
            first.take(1, 5)
        second = opened()
        second.restore(json.loads(json.dumps(first.state())))
        got = [second.take(1, 5) for _ in range(stop, 9)]
        assert all(torch.equal(torch.cat(a[0]), torch.cat(b[0])) for a, b in zip(got, want[stop:], strict=True))


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=4))
def test_weights_of_a_mixture(weights: list[float]) -> None:
    sources = [Finite(str(i), [f"{i} " * 10] * 3, 0) for i in range(len(weights))]
    mixture = Mixture(sources, weights, numbers)
    counts = Counter(int(mixture.next()[0]) for _ in range(400))
    for i, weight in enumerate(weights):
        assert counts[i] == pytest.approx(400 * weight / sum(weights), abs=len(weights))


def test_order_follows_the_seed_and_the_epoch() -> None:
    documents = [str(i) for i in range(50)]

    def epochs(seed: int) -> list[list[str]]:
        source = Finite("", documents, seed)
        return [[source.next() for _ in range(50)] for _ in range(2)]

    first, second = epochs(0)
    assert sorted(first) == sorted(second) == sorted(documents) and first != second
    assert epochs(0) == [first, second] and epochs(1)[0] != first


@pytest.mark.parametrize("count", [1, 3, 40, 500])
def test_held_out_text_is_apart(count: int) -> None:
    documents = [f"{i:04d} " * 200 for i in range(count)]
    train, held = hold_out(documents, 0.05)
    texts = [train[i] for i in range(len(train))]
    total, apart = sum(map(len, documents)), sum(map(len, held))
    assert apart / total == pytest.approx(0.05, abs=0.005)
    assert apart + sum(map(len, texts)) == total
    if count >= 40:
        assert not {text[:4] for text in texts} & {text[:4] for text in held}


def test_a_column_of_a_parquet_file(tmp_path: Path) -> None:
    Dataset.from_dict({"body": ["1 2 3", "4 5 6"] * 20}).to_parquet(str(tmp_path / "a.parquet"))
    recipe = Recipe.model_validate({"data": [{"name": str(tmp_path / "a.parquet"), "column": "body"}]})
    (source,), _, held = open_sources(recipe)
    assert source.next() in ("1 2 3", "4 5 6") and len(held) == 2
    with pytest.raises(DataError, match="no column 'text', only body"):
        open_sources(Recipe.model_validate({"data": [{"name": str(tmp_path / "a.parquet")}]}))
    Dataset.from_dict({"text": ["", " "]}).to_parquet(str(tmp_path / "blank.parquet"))
    with pytest.raises(DataError, match=r"blank.parquet' holds no text"):
        open_sources(Recipe.model_validate({"data": [{"name": str(tmp_path / "blank.parquet")}]}))
    Dataset.from_dict({"text": [1, 2]}).to_parquet(str(tmp_path / "numbers.parquet"))
    with pytest.raises(DataError, match=r"numbers.parquet' holds int where text is wanted"):
        open_sources(Recipe.model_validate({"data": [{"name": str(tmp_path / "numbers.parquet")}]}))


def test_rows_without_text_are_left_out(tmp_path: Path) -> None:
    rows = [{"text": None}, {"text": " "}, {"text": "1 2 3"}] * 40
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for streaming in (False, True):
        data = {"name": str(tmp_path / "rows.jsonl"), "streaming": streaming}
        recipe = Recipe.model_validate({"data": [data], "evaluate_tokens": 0 if streaming else 100})
        (source,), _, held = open_sources(recipe)
        assert {source.next() for _ in range(50)} == {"1 2 3"}
        assert held == ([] if streaming else ["1 2 3"] * 2)


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_that_are_not_utf8(streaming: bool, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "na\xefve"}\n' * 30)
    data = {"name": str(tmp_path / "rows.jsonl"), "streaming": streaming}
    recipe = Recipe.model_validate({"data": [data], "evaluate_tokens": 0})
    with pytest.raises(DataError, match=r"rows.jsonl' is not UTF-8"):
        next(source.next() for source in open_sources(recipe)[0])
