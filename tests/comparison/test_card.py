"""The Markdown card: where T5's bias loses comes first, its figures are the result's, its pictures lie beside it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from rpb_retrofit.comparison.card import where_t5_loses, write_card
from tests.comparison.synthetic import result, without

NAMES = ("source", "yarn:2", "longrope", "none", "t5", "t5-kept-log")


def test_where_t5_loses_is_said_against_the_best_of_the_others() -> None:
    sentences = list(where_t5_loses(document := result(NAMES, tokens=1000)))
    rows = {row["id"]: row for row in document["rows"]}
    behind = rows["t5-kept-log"]["beyond"]["mean"] - rows["yarn:2"]["beyond"]["mean"]
    assert sentences[0].startswith(f"untrained, at 16,384 tokens: t5-kept-log, the best T5 arm, loses {behind:+.3f} (")
    assert sentences[0].endswith("nats a token more than yarn:2")
    slower = rows["t5"]["speed"][-1]["prefill_s"] / rows["none"]["speed"][-1]["prefill_s"]
    assert f"reading a prompt: t5, the fastest T5 arm, takes {slower:.2f} times as long as none" in sentences
    assert any(s.startswith("healed, inside") and s.endswith("source healed, no sure difference") for s in sentences)
    assert sum("a span repeated" in s for s in sentences) == 4


def test_nothing_is_said_where_t5_is_ahead_or_alone() -> None:
    ahead: Any = without(result(("source", "none", "t5")), "speed", "induction")
    for row in ahead["rows"]:
        if row["id"] == "t5":
            row["beyond"]["mean"], row["inside"]["mean"] = 0.5, 0.5
    assert list(where_t5_loses(ahead)) == []
    assert list(where_t5_loses(result(("source", "t5")))) != []
    assert list(where_t5_loses(result(("source", "none")))) == []


def test_card(tmp_path: Path) -> None:
    document = result(NAMES, tokens=1000)
    write_card(document, tmp_path / "card.md", "A title", "What was done.")
    text = (tmp_path / "card.md").read_text()
    assert text.startswith("# A title\n") and "What was done." in text and document["headline"] in text
    assert text.index("loses to another arm") < text.index(document["headline"]), "what is against it comes first"
    for row in document["rows"]:
        whole = next(one for one in text.splitlines() if one.startswith(f"| {row['id']} |"))
        assert f"{row['beyond']['mean']:.3f}" in whole and f"{row['inside']['mean']:.3f}" in whole
        assert f"**{row['arm']}**: {row['about']}" in text
    pictures = re.findall(r"!\[[^]]+\]\((.+?)\)", text)
    assert len(pictures) >= 3 and all((tmp_path / name).read_bytes()[:5] == b"<?xml" for name in pictures)
    assert not re.search(r"\b(None|nan|inf)\b", text) and "\n\n\n" not in text


def test_card_without_what_was_not_measured(tmp_path: Path) -> None:
    document = without(result(("source", "none", "t5")), "speed", "induction", "retrieval", "by_position")
    write_card(document, tmp_path / "card.md", "A title")
    text = (tmp_path / "card.md").read_text()
    assert "repeated span" not in text and "| none |" in text and not re.search(r"\b(None|nan|inf)\b", text)
