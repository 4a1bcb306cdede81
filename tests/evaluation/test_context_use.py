"""What a model gains from its context, and from where: stubs that can only copy, or only count, gain as they should."""

from __future__ import annotations

import json
import math
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rpb_retrofit.errors import ConfigError, DataError
from rpb_retrofit.evaluation.context_use import make_inductions, make_local_orders
from rpb_retrofit.evaluation.filler import pieces
from rpb_retrofit.evaluation.retrieval import cells, make_items, measure
from tests.evaluation.retrieval_cases import LENGTH, SURE, Stub, filler, items, uniform
from tests.support.tokenizers import tokenizer_of_text, tokenizer_of_words

VOCABULARY = 400
COUNTING = [torch.arange(VOCABULARY), torch.arange(VOCABULARY // 2)]


def copier(ids: Tensor) -> Tensor:
    """After a token that came before, what followed it the first time; else anything."""
    logits = torch.zeros(len(ids), VOCABULARY)
    for i, token in enumerate(ids.tolist()):
        if (first := ids.tolist().index(token)) < i:
            logits[i, ids[first + 1]] = SURE
    return logits


@pytest.mark.parametrize("bos", [None, 399])
def test_induction(bos: int | None) -> None:
    made = make_inductions(COUNTING, [8, 40, 150], count=3, span=8, bos=bos)
    start = bos is not None
    for item in made:
        twice = item.ids[start : start + 8]
        assert torch.equal(item.ids[start + item.distance :], twice) and len(twice.unique()) == 8
        assert len(item.ids) == start + item.distance + 8
        between = item.ids[start + 8 : -8]
        assert not len(between) or torch.equal(between, torch.arange(between[0], between[-1] + 1)), "text, as it is"
    assert len({tuple(item.ids.tolist()) for item in made}) == 9
    (alone,) = make_inductions(COUNTING, [40], count=1, span=8, bos=bos)
    assert torch.equal(alone.ids, made[3].ids)
    for row in measure(Stub(VOCABULARY, copier), made, progress=False):
        assert row["without"] == pytest.approx(math.log(VOCABULARY), rel=1e-5), "new tokens cannot be copied"
        assert row["given"] < 1e-6
        assert row["gain"] == row["without"] - row["given"]
    rare = torch.arange(VOCABULARY) / 100
    for blind in (uniform(VOCABULARY), Stub(VOCABULARY, lambda ids: rare.expand(len(ids), VOCABULARY))):
        rows = measure(blind, made, progress=False)
        assert all(row["gain"] == pytest.approx(0, abs=1e-6) for row in rows), "the same tokens are compared"


def counter(ids: Tensor) -> Tensor:
    """Goes on counting where it has seen nothing but counting."""
    logits = torch.zeros(len(ids), VOCABULARY)
    steps = ids[1 : 2 * len(ids) // 3].diff() == 1
    if steps.all():
        logits[torch.arange(len(ids)), (ids + 1) % VOCABULARY] = SURE
    return logits


def frequencies(ids: Tensor) -> Tensor:
    """Knows how often it has seen each token, and not in which order."""
    return torch.nn.functional.one_hot(ids, VOCABULARY).cumsum(0).log1p()


@pytest.mark.parametrize("bos", [None, 399])
def test_local_order(bos: int | None) -> None:
    made = make_local_orders(COUNTING, [30, 90], count=4, bos=bos)
    (alone,) = make_local_orders(COUNTING, [90], count=1, bos=bos)
    assert torch.equal(alone.swapped, made[4].swapped)
    start, moved = int(bos is not None), 0
    for item in made:
        n = len(item.ids)
        assert item.scored == n // 3 and torch.equal(item.ids[-item.scored :], item.swapped[-item.scored :])
        shift = item.swapped - item.ids
        assert not shift[:start].any()
        i = start
        while i < n:  # where one token moved up, its neighbour moved down
            assert shift[i] in (0, 1)
            if shift[i] == 1:
                assert shift[i + 1] == -1
                moved += 2
                i += 1
            i += 1
    assert 0.5 < moved / sum(len(item.ids) - item.scored for item in made) < 0.8
    for row in measure(Stub(VOCABULARY, counter), made, progress=False):
        assert row["gain"] == pytest.approx(math.log(VOCABULARY), rel=1e-5)
        assert row["gain"] == row["without"] - row["given"]
    for blind in (uniform(VOCABULARY), Stub(VOCABULARY, frequencies)):
        assert all(row["gain"] == pytest.approx(0, abs=1e-6) for row in measure(blind, made, progress=False))


@given(
    sizes=st.lists(st.integers(0, 12), max_size=5),
    size=st.integers(0, 8),
    number=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_pieces(sizes: list[int], size: int, number: int, seed: int) -> None:
    documents = [torch.arange(100 * i, 100 * i + n) for i, n in enumerate(sizes)]
    if sum(max(0, n - size + 1) for n in sizes) < number:
        wanted = f"take a document of {size + number - 1} tokens, the longest has {max(sizes, default=0)}"
        with pytest.raises(DataError, match=wanted):
            pieces(documents, size, number, Random(seed))
        return
    cut = pieces(documents, size, number, Random(seed))
    for piece in cut:
        assert len(piece) == size
        assert not size or any(torch.equal(piece, d[piece[0] % 100 :][:size]) for d in documents), "of one document"
    if size:
        assert len({int(piece[0]) for piece in cut}) == number
    for piece, again in zip(cut, pieces(documents, size, max(1, number // 2), Random(seed)), strict=False):
        assert torch.equal(piece, again)


def test_rows_can_be_journalled() -> None:
    made: list[Any] = [
        *make_inductions(filler("plain"), [64], 1),
        *items("passkey", "plain", depths=[0, 1]),
        *make_local_orders(filler("plain"), [60], 1),
        *items("multi-query", "plain"),
    ]
    rows = measure(uniform(len(tokenizer_of_text("plain"))), made, progress=False)
    assert json.loads(json.dumps(rows)) == rows
    kinds = ["induction", *["passkey"] * 4, "local-order", "multi-query", "multi-query"]
    assert [row["kind"] for row in rows] == kinds
    assert (rows[0]["distance"], rows[5]["length"]) == (64, 60)
    results = cells(rows)
    assert [(c.kind, c.length, c.depth, c.items) for c in results] == [
        ("passkey", LENGTH, 0, 2),
        ("passkey", LENGTH, 1, 2),
        ("multi-query", LENGTH, None, 2),
    ]
    earned = [{**rows[1], "correct": True, "nll": 1.0}, {**rows[2], "correct": False, "nll": 4.0}]
    assert [(c.correct, c.nll) for c in cells(earned)] == [(0.5, 2.5)]


def test_a_table_that_ends_too_soon() -> None:
    model: Any = Stub(VOCABULARY, copier, longest=100)
    made = make_local_orders(COUNTING, [60, 120], count=1)
    with pytest.raises(DataError, match="length 120: 'stub' has a table of 100 positions"):
        measure(model, made, progress=False)
    assert model.passes == 0
    assert len(measure(model, made[:1], progress=False)) == 1


def test_wrong_requests() -> None:
    for wrong, error, text in (
        (lambda: items("needle", "plain"), ConfigError, "'needle': no such kind, choose from passkey, multi-key, key"),
        (lambda: items("passkey", "plain", depths=[0, 1.5]), ConfigError, "depth 1.5: it must lie between 0"),
        (lambda: items("passkey", "plain", lengths=[100]), DataError, r"length 100: .* passkey takes 1\d\d tokens"),
        (
            lambda: make_items("passkey", tokenizer_of_text("plain"), [torch.zeros(600)], [LENGTH], [0], 3),
            DataError,
            f"take a document of {LENGTH + 2} tokens, the longest has 600",
        ),
        (lambda: make_items("passkey", tokenizer_of_words(), [], [LENGTH], [0], 1), DataError, "cannot spell '"),
        (lambda: make_inductions(COUNTING, [16], 1), ConfigError, "distance 16, span 32"),
        (lambda: make_inductions([torch.arange(7)], [8], 1, span=8), DataError, "7 different tokens.*takes 8"),
        (lambda: make_local_orders(COUNTING, [5], 1), ConfigError, "length 5: local order takes 6"),
        (lambda: make_local_orders(COUNTING, [500], 1), DataError, "a document of 500 tokens, the longest has 400"),
    ):
        with pytest.raises(error, match=text):
            wrong()
