"""Repeats that are planted in windows: what comes again, where, and what stays."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rpb_retrofit.text.repeats import MOST, SPANS, ordinary, plant, with_repeats

CLS, SEP = 1, 2


def windows(count: int, length: int, vocabulary: int = 100_000) -> list[Tensor]:
    """Windows in which hardly a token comes twice."""
    generator = torch.Generator().manual_seed(count)
    return [torch.randint(10, vocabulary, (length,), generator=generator) for _ in range(count)]


def repeats(window: Tensor) -> Iterator[tuple[int, int, int]]:
    """(start, distance, tokens) of each span of the shortest length or more that comes again, by brute force."""
    ids = window.tolist()
    for distance in range(SPANS[0], len(ids) - SPANS[0] + 1):
        run = 0
        for at in range(len(ids) - distance + 1):
            if at + distance < len(ids) and ids[at] == ids[at + distance]:
                run += 1
                continue
            if run >= SPANS[0]:
                yield at - run, distance, run
            run = 0


@pytest.mark.parametrize(("length", "count"), [(32, 800), (64, 400), (100, 200), (256, 60), (1024, 10)])
@pytest.mark.parametrize("share", [0.1, 0.3, MOST])
def test_the_share_that_was_asked_for(share: float, length: int, count: int) -> None:
    """On average, also where a window has room for a pair of spans or none."""
    planted = with_repeats(windows(count, length), share)
    tokens = [sum(2 * tokens for _, _, tokens in repeats(window)) for window in planted]
    assert sum(tokens) / (count * length) == pytest.approx(share, abs=0.05)


def test_some_spans_are_of_the_text_and_some_are_random() -> None:
    plain = windows(16, 1024)
    new = [bool((b[s : s + n] != a[s : s + n]).all()) for a, b in zip(plain, with_repeats(plain, 0.5), strict=True)
           for s, _, n in repeats(b)]  # fmt: skip
    assert 0.3 < sum(new) / len(new) < 0.7
    assert len(new) > 50


def test_distances_reach_to_the_end_of_the_window() -> None:
    """As many in its third quarter as in its second, and some in the last eighth."""
    distances = [far for window in with_repeats(windows(60, 1024), 0.3) for _, far, _ in repeats(window)]
    second, third = (sum(a <= d < a + 256 for d in distances) for a in (256, 512))
    assert 0.6 < second / third < 1.6
    assert max(distances) > 0.875 * 1024
    assert min(distances) >= SPANS[0]


@given(
    st.integers(1, 300), st.floats(0, 1), st.integers(0, 2**32), st.lists(st.integers(0, 299), max_size=4, unique=True)
)
def test_special_tokens_stay_and_nothing_else_comes_in(length: int, share: float, seed: int, at: list[int]) -> None:
    (window,) = windows(1, length)
    window[[place for place in at if place < length]] = CLS
    planted = plant(window, share, ordinary(window, [CLS, SEP]), Random(seed), [CLS, SEP])
    assert planted.shape == window.shape and planted.dtype == window.dtype
    assert torch.equal(planted == CLS, window == CLS)
    assert set(planted.tolist()) <= set(window.tolist())
    if length < 2 * SPANS[0]:
        assert torch.equal(planted, window)


def test_without_noise_all_spans_are_of_the_text() -> None:
    (plain,) = windows(1, 1024)
    planted = plant(plain, 0.5, ordinary(plain), Random(0), noise=0)
    assert list(repeats(planted))
    assert all(torch.equal(planted[start : start + n], plain[start : start + n]) for start, _, n in repeats(planted))


def test_it_depends_on_the_seed_alone() -> None:
    plain = windows(3, 512)
    first, again, other = (with_repeats(plain, 0.5, seed) for seed in (0, 0, 1))
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))
    assert all(map(torch.equal, plain, windows(3, 512))), "the windows that were given are left alone"
    assert all(map(torch.equal, plain, with_repeats(plain, 0)))
    assert with_repeats([], 0.5) == []
