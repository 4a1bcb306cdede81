"""The page that a comparison is read on: whole, self-contained, true to the result, and legible with parts missing."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib import pyplot as plt
from matplotlib.text import Text

from rpb_retrofit.comparison import pictures
from rpb_retrofit.comparison.page import write_page
from rpb_retrofit.comparison.pictures import PlottedRow
from rpb_retrofit.comparison.ranking import Ranking
from rpb_retrofit.evaluation.plots import STYLE
from rpb_retrofit.pages.drawing import LINE_STYLES
from tests.comparison.synthetic import ARMS, CONTEXT, TARGET, broken, recommended, result, without
from tests.support.page import Page

BARE = ("retrieval", "induction", "speed", "by_position")
FEW = ("source", "yarn:2", "dynamic", "t5")


def infinite() -> dict[str, Any]:
    """One cluster of text, so that no interval is known; the sentences of the answer are not this page's."""
    sure, unsure = result(FEW), result(FEW, spread=math.inf)
    return {**unsure, "headline": sure["headline"], "recommendation": sure["recommendation"]}


def untimed_here_and_there() -> dict[str, Any]:
    document = result(FEW)
    document["rows"][1]["speed"][1] = {"length": 2048, "skipped": "no memory for it"}
    document["rows"][2]["speed"] = [{"length": n, "skipped": "no memory for it"} for n in (512, 2048)]
    for timed in (timed for row in document["rows"] for timed in row["speed"]):
        timed["peak_bytes"] = None
    return recommended(document)


def target_inside() -> dict[str, Any]:
    document = result(FEW)
    rows = [{**row, "beyond": {**row["beyond"], "first": 1}} for row in document["rows"]]
    return {**document, "rows": rows, "context": 2 * TARGET}


def nothing_works() -> dict[str, Any]:
    document = result(("source", "yarn:2"))
    for name in ("source", "yarn:2"):
        document = broken(document, name, "at 16384 tokens: no memory for it")
    return recommended(document)


CASES = {
    "all": lambda: result(max_slowdown=1.05, must_keep=0.02),
    "trained": lambda: result(FEW, tokens=51200, max_slowdown=1.05, train_tokens=100_000),
    "nothing fits": lambda: result(FEW, max_slowdown=0.5, must_keep=0.0),
    "bare": lambda: recommended(without(result(FEW), *BARE)),
    "no speed": lambda: recommended(without(result(FEW), "speed")),
    "little speed": untimed_here_and_there,
    "one arm": lambda: result(("source",)),
    "one arm, bare": lambda: recommended(without(result(("source",)), *BARE, "inside", "losses")),
    "infinite": infinite,
    "source broken": lambda: recommended(broken(result(FEW), "source", "at 16384 tokens: it has 8192 positions")),
    "nothing works": nothing_works,
    "target inside": target_inside,
    "nothing inside": lambda: recommended(without(result(FEW), "inside")),
}  # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str]:
    """A result with its page."""
    document = CASES[request.param]()
    file = tmp_path_factory.mktemp("page") / "report.html"
    write_page(document, file)
    assert [path.name for path in file.parent.iterdir()] == ["report.html"]
    return document, file.read_text()


def render(document: dict[str, Any], folder: Path) -> tuple[Page, str]:
    write_page(document, folder / "report.html")
    source = (folder / "report.html").read_text()
    return Page(source), source


def inside(source: str, tag: str, name: str = "") -> Page:
    """What stands in one element."""
    start = source.index(f'<{tag} id="{name}"' if name else f"<{tag}")
    return Page(source[start : source.index(f"</{tag}>", start) + len(tag) + 3])


def test_the_page_is_whole_and_needs_nothing_else(written: tuple[Any, str]) -> None:
    _, source = written
    page = Page(source)
    assert not re.search(r"https?:|@import|url\(", source)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    assert all(address.startswith("data:image/") for address in page.values("src"))
    assert all(attributes["alt"] for tag, attributes in page.tags if tag == "img")
    assert all("scope" in attributes for tag, attributes in page.tags if tag == "th")
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h\d", tag)]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    anchors, links = page.values("id"), page.values("href")
    assert len(anchors) == len(set(anchors))
    assert {link.removeprefix("#") for link in links} <= set(anchors)


def test_the_answer_stands_on_top(written: tuple[Any, str]) -> None:
    document, source = written
    answer, words = document["recommendation"], inside(source, "header").text
    assert inside(source, "h1").text == document["headline"]
    for key in ("reasons", "costs", "changes", "failures"):
        assert all(sentence in words for sentence in answer[key])
    assert all(f"{name}: {why}" in words for name, why in answer["rejected"].items())
    if answer["choice"] is not None:
        assert next(row["how"] for row in document["rows"] if row["id"] == answer["choice"]) in words
    if answer["runner_up"] is not None:
        assert f"Runner-up {answer['runner_up']}: " in words


def test_no_number_leaks_as_python_writes_it(written: tuple[Any, str]) -> None:
    _, source = written
    text = Page(source).text.replace("None were given", "")
    assert not re.search(r"(?<![\w-])[+-]?(inf|nan)(?![\w-])|\b(None|NaN|Infinity|True|False)\b", text)


def test_every_row_is_listed_with_its_figures(written: tuple[Any, str]) -> None:
    document, source = written
    listed = inside(source, "section", "arms").text
    for row in document["rows"]:
        name = Ranking(document).titled(row["id"])
        loss = f"{row['beyond']['mean']:.3f}" if row["beyond"] else "not measured"
        if any(other["beyond"] for other in document["rows"]):
            assert f" {name} {loss} " in listed
        assert row["how"] in listed
        if row["broken"]:
            assert f"{row['id']} cannot be taken: {row['broken']}" in listed


def test_what_was_not_measured_has_no_exhibit(tmp_path: Path) -> None:
    def anchors(document: dict[str, Any]) -> set[str]:
        return set(render(document, tmp_path)[0].values("id"))

    whole = anchors(result(FEW))
    assert {"quality", "inside", "lengths", "positions", "questions-passkey", "induction", "speed", "pairs"} <= whole
    assert whole - anchors(recommended(without(result(FEW), *BARE))) == {
        *("positions", "questions-passkey", "questions-multi-value", "induction", "speed")
    }
    assert "inside" not in anchors(recommended(without(result(FEW), "inside")))
    assert not {"quality", "pairs", "positions"} & anchors(nothing_works())


def test_the_numbers_of_the_pictures_are_in_tables(tmp_path: Path) -> None:
    document = result(FEW, tokens=51200)
    _, source = render(document, tmp_path)
    row = next(row for row in document["rows"] if row["id"] == "yarn:2 healed")
    quality = inside(source, "section", "quality").text
    assert f"{row['beyond']['mean']:.3f}" in quality
    gap = row["inside"]["above"]
    bounds = f"{gap['mean']:+.3f} {gap['low']:+.3f} {gap['high']:+.3f}"
    assert f"yarn:2 healed {row['inside']['mean']:.3f} {bounds}" in inside(source, "section", "inside").text
    assert f"yarn:2 healed 2,048 {row['losses'][0]['mean']:.3f}" in inside(source, "section", "lengths").text
    last = row["by_position"][-1]
    assert f"yarn:2 healed {CONTEXT} to {TARGET - 1} {last['nll']:.3f}" in inside(source, "section", "positions").text
    assert "yarn:2 healed passkey 2048 90% 4 100%" in inside(source, "section", "questions-passkey").text
    assert "t5 2,048 1.354 1.10 1.384 32.9 1.06 107.6 1.10" in inside(source, "section", "speed").text
    pair = next(p for p in document["pairs"] if (p["a"], p["b"], p["at"]) == ("yarn:2", "t5", "target"))
    assert f"yarn:2 t5 {pair['mean']:+.3f}" in inside(source, "section", "pairs").text
    assert "--target-length 16384" in inside(source, "section", "repeat").text
    assert "interpolated: the source's positions" in inside(source, "section", "skipped").text


def test_who_is_not_told_apart_is_said_so(tmp_path: Path) -> None:
    _, source = render(result(("source", "yarn:2", "longrope", "t5")), tmp_path)
    words = inside(source, "section", "pairs").text
    assert "Of 6 pairs 5 really differ." in words
    assert "Not told apart from yarn:2: longrope." in words
    assert "1. yarn:2, choice ≈ -0.007 -1.396 -2.339" in words


def test_the_context_is_marked_only_where_it_ends_in_the_picture(tmp_path: Path) -> None:
    line = "The line stands where the context ends"
    assert line in render(result(FEW), tmp_path)[1]
    assert line not in render(target_inside(), tmp_path)[1]


def test_hostile_names_are_text(tmp_path: Path) -> None:
    document = result(FEW)
    document["source"] = "<script>alert(1)</script>"
    document["rows"][1]["how"] = '"><img src=x onerror=alert(1)>'
    page, source = render(document, tmp_path)
    assert "<script" not in source
    assert "onerror" in page.text
    assert not page.values("onerror")


def test_a_page_is_the_same_bytes_for_the_same_numbers(tmp_path: Path) -> None:
    assert render(result(FEW), tmp_path)[1] == render(result(FEW), tmp_path)[1]


def test_the_front_holds_what_nothing_beats_in_both() -> None:
    points = [(float(a), float(b)) for a, b in itertools.product(range(4), range(4)) if (3 * a + 2 * b) % 5]
    kept = [p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)]
    assert pictures.front(points) == sorted(kept)
    assert pictures.front([]) == []


@pytest.mark.parametrize("crowd", ["spread", "one time"])
def test_names_of_points_do_not_lie_on_one_another(crowd: str) -> None:
    plotted = [
        PlottedRow(f"{name}{trained}", loss / shrink, loss - 0.02, loss + 0.02, True, LINE_STYLES[0], budget, time)
        for budget, trained, shrink in (("untrained", "", 1), ("trained on 9 tokens", " healed", 1.3))
        for name, (_, loss, slow) in ARMS.items()
        for time in [slow if crowd == "spread" else 1.0]
    ]
    with plt.rc_context(STYLE):
        figure = pictures.quality(plotted, 1.05)
        figure.draw_without_rendering()
    names = [text for text in figure.axes[0].texts if text.get_text()]
    assert {row.name for row in plotted} <= {text.get_text() for text in names}
    boxes = [Text.get_window_extent(text) for text in names]  # of the words, not of their arrows
    plt.close(figure)
    overlapping = [
        (a.get_text(), b.get_text())
        for (a, x), (b, y) in itertools.combinations(zip(names, boxes, strict=True), 2)
        if x.overlaps(y)
    ]
    assert not overlapping
