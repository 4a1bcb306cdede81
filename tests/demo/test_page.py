"""The demo's page on made-up figures, and where its differences by position come from."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.text import Text

from rpb_retrofit.demo import pictures
from rpb_retrofit.demo.report import write_report
from rpb_retrofit.demo.result import Demo, Variant, differences
from rpb_retrofit.demo.run import SPANS
from rpb_retrofit.evaluation.losses import Losses
from rpb_retrofit.evaluation.plots import STYLE
from tests.support.page import Page

LENGTHS, TOKENS = (128, 512, 2048), 2048
NAMES = ("source (RoPE)", "T5 bias", "T5 bias + high frequencies")
ABOVE = (0.0, 0.4, 0.02)
"""Nats a token that each model loses more than the first, at the beginning of a window."""

PIXEL = "data:image/png;base64,AAAA"


def losses_of(seed: int, above: float) -> list[Losses]:
    """Losses by length of one text of 2,048 tokens, ``above`` those of the source and with noise of their own."""
    drawn = torch.Generator().manual_seed(seed)
    noise = 0.3 * torch.randn(TOKENS, generator=drawn)
    text = 2 + torch.rand(TOKENS, generator=torch.Generator().manual_seed(9))
    by_length = []
    for length in LENGTHS:
        token = torch.arange(TOKENS).view(-1, length)[:, 1:]
        rising = above * (1 + torch.arange(1, length) / 2048)
        losses = text[token] + (noise[token] + rising if above else 0)
        by_length.append(Losses(length, losses, token, torch.zeros(len(token), dtype=torch.long)))
    return by_length


@pytest.fixture(scope="module")
def demo() -> Demo:
    """A small made-up result."""
    losses = {
        name: losses_of(number, above) for number, (name, above) in enumerate(zip(NAMES, (0, 0.4, 0.02), strict=True))
    }
    report: Any = SimpleNamespace(calibration=SimpleNamespace(windows=8, length=2048))
    arms = [
        Variant(
            name,
            re.sub(r"\W+", "-", name) if number else None,
            report if number else None,
            [length.by_length() for length in losses[name]],
            {d: [8 - number - d / 1000 + 0.2 * i for i in range(n)] for d, n in SPANS.items()},
            ["on <and> on", "and on"],
        )
        for number, name in enumerate(NAMES)
    ]
    return Demo("a model", "a text", "no BOS", arms, {"fetch": 1.0}, differences(losses), ("It", "So"), 40)


def test_the_page_is_whole_and_needs_nothing_else(demo: Demo, tmp_path: Path) -> None:
    write_report(demo, dict.fromkeys(NAMES[1:], PIXEL), tmp_path / "report.html")
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    source = (tmp_path / "report.html").read_text()
    page = Page(source)
    assert not re.search(r"https?:|@import|url\(", source)
    assert all(address.startswith("data:image/") for address in page.values("src"))
    assert {link.removeprefix("#") for link in page.values("href")} <= set(page.values("id"))
    assert {"lengths", "positions", "spans", "tables-T5-bias", "continuations", "next"} <= set(page.values("id"))
    assert "T5 bias 64-127 128" in page.text and "on <and> on" in page.text
    assert f"{demo.costs['T5 bias'][-1]:+.2f} nats a token" in page.text
    # Gains at 1,900 are (8 - number - 1.9) and (that + 0.2): the first retrofit's mean is 5.2 of the source's 6.2.
    assert demo.kept["T5 bias"][1900] == pytest.approx(5.2 / 6.2)
    assert "keeps 84% of what a span that comes again gains 1,900 tokens below" in page.text
    assert "gain of a span 1,900 below 6.2 84% kept 68% kept" in page.text


def test_differences_are_those_of_the_shortest_windows_with_intervals(demo: Demo) -> None:
    own = [row for row in demo.by_position if row["arm"] == "T5 bias"]
    edges = [(1, 1), *((2**n, 2 ** (n + 1) - 1) for n in range(1, 11))]
    assert [(row["first"], row["last"]) for row in own] == edges
    assert [row["length"] for row in own] == [128] * 7 + [512] * 2 + [2048] * 2
    assert all(row["low"] <= row["mean"] <= row["high"] for row in own) and own[-1]["real"]
    source, retrofit = (losses_of(number, ABOVE[number]) for number in (0, 1))
    expected = (retrofit[1].losses - source[1].losses)[:, 127:255].mean().item()
    assert own[7]["mean"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("picture", ["positions", "spans"])
def test_names_in_the_pictures_do_not_lie_on_one_another(demo: Demo, picture: str) -> None:
    styles = pictures.styles_of(NAMES)
    with plt.rc_context(STYLE):
        if picture == "positions":
            figure = pictures.above_source(demo.by_position, styles)
        else:
            figure = pictures.span_gains({arm.name: arm.gains for arm in demo.arms}, styles)
        figure.draw_without_rendering()
    names = [text for text in figure.axes[0].texts if text.get_text()]
    ticks = [text for text in figure.axes[0].get_xticklabels() if text.get_text()]
    assert len(names) == (2 if picture == "positions" else 3)
    plt.close(figure)
    for texts in (names, ticks):
        boxes = [Text.get_window_extent(text) for text in texts]  # of the words, not of their arrows
        assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
