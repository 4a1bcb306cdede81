"""The page that a diagnosis is read on: whole, self-contained, linked, and honest about what was not found."""

from __future__ import annotations

import base64
import math
import re
from pathlib import Path
from typing import Any

import pytest

from rpb_retrofit.diagnosis import plots
from rpb_retrofit.diagnosis.hypotheses import HYPOTHESES
from rpb_retrofit.diagnosis.report import EVIDENCE, write_report
from rpb_retrofit.diagnosis.summary import summary
from rpb_retrofit.pages.drawing import as_data_uri
from rpb_retrofit.pages.words import number
from tests.diagnosis.report_cases import cost, figures, result, unbounded
from tests.support.page import Page

COMMAND = "rpb diagnose out --source org/model"


def render(document: dict[str, Any], folder: Path) -> tuple[Page, str]:
    write_report({**document, "summary": summary(document)}, COMMAND, folder / "report.html")
    source = (folder / "report.html").read_text()
    return Page(source), source


@pytest.mark.parametrize("confirmed", [(), ("wrong_scale", "foreign_tables")])
def test_the_page_is_whole_and_needs_nothing_else(confirmed: tuple[str, ...], tmp_path: Path) -> None:
    page, source = render(result(confirmed), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert not re.search(r"https?:|@import|url\(", source)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    pictured = page.values("src")
    assert len(pictured) == 9
    assert all(address.startswith("data:image/") for address in pictured)
    assert all(attributes["alt"] for tag, attributes in page.tags if tag == "img")
    assert all("scope" in attributes for tag, attributes in page.tags if tag == "th")


@pytest.mark.parametrize("confirmed", [(), ("wrong_scale", "foreign_tables")])
def test_every_link_leads_somewhere(confirmed: tuple[str, ...], tmp_path: Path) -> None:
    page, _ = render(result(confirmed), tmp_path)
    anchors, links = page.values("id"), page.values("href")
    assert len(anchors) == len(set(anchors))
    assert links
    assert all(link.startswith("#") for link in links)
    assert {link[1:] for link in links} <= set(anchors)
    # Whatever a hypothesis can point at is an exhibit of the full page, so that no link is lost by a wrong name.
    assert {anchor for targets in EVIDENCE.values() for anchor in targets} <= set(anchors)
    assert {f"h-{hypothesis.name}" for hypothesis in HYPOTHESES} <= set(anchors)
    assert set(EVIDENCE) <= {hypothesis.name for hypothesis in HYPOTHESES}


def verdict(source: str) -> str:
    return Page(source[source.index("<header") : source.index("</header>") + len("</header>")]).text


def test_the_verdict_names_the_first_cause_with_evidence_gain_and_remedy(tmp_path: Path) -> None:
    document = result(
        ("wrong_scale", "foreign_tables"), missing={"control": "what the text did"}, skipped={"a": "too long"}
    )
    page, source = render(document, tmp_path)
    shown = verdict(source)
    assert "First cause: the bias is scaled, or the content is not." in shown
    assert "Also confirmed: the tables do not suit this source." in shown
    assert "Evidence of wrong_scale." in shown
    assert "Undoing it brings back 0.321 nats a token, 60% of what was lost." in shown
    assert "Remedy of wrong_scale." in shown
    assert "+0.200 (95% interval +0.180 to +0.220) nats a token against the source in windows of 256" in shown
    assert "control: what the text did, cannot be told" in shown
    assert "a: too long" in shown
    assert f"{COMMAND} --only wrong_scale" in page.text
    assert 'href="#factorial"' in source[: source.index("</header>")]


def test_a_healthy_model_is_told_what_was_not_found(tmp_path: Path) -> None:
    costs = [cost(64, 0.001, real=False), cost(256, 0.01, real=False)]
    _, source = render(result(costs=costs), tmp_path)
    shown = verdict(source)
    assert "No cause of a regression found" in shown
    assert "may still be there" in shown
    assert "Could not be told domain drift, not positions ." in shown
    assert "No difference found: +0.010" in shown
    assert "That is not to say that there is none: the smallest effect" in shown
    assert "4 times in 5 is 0.030." in shown
    assert "The retrofit does lose" not in shown


def test_a_cost_that_nothing_explains_is_said_to_be_one(tmp_path: Path) -> None:
    _, source = render(result(), tmp_path)
    assert "The retrofit does lose, and none of what was excluded explains it." in verdict(source)


@pytest.mark.parametrize(
    ("costs", "sentence"),
    [
        ([cost(64, 0.1), cost(64, 0.5, above="control")], "+0.520) nats a token against the control"),
        ([cost(64, 0.9, real=False), cost(256, 0.2)], "+0.200 (95%"),
        ([cost(64, -0.3)], "The retrofit's loss is the lower one."),
        ([{**cost(64, 0.1), **unbounded(0.1)}], "no effect of any size could have been seen"),
        ([], "Not measured: that takes a source or a control"),
    ],
    ids=["control", "real", "lower", "one cluster", "none"],
)  # fmt: skip
def test_the_cost_that_is_named(costs: list[dict[str, Any]], sentence: str, tmp_path: Path) -> None:
    assert sentence in verdict(render(result(costs=costs), tmp_path)[1])


def test_infinities_are_words(tmp_path: Path) -> None:
    page, _ = render(result(costs=[{**cost(64, 0.1), **unbounded(0.1)}]), tmp_path)
    assert "minus infinity" in page.text
    assert "infinite" in page.text
    assert "it takes two clusters of text to know the spread" in page.text
    assert not re.search(r"(?<![a-z])[+-]?(inf|nan)(?![a-z])", page.text)
    assert number(math.nan) == "not a number"
    assert number(None) == "not measured"


def test_hostile_names_are_text(tmp_path: Path) -> None:
    document = result(text="<b>bold")
    document["arms"]["retrofit"] = "<script>alert(1)</script>"
    document["hypotheses"][0]["finding"]["because"] = '"><img src=x onerror=alert(1)>'
    page, source = render(document, tmp_path)
    assert "<script" not in source
    assert "<script>alert(1)</script>" in page.text
    assert "onerror" in page.text
    assert not page.values("onerror")


def test_a_probe_that_failed_is_said_to_have(tmp_path: Path) -> None:
    document = result()
    assert "Its probe ended in an error" not in render(document, tmp_path)[0].text
    document["hypotheses"][0]["finding"].update(verdict="can't tell", failed=True, because="RuntimeError: <x>")
    text = render(document, tmp_path)[0].text
    assert "Its probe ended in an error , so this says nothing of the model: RuntimeError: <x>" in text


def test_a_model_that_does_not_run_has_a_page_without_pictures(tmp_path: Path) -> None:
    page, _ = render(result(("does_not_run",), figures={}), tmp_path)
    assert not page.values("src")
    assert "First cause: the model does not run." in page.text
    assert {link[1:] for link in page.values("href")} <= set(page.values("id"))


def test_the_numbers_of_the_pictures_are_in_tables(tmp_path: Path) -> None:
    text = render(result(), tmp_path)[0].text
    assert "retrofit passkey 256 90% 8 88%" in text
    assert "multi-value 256 spread 8 50%" in text
    assert "12,345" in text
    assert "On the 77 tokens that the source predicts well only with far context" in text
    assert "retrofit 256 50.0 0.50 100.0 50.0 0.50 not measured 3" in text  # the source's speed is twice that
    assert "skipped: no memory for it" in text
    assert "Score scale (times 4): sentence of the crossing." in text


def test_panels_of_the_bias_hold_the_difference_and_gaps_where_the_source_has_none() -> None:
    panels = plots.bias_panels({"retrofit": {"a": [[3.0, 1.0]], "b": [[1.0, 1.0]]}, "source": {"a": [[1.0, 4.0]]}})
    assert panels["retrofit less source"][0].tolist() == [2.0, -3.0]
    assert all(math.isnan(value) for value in panels["retrofit less source"][1])
    assert list(plots.bias_panels({"retrofit": {"a": [[3.0]]}, "source": {}})) == ["retrofit"]


def test_heat_maps_grow_with_the_heads_and_stay_bounded() -> None:
    def height(layers: int, heads: int) -> float:
        tables = {"retrofit": {f"layers.{i}.attn": [[0.0, 1.0]] * heads for i in range(layers)}, "source": {}}
        figure = plots.bias([0, 1], tables)
        plots.plt.close(figure)
        return float(figure.get_size_inches()[1])

    assert height(2, 4) < height(30, 9) <= 11


def test_a_picture_is_the_same_bytes_for_the_same_numbers() -> None:
    rows = figures([])["entropy"]
    first, again = (as_data_uri(lambda: plots.entropy(rows)) for _ in range(2))
    assert first == again
    assert b"<svg" in base64.b64decode(first.partition(",")[2])
